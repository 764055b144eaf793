"""Tables for looking at rewards: beta * (log pi - log pi_ref) of stored rows, per pair and per token, and a run's training curves.

    before, after = load_scorings("scored/", "scored-by-the-trained-policy/")
    pairs = pair_rewards(before, after, beta=0.1)        # one row per answer of a pair
    tokens = token_rewards(before, after, beta=0.1)      # one row per token

Both scorings come from eval/muffin_inference_logp.py, so no model and no GPU are needed here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from muffin.pairs import PreferenceDataset, PreferencePair, load_preferences
from muffin.provenance import differing, hash_fields, read_reference

SIDES = ("chosen", "rejected")


def training_curves(run: str | Path) -> pd.DataFrame:
    """What a training run logged, one row per optimizer step, under the names of trainer_state.json (rewards in beta * nats).

    Raises ValueError when `run` holds no trainer_state.json, or one without a logged loss.
    """
    file = Path(run) / "trainer_state.json"
    if not file.is_file():
        raise ValueError(f"{run} holds no trainer_state.json; give the --output_dir of train/dpo.py, or a checkpoint folder in it")
    history = [entry for entry in json.loads(file.read_text())["log_history"] if "loss" in entry]
    if not history:
        raise ValueError(f"{file} has no logged loss; train with --logging_steps of at most the number of steps")
    return pd.DataFrame(history).set_index("step")


def load_scorings(before: str | Path, after: str | Path) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Two scorings of the same rows, by the reference and by the trained policy, whose difference is the policies' alone.

    before, after: folders of eval/muffin_inference_logp.py. Raises ValueError when either lacks muffin_reference.json, and when they
    were computed in other numerics, with another tokenizer or under another encoding (prompt, image options).
    """
    described = [read_reference(path) for path in (before, after)]
    for path, reference in zip((before, after), described, strict=True):
        if reference is None:
            raise ValueError(f"{path} holds no muffin_reference.json; give the --output_dir of eval/muffin_inference_logp.py")
    first, second = ({name: each[name] for name in ("numerics", "tokenizer", "encoding")} for each in described)
    if found := differing(first, second):
        lines = "\n".join(f"  - {name}: {then} in {before}, {now} in {after}" for name, then, now in found)
        raise ValueError(
            f"the two scorings differ in more than the policy, so their difference is no reward:\n{lines}\nScore one of them again"
        )
    return load_preferences(before), load_preferences(after)


def pair_rewards(before: PreferenceDataset, after: PreferenceDataset, *, beta: float) -> pd.DataFrame:
    """Implicit rewards (arXiv:2305.18290, eq. 5) of every pair that both scorings hold, one row per answer.

    Columns: position (in `before`), idx, side (chosen or rejected), tokens (terminator included), reward_sum, reward_mean (per token),
    margin (of the pair: reward_sum of chosen - of rejected). Rows are matched by content, in the order of `before`.
    Raises ValueError as `token_rewards` does.
    """
    rows = []
    for position, old, new in _matched(before, after):
        rewards = {side: beta * (_summed(new, side) - _summed(old, side)) for side in SIDES}
        for side in SIDES:
            tokens = len(_per_token(old, side))
            row = {"position": position, "idx": old.idx, "side": side, "tokens": tokens, "reward_sum": rewards[side]}
            rows.append(row | {"reward_mean": rewards[side] / tokens, "margin": rewards["chosen"] - rewards["rejected"]})
    return pd.DataFrame(rows)


def token_rewards(before: PreferenceDataset, after: PreferenceDataset, *, beta: float) -> pd.DataFrame:
    """Implicit reward of every token, one row per token: position, idx, side, token (its number in the answer), reward.

    Raises ValueError for rows without stored per-token log-probs, for scorings that share no row or repeat one with other log-probs,
    and for answers that the two scorings cut into different numbers of tokens.
    """
    rows: list[dict[str, Any]] = []
    for position, old, new in _matched(before, after):
        for side in SIDES:
            values = zip(_per_token(old, side), _per_token(new, side), strict=True)
            rows += [
                {"position": position, "idx": old.idx, "side": side, "token": token, "reward": beta * (policy - reference)}
                for token, (reference, policy) in enumerate(values)
            ]
    return pd.DataFrame(rows)


def _matched(before: PreferenceDataset, after: PreferenceDataset) -> Iterator[tuple[int, PreferencePair, PreferencePair]]:
    """Rows of `before` with the row of `after` that has the same image, question and answers; idx may repeat, so it proves nothing."""
    scored_after: dict[str, PreferencePair] = {}
    for position in range(len(after)):
        pair = after[position]
        other = scored_after.setdefault(_content(pair), pair)
        if any(_per_token(other, side) != _per_token(pair, side) for side in SIDES):
            raise ValueError(f"the row with idx {pair.idx} is scored twice with different log-probs; score it again into an empty folder")
    found = 0
    for position in range(len(before)):
        old = before[position]
        new = scored_after.get(_content(old))
        if new is None:
            continue
        for side in SIDES:
            lengths = [len(_per_token(pair, side)) for pair in (old, new)]
            if lengths[0] != lengths[1]:
                raise ValueError(
                    f"{side} of the row with idx {old.idx} has {lengths[0]} tokens before and {lengths[1]} after; "
                    "score both with the same tokenizer and --model_max_length"
                )
        found += 1
        yield position, old, new
    if not found:
        raise ValueError("the two scorings share no row (image, question, chosen, rejected); score the same rows with both policies")


def _content(pair: PreferencePair) -> str:
    return hash_fields([pair.image_bytes, pair.question, pair.chosen, pair.rejected])


def _summed(pair: PreferencePair, side: str) -> float:
    return pair.ref_win_logp if side == "chosen" else pair.ref_rej_logp


def _per_token(pair: PreferencePair, side: str) -> list[float]:
    values = pair.ref_win_per_token_logp if side == "chosen" else pair.ref_rej_per_token_logp
    if values is None:
        raise ValueError(f"the row with idx {pair.idx} has no stored log-probs per token; score it with eval/muffin_inference_logp.py")
    return list(values)
