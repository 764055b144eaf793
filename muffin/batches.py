"""PreferencePairs -> PairBatch: the unit of a training step, made in DataLoader workers, and the order in which rows come.

    [pair, pair] --encode, pack--> packed (4 responses), token_weights, reference_chosen_logps (2,), reference_rejected_logps (2,)

A response's log-prob is a weighted sum over its tokens, the policy's and the reference's alike; what the weights are is a `Reduction`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from muffin.losses import changed_segment_weights
from muffin.packing import PackedBatch, map_tensors, pack
from muffin.pairs import PreferenceDataset, PreferencePair, ReferenceLogps
from muffin.policies import PolicyAdapter, encode_pair
from muffin.provenance import hash_fields
from muffin.reference_gate import check_token_counts


@dataclass(frozen=True)
class ReducedPair:
    """How the tokens of a pair become one number per response, and that number under the reference.

    token_weights: (R_chosen + R_rejected,); a response's number is the sum of its token log-probs times these.
    """

    token_weights: Tensor
    reference_chosen: float
    reference_rejected: float


Reduction = Callable[[PreferencePair, Tensor, Tensor], ReducedPair]


def summed(pair: PreferencePair, chosen_ids: Tensor, rejected_ids: Tensor) -> ReducedPair:
    """Weight 1 per token and the stored sums: log-probs of whole responses, as in DPO's paper."""
    return ReducedPair(torch.ones(len(chosen_ids) + len(rejected_ids)), pair.ref_win_logp, pair.ref_rej_logp)


def averaged(pair: PreferencePair, chosen_ids: Tensor, rejected_ids: Tensor) -> ReducedPair:
    """Weight 1 / length per token and the stored averages: log-probs per token."""
    weights = torch.cat([torch.full((len(ids),), 1 / len(ids)) for ids in (chosen_ids, rejected_ids)])
    return ReducedPair(weights, pair.ref_win_avg_logp, pair.ref_rej_avg_logp)


def token_weighted(pair: PreferencePair, chosen_ids: Tensor, rejected_ids: Tensor, *, weight: float, average: bool) -> ReducedPair:
    """Changed segments count `weight`. Raises ValueError, naming the scoring command, for rows without per-token log-probs."""
    chosen, rejected = changed_segment_weights(chosen_ids, rejected_ids, weight)
    if average:
        chosen, rejected = chosen / chosen.sum(), rejected / rejected.sum()
    return ReducedPair(
        torch.cat([chosen, rejected]),
        math.fsum(w * logp for w, logp in zip(chosen.tolist(), pair.ref_win_per_token_logp, strict=True)),
        math.fsum(w * logp for w, logp in zip(rejected.tolist(), pair.ref_rej_per_token_logp, strict=True)),
    )


def without_stored(pair: PreferencePair, chosen_ids: Tensor, rejected_ids: Tensor) -> PreferencePair:
    """The pair with NaN for every reference log-prob: what is computed in the step instead must replace each of them."""
    nan = math.nan
    unknown = ReferenceLogps(nan, nan, [nan] * len(chosen_ids), nan, nan, [nan] * len(rejected_ids))
    return replace(pair, reference=unknown, logps_key=None)


@dataclass(frozen=True)
class PairBatch:
    """P pairs ready for the model. No mapping: Trainer must find no key to act on.

    packed: 2P responses, chosen before rejected, pair after pair.
    token_weights: (sum of lengths,), see ReducedPair.
    reference_chosen_logps, reference_rejected_logps: (P,) stored values, reduced as the policy's are; NaN if computed in the step.
    idx: the rows' own names, for messages.
    """

    packed: PackedBatch
    token_weights: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    idx: tuple[int | str, ...]

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def num_items(self) -> int:
        """What the loss of a step is a mean over: pairs."""
        return len(self)

    def to(self, device: torch.device | str) -> "PairBatch":
        """With all tensors on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PairBatch":
        """With all tensors in page-locked memory; DataLoader calls it."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


class PairCollator:
    """list[PreferencePair] -> PairBatch. Runs in DataLoader workers: images are decoded and resized there, once per pair.

    stored_reference: False leaves the reference log-probs to the step, whatever the rows store.
    """

    def __init__(self, adapter: PolicyAdapter, reduction: Reduction, *, accept_foreign_logps: bool, stored_reference: bool = True) -> None:
        self.adapter = adapter
        self.reduction = reduction
        self.accept_foreign_logps = accept_foreign_logps
        self.stored_reference = stored_reference

    def __call__(self, pairs: Sequence[PreferencePair]) -> PairBatch:
        encoded, reduced = [], []
        for pair in pairs:
            try:
                item = encode_pair(self.adapter, pair)
                if not self.stored_reference:
                    pair = without_stored(pair, *item.response_ids)
                elif not self.accept_foreign_logps:
                    check_token_counts(pair, item)
            except ValueError as error:
                raise ValueError(f"idx {pair.idx}: {error}") from error
            encoded.append(item)
            reduced.append(self.reduction(pair, *item.response_ids))
        return PairBatch(
            packed=pack(encoded, self.adapter),
            token_weights=torch.cat([item.token_weights for item in reduced]),
            reference_chosen_logps=torch.tensor([item.reference_chosen for item in reduced]),
            reference_rejected_logps=torch.tensor([item.reference_rejected for item in reduced]),
            idx=tuple(pair.idx for pair in pairs),
        )


class ShuffledRows(torch.utils.data.Sampler[int]):
    """Row order as a pure function of (seed, epoch): no global random state, so that resume and any number of processes agree."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch (from 0) for the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        yield from self.order(np.random.default_rng([self.seed, self.epoch]))

    def order(self, rng: np.random.Generator) -> list[int]:
        """Positions of all rows, in the order that `rng` draws."""
        return rng.permutation(self.rows).tolist()


class ShuffledPrompts(ShuffledRows):
    """Members of a group stand in one batch of `batch_size` where they fit; groups larger than a batch are cut, smaller ones fill it up.

    groups: positions of rows with one image and question (`prompt_groups`).
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        super().__init__(sum(map(len, groups)), seed)
        self.groups = groups
        self.batch_size = batch_size

    def order(self, rng: np.random.Generator) -> list[int]:
        batches: list[list[int]] = []
        by_room: dict[int, list[list[int]]] = {}  # room left -> batches with that room
        for number in rng.permutation(len(self.groups)):
            members = [self.groups[number][at] for at in rng.permutation(len(self.groups[number]))]
            for start in range(0, len(members), self.batch_size):
                chunk = members[start : start + self.batch_size]
                room = next((room for room in range(len(chunk), self.batch_size) if by_room.get(room)), None)
                if room is None:
                    room, batch = self.batch_size, []
                    batches.append(batch)
                else:
                    batch = by_room[room].pop()
                batch += chunk
                by_room.setdefault(room - len(chunk), []).append(batch)
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [position for batch in batches if len(batch) < self.batch_size for position in batch]
        return [position for number in rng.permutation(len(full)) for position in full[number]] + rest


def prompt_groups(dataset: PreferenceDataset) -> list[list[int]]:
    """Positions of rows with equal image and question, in order of first appearance. Reads every row once."""
    groups: dict[str, list[int]] = {}
    for position in range(len(dataset)):
        pair = dataset[position]
        groups.setdefault(hash_fields([pair.image_bytes, pair.question]), []).append(position)
    return list(groups.values())
