"""The reference gate: proof, before the first step, that stored log-probs are those of the policy about to be trained.

Keys come first (cheap, no model): every row must carry the `logps_key` of this reference. Then some rows are scored again through the
wrapped model, as training will run it: what keys cannot see (values exchanged between columns, a response mask that moved) shows here.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from PIL import Image, ImageStat
from torch import Tensor, nn

from muffin.logps import response_logps
from muffin.losses import dpo_loss
from muffin.packing import pack
from muffin.pairs import PreferenceDataset, PreferencePair, RowError
from muffin.policies.base import EncodedResponses, PolicyAdapter, encode_pair
from muffin.provenance import Numerics, explain_difference

logger = logging.getLogger(__name__)

LISTED_ROWS = 10


class ForeignLogpsError(ValueError):
    """Stored log-probs do not belong to the policy about to be trained."""


def gate_tolerance(numerics: Numerics) -> float:
    """Largest accepted mean |stored - recomputed| per token, in nats. Tiny models measure 3e-7 in float32, 2e-4 in bfloat16."""
    return 1e-5 if numerics.autocast_dtype is None else 2e-3


def refuse_foreign_rows(
    dataset: PreferenceDataset,
    foreign: Sequence[int],
    *,
    stored: dict[str, Any] | None,
    current: dict[str, Any],
    scoring_command: str,
) -> None:
    """Raise ForeignLogpsError when there are `foreign` positions, naming what differs. Unreadable rows are left to the pre-flight.

    stored: description of the reference in the data's muffin_reference.json, None when there is none; current: that of this run.
    """
    readable = [(position, idx) for position in foreign if (idx := _readable_idx(dataset, position)) is not None]
    if not readable:
        return
    rows = ", ".join(f"{position} (idx {idx})" for position, idx in readable[:LISTED_ROWS])
    more = f" and {len(readable) - LISTED_ROWS} more" if len(readable) > LISTED_ROWS else ""
    differences = explain_difference(stored, current) if stored is not None else []
    if differences:
        reasons = differences
    elif stored is None:
        reasons = [
            "the rows carry no key of this policy, and no muffin_reference.json beside the data tells where their log-probs come from"
        ]
    else:
        reasons = [
            "the reference is the same, so the rows changed after they were scored (image, question, chosen or rejected, to the last "
            "character), or log-probs and keys moved between rows (a permuted column)"
        ]
    raise ForeignLogpsError(
        f"{len(readable)} of {len(dataset)} rows store log-probs that do not belong to this policy and these rows: {rows}{more}\n"
        + "\n".join(f"  - {reason}" for reason in reasons)
        + f"\nScore them with this policy: {scoring_command}\nor train on them as they are: --accept_foreign_logps True"
    )


def _readable_idx(dataset: PreferenceDataset, position: int) -> int | str | None:
    try:
        return dataset[position].idx
    except RowError:
        return None


def spread_positions(rows: int, count: int) -> list[int]:
    """`count` positions evenly spread over `rows`, fewer where there are fewer."""
    count = min(rows, count)
    return [number * rows // count for number in range(count)]


def check_token_counts(pair: PreferencePair, encoded: EncodedResponses) -> None:
    """Raise ForeignLogpsError unless stored per-token lists are as long as the encoded responses (RLAIF-V's form has none to compare)."""
    stored = (pair.reference.ref_win_per_token_logp, pair.reference.ref_rej_per_token_logp)
    for name, token_logps, ids in zip(("chosen", "rejected"), stored, encoded.response_ids, strict=True):
        if token_logps is not None and len(token_logps) != len(ids):
            raise ForeignLogpsError(
                f"{len(token_logps)} log-probs are stored for the {len(ids)} tokens of its {name} answer; "
                "they were made for another text, tokenizer, length limit or response mask"
            )


@dataclass(frozen=True)
class RescoredPair:
    """A row's stored and recomputed log-probs. token_logps: chosen (R_chosen,), rejected (R_rejected,), recomputed."""

    pair: PreferencePair
    token_logps: tuple[Tensor, Tensor]

    @property
    def stored(self) -> tuple[float, float]:
        """Stored log-probs of chosen and rejected: sums, in nats."""
        return self.pair.reference.ref_win_logp, self.pair.reference.ref_rej_logp

    @property
    def stored_tokens(self) -> tuple[list[float] | None, list[float] | None]:
        """Stored log-probs per token of chosen and rejected; None where a row has RLAIF-V's form."""
        return self.pair.reference.ref_win_per_token_logp, self.pair.reference.ref_rej_per_token_logp

    @property
    def recomputed(self) -> tuple[float, float]:
        """Recomputed log-probs of chosen and rejected: sums, in nats."""
        return float(self.token_logps[0].double().sum()), float(self.token_logps[1].double().sum())

    @property
    def difference(self) -> float:
        """Nats between stored and recomputed values over both answers, token by token where the row has tokens."""
        return sum(map(_difference, self.stored, self.stored_tokens, self.token_logps))

    @property
    def tokens(self) -> int:
        """Tokens of both answers."""
        return len(self.token_logps[0]) + len(self.token_logps[1])


def _token_logps(
    model: nn.Module, encoded: EncodedResponses, adapter: PolicyAdapter, numerics: Numerics, device: torch.device
) -> tuple[Tensor, ...]:
    with torch.no_grad(), numerics.autocast(device.type):
        logps = response_logps(model, pack([encoded], adapter).to(device))
    return tuple(tokens.float().cpu() for tokens in logps.split())


def _difference(stored_sum: float, stored_tokens: list[float] | None, tokens: Tensor) -> float:
    """Sum over tokens of |stored - recomputed| and of what the stored sum adds; |sum - sum| where the lists cannot be compared."""
    if stored_tokens is None or len(stored_tokens) != len(tokens):
        return abs(stored_sum - float(tokens.double().sum()))
    per_token = (torch.tensor(stored_tokens, dtype=torch.float64) - tokens.double()).abs().sum()
    return float(per_token) + abs(stored_sum - math.fsum(stored_tokens))


@dataclass(frozen=True)
class GateReport:
    """What the gate measured: mean |stored - recomputed| in nats per token, and loss - ln 2 (0 for a policy that is its reference)."""

    rows: int
    mean_difference: float
    loss_minus_ln2: float


def check_reference(
    model: nn.Module,
    adapter: PolicyAdapter,
    pairs: Sequence[PreferencePair],
    *,
    numerics: Numerics,
    beta: float,
    device: torch.device,
    scoring_command: str,
    accept_foreign_logps: bool,
) -> GateReport:
    """Score `pairs` again through `model` (any wrapper, in eval mode meanwhile) and compare with what they store.

    Every process must call it with the same pairs: it does two forwards a pair and no communication of its own.
    Raises ForeignLogpsError with a table when the mean difference per token exceeds `gate_tolerance` (a warning with
    accept_foreign_logps), and ValueError when blanking the images leaves the log-probs as they are.
    """
    tolerance = gate_tolerance(numerics)
    was_training = model.training
    model.eval()
    rescored, blind = [], []
    for pair in pairs:
        image, answers = pair.image, (pair.chosen, pair.rejected)
        encoded = encode_pair(adapter, pair)
        rescored.append(RescoredPair(pair, _token_logps(model, encoded, adapter, numerics, device)))
        blank = adapter.encode(_mean_colour(image), pair.question, answers)
        without_image = _token_logps(model, blank, adapter, numerics, device)
        if blank.vision_key != encoded.vision_key:  # a picture of one colour is its own blank
            blind += [(before - after).abs() for before, after in zip(rescored[-1].token_logps, without_image, strict=True)]
    model.train(was_training)

    report = _report(rescored, beta)
    table = _table(rescored)
    if not report.mean_difference <= tolerance:  # NaN fails too
        message = (
            f"stored and recomputed log-probs differ by {report.mean_difference:.2e} nats per token over {len(pairs)} rows "
            f"(accepted: {tolerance:.0e}); loss - ln 2 = {report.loss_minus_ln2:.2e}\n{table}\n{_diagnosis(rescored, tolerance)}\n"
            f"Score the data with this policy: {scoring_command}\nor train on it as it is: --accept_foreign_logps True"
        )
        if not accept_foreign_logps:
            raise ForeignLogpsError(message)
        logger.warning("%s", message)
    if not blind:
        logger.warning(
            "reference gate: all %d checked pictures are of one colour, so whether the policy looks at them is unknown", len(pairs)
        )
    elif (change := float(torch.cat(blind).mean())) <= tolerance:
        raise ValueError(
            f"replacing images by their mean colour changes the log-probs of {len(pairs)} rows by {change:.1e} nats per token (want more "
            f"than {tolerance:.0e}): this policy does not look at its images; check the checkpoint's vision tower and projector"
        )
    logger.info(
        "reference gate: %d rows, mean |stored - recomputed| %.1e nats per token (accepted: %.0e), loss - ln 2 = %.1e",
        *(report.rows, report.mean_difference, tolerance, report.loss_minus_ln2),
    )
    return report


def _mean_colour(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, tuple(round(value) for value in ImageStat.Stat(image).mean))


def _report(rescored: Sequence[RescoredPair], beta: float) -> GateReport:
    policy = torch.tensor([row.recomputed for row in rescored], dtype=torch.float64)
    reference = torch.tensor([row.stored for row in rescored], dtype=torch.float64)
    losses, _, _ = dpo_loss(
        policy_chosen_logps=policy[:, 0],
        policy_rejected_logps=policy[:, 1],
        reference_chosen_logps=reference[:, 0],
        reference_rejected_logps=reference[:, 1],
        beta=beta,
    )
    mean = sum(row.difference for row in rescored) / sum(row.tokens for row in rescored)
    return GateReport(len(rescored), mean, float(losses.mean()) - math.log(2))


def _table(rescored: Sequence[RescoredPair]) -> str:
    lines = [f"{'idx':<12} {'chosen: stored':>16} {'recomputed':>12} {'rejected: stored':>18} {'recomputed':>12}"]
    for row in rescored:
        (stored_chosen, stored_rejected), (chosen, rejected) = row.stored, row.recomputed
        lines.append(f"{str(row.pair.idx):<12} {stored_chosen:>16.4f} {chosen:>12.4f} {stored_rejected:>18.4f} {rejected:>12.4f}")
    return "\n".join(lines)


def _diagnosis(rescored: Sequence[RescoredPair], tolerance: float) -> str:
    """The likely cause, as far as the numbers tell."""
    near = 10 * tolerance  # nats per token

    def holds(stored: RescoredPair, computed: RescoredPair, order: slice = slice(None)) -> bool:
        sums = zip(stored.stored, computed.recomputed[order], computed.token_logps[order], strict=True)
        return all(abs(a - b) <= near * len(tokens) for a, b, tokens in sums)

    if all(holds(row, row, slice(None, None, -1)) for row in rescored):
        return "The stored columns of chosen and rejected are swapped."
    moved = [(a, b) for a, b in permutations(rescored, 2) if holds(a, b) and not holds(a, a)]
    if moved:
        shown = ", ".join(f"idx {a.pair.idx} holds those of idx {b.pair.idx}" for a, b in moved[:LISTED_ROWS])
        return f"Stored values belong to other rows: {shown}."
    for place, stored_from, computed_from in (("early", 1, 0), ("late", 0, 1)):
        if all(_shifted(row, stored_from, computed_from, near) for row in rescored):
            return f"The stored response mask is shifted by one: it begins a token too {place}."
    return (
        "The values were made by another model, prompt, image option, tokenizer, length limit or precision than this run's; "
        "keys cannot tell which where they are absent or were written beside other values."
    )


def _shifted(row: RescoredPair, stored_from: int, computed_from: int, near: float) -> bool:
    """Whether the stored per-token values from `stored_from` on are the recomputed ones from `computed_from` on."""
    for stored, computed in zip(row.stored_tokens, row.token_logps, strict=True):
        if stored is None:
            return False
        pairs = list(zip(stored[stored_from:], computed[computed_from:].tolist(), strict=False))
        if sum(abs(a - b) for a, b in pairs) > near * max(len(pairs), 1):
            return False
    return True
