"""Tables for looking at rewards: beta * (log pi - log pi_ref) of stored rows, per pair and per token, and all that stands around them:
training curves, the labeler's claims, the order of pairs, measured hallucination. muffin/figures.py draws them.

    before, after = load_scorings("scored/", "scored-by-the-trained-policy/")
    pairs = pair_rewards(before, after, beta=0.1)        # one row per answer of a pair
    tokens = token_rewards(before, after, beta=0.1)      # one row per token

Everything is read from files that recipes left (both scorings come from eval/muffin_inference_logp.py): no model and no GPU is needed.
Truth is known of the tiny image world alone, whose rows carry the column `scene`.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from muffin.pairs import REFERENCE_COLUMNS, PreferenceDataset, PreferencePair, load_preferences, load_prompts
from muffin.policies import PolicyAdapter, PolicyOptions, encode_pair, load_adapter, resolve_checkpoint
from muffin.provenance import differing, hash_fields, read_reference
from muffin.reward import RewardModel
from muffin.shapeworld.claims import Claim, is_true, split_claims
from muffin.shapeworld.measure import wrong_claims
from muffin.shapeworld.scenes import Scene

SIDES = ("chosen", "rejected")
Row = Mapping[str, Any]


def last_round(run: str | Path) -> Path:
    """The folder round-N of the highest N in a folder of train/iterate.py. Raises ValueError when there is none."""
    rounds = {int(match[1]): folder for folder in Path(run).glob("round-*") if (match := re.fullmatch(r"round-(\d+)", folder.name))}
    if not rounds:
        raise ValueError(f"{run} holds no folder round-N; give the --output_dir of train/iterate.py")
    return rounds[max(rounds)]


def judged_evaluations(run: str | Path) -> list[Path]:
    """Folders of judged answers about the held-out images in a run of train/iterate.py on own images, in order of rounds."""
    found = [folder for folder in Path(run).glob("evaluation-*/judged") if folder.parent.name.removeprefix("evaluation-").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.parent.name.removeprefix("evaluation-")))


def read_rows(folder: str | Path) -> list[Row]:
    """All rows of a folder of Parquet files, without their images and log-probs."""
    table = load_prompts(folder).table
    heavy = [name for name in ("image", "images", "logps", *REFERENCE_COLUMNS) if name in table.column_names]
    return table.remove_columns(heavy).to_list()


# --- training


def training_options(run: str | Path) -> dict[str, Any]:
    """The options of DPO in the options.json that train/dpo.py left in `run`; empty where there is none."""
    file = Path(run) / "options.json"
    return json.loads(file.read_text())["DPOArguments"] if file.is_file() else {}


def start_loss(options: Mapping[str, Any]) -> float | None:
    """The loss of a policy that is its own reference under `training_options`; None where it depends on the data (--sft_weight)."""
    if options.get("sft_weight", 0.0):
        return None
    return (1 / (2 * options["dpo_beta"])) ** 2 if options.get("loss_type") == "ipo" else math.log(2)


def training_curves(run: str | Path) -> pd.DataFrame:
    """What a training run logged, one row per optimizer step, under the names of trainer_state.json (rewards in beta * nats).

    Raises ValueError when `run` holds no trainer_state.json, or one without a logged loss.
    """
    history = [entry for entry in _log_history(run) if "loss" in entry]
    if not history:
        raise ValueError(f"{run}/trainer_state.json has no logged loss; train with --logging_steps of at most the number of steps")
    return pd.DataFrame(history).set_index("step")


def evaluation_curves(run: str | Path) -> pd.DataFrame:
    """The run's evaluations on held-out rows, one row per step, under the names of `training_curves`; no rows without --eval_data_path."""
    history = [{name.removeprefix("eval_"): value for name, value in entry.items()} for entry in _log_history(run) if "eval_loss" in entry]
    return pd.DataFrame(history).set_index("step") if history else pd.DataFrame()


def _log_history(run: str | Path) -> list[dict[str, Any]]:
    file = Path(run) / "trainer_state.json"
    if not file.is_file():
        raise ValueError(f"{run} holds no trainer_state.json; give the --output_dir of train/dpo.py, or a checkpoint folder in it")
    return json.loads(file.read_text())["log_history"]


# --- rewards


def load_scorings(
    before: str | Path, after: str | Path, *, column_map: Mapping[str, str] | None = None, image_root: str | Path | None = None
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Two scorings of the same rows, by the reference and by the trained policy, whose difference is the policies' alone.

    before, after: folders of eval/muffin_inference_logp.py; column_map, image_root: as for `load_preferences`.
    Raises ValueError when either lacks muffin_reference.json, and when they were computed in other numerics, with another tokenizer or
    under another encoding (prompt, image options).
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

    def load(path: str | Path) -> PreferenceDataset:
        return load_preferences(path, column_map=column_map, image_root=image_root)

    return load(before), load(after)


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


def live_rewards(model: RewardModel, pairs: PreferenceDataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `pair_rewards` and `token_rewards`, computed now with policy and reference in memory; nothing stored is read.

    Position and idx are those of `pairs`. Raises ValueError as `RewardModel.reward` does.
    """
    of_pairs, of_tokens = [], []
    for position in range(len(pairs)):
        pair = pairs[position]
        found = dict(zip(SIDES, model.reward(pair.image, pair.question, (pair.chosen, pair.rejected)), strict=True))
        margin = found["chosen"].sum - found["rejected"].sum
        for side, reward in found.items():
            row = {"position": position, "idx": pair.idx, "side": side}
            values = reward.per_token.tolist()
            of_pairs.append(row | {"tokens": len(values), "reward_sum": reward.sum, "reward_mean": reward.mean, "margin": margin})
            of_tokens += [row | {"token": token, "reward": value} for token, value in enumerate(values)]
    return pd.DataFrame(of_pairs), pd.DataFrame(of_tokens)


def share_below_zero(rewards: pd.DataFrame) -> float:
    """Percent of the pairs of `pair_rewards` whose margin is below 0: the trained policy prefers the rejected answer."""
    return 100 * float((margins(rewards) < 0).mean())


def margins(rewards: pd.DataFrame) -> pd.Series:
    """The margin of every pair of `pair_rewards`, by its position."""
    return rewards[rewards.side == "chosen"].set_index("position").margin


def worst_pairs(rewards: pd.DataFrame, count: int) -> pd.Series:
    """The `count` lowest margins, lowest first, by position."""
    return margins(rewards).sort_values(kind="stable").head(count)


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


# --- the text of tokens


def load_scoring_adapter(scored: str | Path, policy: str | Path) -> PolicyAdapter:
    """Tokenizer and prompt that a folder of eval/muffin_inference_logp.py was scored with; reads no weights.

    policy: a folder with that tokenizer: the trained policy (with --merge_lora True its merged/ is taken), or the one that scored.
    Raises ValueError for folders that are not what they should be.
    """
    reference = read_reference(scored)
    if reference is None:
        raise ValueError(f"{scored} holds no muffin_reference.json; give the --output_dir of eval/muffin_inference_logp.py")
    merged = Path(policy) / "merged"
    known = {name: value for name, value in reference["encoding"].items() if name in vars(PolicyOptions())}
    return load_adapter(resolve_checkpoint(merged if merged.is_dir() else policy), PolicyOptions(**known))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text, so that joined they are that text; a part of a character adds nothing, the last all."""
    texts, written = [], ""
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and stop < len(ids)
        texts.append("" if unfinished else text[len(written) :])
        written = written if unfinished else text
    return texts


def pair_tokens(adapter: PolicyAdapter, pair: PreferencePair, rewards: pd.DataFrame) -> pd.DataFrame:
    """Rows of `token_rewards` of one pair with the token's text, and whether it is in the beginning that both answers share.

    Columns: side, token, text, shared, reward. Raises ValueError when the adapter cuts the answers into other numbers of tokens.
    """
    ids = [response.tolist() for response in encode_pair(adapter, pair).response_ids]
    shared = len(os.path.commonprefix(ids))
    rows = []
    for side, response in zip(SIDES, ids, strict=True):
        values = rewards[rewards.side == side].sort_values("token").reward.tolist()
        if len(values) != len(response):
            raise ValueError(
                f"{side} of the row with idx {pair.idx} has {len(values)} stored log-probs and {len(response)} tokens here; "
                "give the --policy whose tokenizer scored the rows"
            )
        texts = token_texts(adapter.tokenizer, response)
        rows += [
            {"side": side, "token": token, "text": text, "shared": token < shared, "reward": value}
            for token, (text, value) in enumerate(zip(texts, values, strict=True))
        ]
    return pd.DataFrame(rows)


# --- claims and what the labeler thinks of them


@dataclass(frozen=True)
class JudgedClaim:
    """A claim of an answer. p_yes: P(yes) / (P(yes) + P(no)) of the labeler, None for a claim that it was not asked about.

    kind: what it is about and whether that holds, truth: whether the claim does; both None where the truth is not known.
    """

    text: str
    p_yes: float | None
    kind: str | None = None
    truth: bool | None = None

    @property
    def accepted(self) -> bool:
        """Whether the labeler thinks yes likelier than no."""
        return self.p_yes is not None and self.p_yes > 0.5

    @property
    def verdict(self) -> str:
        """The labeler's P(yes), and the truth where it is known: 0.93, false."""
        p_yes = "not asked" if self.p_yes is None else f"{self.p_yes:.2f}"
        return p_yes if self.truth is None else f"{p_yes}, {'true' if self.truth else 'false'}"


def claims_of(row: Row, side: str | None = None) -> list[JudgedClaim]:
    """The claims of a judged answer, or of one side of a pair of data/build_pairs.py; none where the row holds no judgements."""
    claims, p_yes, p_no = (row.get(f"{side}_{name}" if side else name) or [] for name in ("claims", "p_yes", "p_no"))
    scene = Scene.from_json(row["scene"]) if "scene" in row else None
    return [
        JudgedClaim(claim, _share(yes, no), *((None, None) if scene is None else _truth(split_claims(claim), scene)))
        for claim, yes, no in zip(claims, p_yes, p_no, strict=True)
    ]


def _share(p_yes: float | None, p_no: float | None) -> float | None:
    """A labeler that says neither has no opinion: a half, which rejects."""
    if p_yes is None or p_no is None:
        return None
    return p_yes / (p_yes + p_no) if p_yes + p_no > 0 else 0.5


def claim_table(judged: Sequence[Row]) -> pd.DataFrame:
    """One row per claim of judged answers (data/score_claims.py): answer (its row), claim, p_yes (as in JudgedClaim, NaN for None),
    accepted, and where the rows have a `scene` kind (what the claim is about and whether it holds) and truth.

    Raises ValueError when no answer was judged.
    """
    rows = []
    for number, answer in enumerate(judged):
        for claim in claims_of(answer):
            row = {"answer": number, "claim": claim.text, "p_yes": claim.p_yes, "accepted": claim.accepted}
            rows.append(row | ({} if claim.truth is None else {"kind": claim.kind, "truth": claim.truth}))
    if not rows:
        raise ValueError("the rows hold no judged claim; make them with data/score_claims.py")
    return pd.DataFrame(rows).astype({"p_yes": float})


def _truth(stated: Sequence[Claim], scene: Scene) -> tuple[str, bool]:
    """Kind and truth of what a claim's text states."""
    truth = bool(stated) and all(is_true(claim, scene) for claim in stated)
    kinds = [claim.kind for claim in stated if claim.kind is not None]
    if kinds:
        invented = any(kind not in scene.kinds for kind in kinds)
        return "object, true" if truth else "object, invented" if invented else "object, elsewhere", truth
    if any(claim.count is not None for claim in stated):
        return "count, true" if truth else "count, wrong", truth
    return "no statement", truth


def auroc(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """Probability that a true one scores higher than a false one, ties counting half; NaN when either is missing."""
    true = np.asarray(truths, dtype=bool)
    positives, negatives = int(true.sum()), int((~true).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = pd.Series(scores).rank().to_numpy()
    return float((ranks[true].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def reliability(claims: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Of a `claim_table` with truth: claims by p_yes in `bins` of equal width, empty ones left out.

    Columns: low, high (the bin), claims, predicted (mean p_yes), true (share of true claims), true_low, true_high (95 % Wilson interval).
    Raises ValueError without truth.
    """
    _need_truth(claims)
    asked = claims.dropna(subset="p_yes")
    bin_of = np.minimum((asked.p_yes * bins).astype(int), bins - 1)
    rows = []
    for number, inside in asked.groupby(bin_of):
        count, share = len(inside), float(inside.truth.mean())
        low, high = _wilson(share, count)
        row = {"low": number / bins, "high": (number + 1) / bins, "claims": count, "predicted": float(inside.p_yes.mean())}
        rows.append(row | {"true": share, "true_low": low, "true_high": high})
    return pd.DataFrame(rows)


def _wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); unlike the normal one it stays within 0 and 1."""
    centre, spread = share + z * z / (2 * count), z * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)


def calibration_error(bins: pd.DataFrame) -> float:
    """Mean distance between predicted and true share over the claims of `reliability` (the expected calibration error)."""
    return float((bins.claims * (bins.predicted - bins.true).abs()).sum() / bins.claims.sum())


def confusion(claims: pd.DataFrame) -> pd.DataFrame:
    """Of a `claim_table` with truth, by kind: claims, accepted, rejected, right (percent that the labeler judged as the truth does).

    Raises ValueError without truth.
    """
    _need_truth(claims)
    grouped = claims.assign(right=claims.accepted == claims.truth).groupby("kind")
    table = pd.DataFrame({"claims": grouped.size(), "accepted": grouped.accepted.sum(), "right": 100 * grouped.right.mean()})
    table.insert(2, "rejected", table.claims - table.accepted)
    return table.sort_index(ascending=False)


def _need_truth(claims: pd.DataFrame) -> None:
    if "truth" not in claims:
        raise ValueError("the rows have no column `scene`, so the truth of their claims is not known; only the tiny image world carries it")


def pair_orders(pairs: Sequence[Row]) -> pd.DataFrame:
    """The labeler's order of pairs against the truth, by position: chosen_wrong, rejected_wrong (false claims), order.

    order: right (chosen has fewer false claims), tie, wrong. Raises ValueError without the column `scene`.
    """
    if any("scene" not in pair for pair in pairs):
        raise ValueError("the rows have no column `scene`, so the true order is not known; only the tiny image world carries it")
    counts = pd.DataFrame([wrong_claims(pair) for pair in pairs], columns=["chosen_wrong", "rejected_wrong"])
    difference = np.sign(counts.chosen_wrong - counts.rejected_wrong)
    return counts.assign(order=difference.map({-1: "right", 0: "tie", 1: "wrong"})).rename_axis("position")


# --- results


def load_moments(results: str | Path) -> pd.DataFrame:
    """results.json of train/iterate.py, one row per moment (before, after-1, ..., after) and decoding, in order.

    Columns: moment, decoding, and per metric (in the tiny world chair_s, chair_i, recall, claim_error, words; with own data the
    labeler's rejected_share, rejected_claims, accepted_claims, words) its value, METRIC_low and METRIC_high (95 %).
    Raises ValueError when the file does not exist, or holds no such numbers.
    """
    file = Path(results)
    if not file.is_file():
        raise ValueError(f"{file} does not exist; train/iterate.py writes results.json in its --output_dir")
    stored = json.loads(file.read_text())
    between = sorted((name for name in stored if re.fullmatch(r"after-\d+", name)), key=lambda name: int(name.rpartition("-")[2]))
    rows = []
    for moment in ("before", *between, "after"):
        for decoding, values in stored.get(moment, {}).items():
            intervals = {name.removesuffix("_interval"): value for name, value in values.items() if name.endswith("_interval")}
            if not intervals:
                continue  # results of benchmarks, which have tables of their own
            row = {"moment": moment, "decoding": decoding} | {name: values[name] for name in intervals}
            for name, (low, high) in intervals.items():
                row |= {f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no evaluation; train/iterate.py makes one with --heldout_images above 0")
    return pd.DataFrame(rows)


def load_choices(results: str | Path) -> pd.DataFrame:
    """The checkpoints of every round in results.json of train/iterate.py, one row per candidate, the round's start first.

    Columns: round, name, hallucination, capability, chosen, and the names of the two numbers (hallucination_name, capability_name).
    Raises ValueError when no round chose among checkpoints.
    """
    file = Path(results)
    choices = json.loads(file.read_text()).get("choice", {}) if file.is_file() else {}
    rows = [
        {"round": name, **each, "chosen": each["name"] == choice["chosen"]}
        | {f"{number}_name": choice[number] for number in ("hallucination", "capability")}
        for name, choice in choices.items()
        for each in choice.get("measured", ())
    ]
    if not rows:
        raise ValueError(f"{file} holds no choice of checkpoints; train/iterate.py makes one with --checkpoints_per_epoch above 0")
    return pd.DataFrame(rows)


def best_of_n_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """What eval/best_of_n.py found (its best_of_n.json), one row per point: selector, metric, n, value, low, high (95 %)."""
    return pd.DataFrame(
        [
            {"selector": selector, "metric": metric, "n": n, **point}
            for selector, lines in result["curves"].items()
            for metric, line in lines.items()
            for n, point in zip(result["n"], line, strict=True)
        ]
    )
