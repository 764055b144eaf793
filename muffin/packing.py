"""EncodedResponses -> PackedBatch: every prompt once, its responses side by side, nothing padded.

A prompt with K responses becomes `[longest common token prefix][rest of response 1]...[rest of response K]`; several prompts stand
end to end in one row of batch size 1. Positions of every branch restart after the prefix, and attention (`muffin.attention`) lets a
branch see its prefix and itself only. The last token of a response is a target only, so it is never an input.

    prompt = [1 2 3]   chosen = [7 8 9]   rejected = [7 5]            (9 and 5 terminate)
    input_ids    = [1 2 3 7 | 8 |]     prefix 1 2 3 7 (7 is common), branch "8" of chosen, an empty branch of rejected
    position_ids = [0 1 2 3   4  ]
    predictions  = row 2 -> 7, row 3 -> 8, row 4 -> 9, row 3 -> 5
    chosen reads predictions 0 1 2, rejected reads 0 3: a shared answer token is computed once and counted for both.

Families that cannot share a prefix (recurrent layers) get one right-padded row per response; the image is still encoded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from muffin.policies.base import EncodedResponses, PolicyAdapter

T = TypeVar("T")


@dataclass(frozen=True)
class PromptSpan:
    """One prompt in the packed row: `prefix` tokens from `start`, then branches of the given lengths (0 is allowed)."""

    start: int
    prefix: int
    branches: tuple[int, ...]

    @property
    def end(self) -> int:
        """Position behind the prompt's last response."""
        return self.start + self.prefix + sum(self.branches)


@dataclass(frozen=True)
class PackedLayout:
    """Which tokens see which, for `muffin.attention`.

    The same facts twice: spans for kernels that are called per prompt, and cumulative lengths for one varlen call. A varlen sequence
    is a branch behind its prefix; the first branch is contiguous with its prefix and brings the prefix's own queries.

    kv_index: (sum of key lengths,) rows to gather keys and values from, `[prefix, branch]` per sequence.
    cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32.
    """

    spans: tuple[PromptSpan, ...]
    kv_index: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class PackedBatch:
    """What a model call needs for S responses of several prompts. A pair is two consecutive responses, chosen first.

    input_ids: (1, T), or (S, T) right-padded for families without prefix sharing.
    position_ids: like input_ids, or (3, 1, T) for M-RoPE.
    attention_mask: None when packed, (S, T) when padded.
    layout: who sees whom; None when padded.
    logit_rows: (N,) rows of the flattened (batch * T) hidden states that predict some response token, ascending, distinct.
    prediction_rows: (M,) index into logit_rows; prediction_targets: (M,) token ids.
    token_predictions: (sum of lengths,) which prediction each response token reads, response after response.
    lengths: (S,) response tokens, terminator included.
    vision: forward arguments for the distinct images; `image_index` is among them when prompts share an image.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    layout: PackedLayout | None
    logit_rows: Tensor
    prediction_rows: Tensor
    prediction_targets: Tensor
    token_predictions: Tensor
    lengths: Tensor
    vision: dict[str, Tensor]

    @property
    def num_tokens(self) -> int:
        """Input positions the model computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> "PackedBatch":
        """With all tensors on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """With all tensors in page-locked memory; DataLoader calls it."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


def map_tensors(value: T, function) -> T:
    """`value` with `function` applied to every tensor in its dataclasses, dicts and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function) for item in value)
    return value


@dataclass(frozen=True)
class _Prompt:
    """A distinct prompt of the batch with every response asked of it: `members` are response numbers in the batch."""

    encoded: EncodedResponses
    responses: list[Tensor]
    members: list[int]


def pack(encoded: Sequence[EncodedResponses], adapter: PolicyAdapter) -> PackedBatch:
    """Pack prompts and their responses for one model call; equal prompts on equal images share one prefix.

    Response numbers follow the input: all responses of encoded[0], then of encoded[1], ...
    Raises ValueError when there is no response at all (use `EncodedResponses.prompt_ids` for generation).
    """
    prompts: dict[tuple[str, tuple[int, ...]], _Prompt] = {}
    number = 0
    for item in encoded:
        key = (item.vision_key, tuple(item.prompt_ids.tolist()))
        prompt = prompts.setdefault(key, _Prompt(item, [], []))
        for response in item.response_ids:
            prompt.responses.append(response)
            prompt.members.append(number)
            number += 1
    grouped = [prompt for prompt in prompts.values() if prompt.responses]
    if not grouped:
        raise ValueError(f"pack needs at least one response, got {len(encoded)} prompts without any")
    if adapter.spec.prefix_sharing:
        return _pack_row(grouped, number, adapter)
    return _pad_rows(grouped, number, adapter)


def _vision(prompts: list[_Prompt], repeats: list[int], adapter: PolicyAdapter) -> dict[str, Tensor]:
    """Forward arguments for the distinct images, with `image_index` (image of each placeholder group) where one is used twice."""
    distinct: dict[str, int] = {}
    tensors, index = [], []
    for prompt, repeat in zip(prompts, repeats, strict=True):
        key = prompt.encoded.vision_key
        if key not in distinct:
            distinct[key] = len(tensors)
            tensors.append(prompt.encoded.vision)
        index += [distinct[key]] * repeat
    vision = adapter.cat_vision(tensors)
    if len(index) > len(tensors):
        vision["image_index"] = torch.tensor(index)
    return vision


def _common_prefix(sequences: Sequence[Tensor]) -> int:
    """Length of the longest common prefix of 1-D tensors."""
    length = min(len(sequence) for sequence in sequences)
    first = sequences[0][:length]
    for other in sequences[1:]:
        differs = (first[:length] != other[:length]).nonzero()
        if len(differs):
            length = int(differs[0])
    return length


class _Predictions:
    """Collects (row, target) predictions, each distinct one once, and which of them every response reads."""

    def __init__(self, responses: int) -> None:
        self.distinct: dict[tuple[int, int], int] = {}
        self.reads: list[list[int]] = [[] for _ in range(responses)]

    def add(self, response: int, rows: Sequence[int], targets: Sequence[int]) -> None:
        self.reads[response] = [self.distinct.setdefault(prediction, len(self.distinct)) for prediction in zip(rows, targets, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        rows = torch.tensor([row for row, _ in self.distinct])
        logit_rows, prediction_rows = torch.unique(rows, return_inverse=True)
        return {
            "logit_rows": logit_rows,
            "prediction_rows": prediction_rows,
            "prediction_targets": torch.tensor([target for _, target in self.distinct]),
            "token_predictions": torch.tensor([read for reads in self.reads for read in reads]),
            "lengths": torch.tensor([len(reads) for reads in self.reads]),
        }


def _pack_row(prompts: list[_Prompt], responses: int, adapter: PolicyAdapter) -> PackedBatch:
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    spans: list[PromptSpan] = []
    predictions = _Predictions(responses)
    start = 0
    for prompt in prompts:
        prompt_ids = prompt.encoded.prompt_ids
        inputs = [torch.cat([prompt_ids, response[:-1]]) for response in prompt.responses]
        prefix = _common_prefix(inputs)
        next_position = int(prompt.encoded.position_ids.max()) + 1
        tokens.append(inputs[0][:prefix])
        shared = torch.arange(next_position, next_position + prefix - len(prompt_ids))
        positions.append(torch.cat([prompt.encoded.position_ids, _like_positions(shared, prompt)], dim=-1))

        branch_starts: dict[tuple[int, ...], int] = {}  # equal inputs (duplicates, or answers that differ in the last token) share a branch
        branches: list[int] = []
        end = start + prefix
        for member, response, ids in zip(prompt.members, prompt.responses, inputs, strict=True):
            branch = ids[prefix:]
            key = tuple(branch.tolist())
            if key not in branch_starts:
                branch_starts[key] = end
                branches.append(len(branch))
                tokens.append(branch)
                first = next_position + prefix - len(prompt_ids)
                positions.append(_like_positions(torch.arange(first, first + len(branch)), prompt))
                end += len(branch)
            in_prefix = range(start + len(prompt_ids) - 1, start + prefix)
            rows = [*in_prefix, *range(branch_starts[key], branch_starts[key] + len(branch))]
            predictions.add(member, rows, response.tolist())
        spans.append(PromptSpan(start, prefix, tuple(branches)))
        start = end

    position_ids = torch.cat(positions, dim=-1)
    return PackedBatch(
        input_ids=torch.cat(tokens)[None],
        position_ids=position_ids[:, None] if position_ids.dim() == 2 else position_ids[None],
        attention_mask=None,
        layout=_layout(spans),
        vision=_vision(prompts, [1] * len(prompts), adapter),
        **predictions.tensors(),
    )


def _like_positions(positions: Tensor, prompt: _Prompt) -> Tensor:
    """Text positions (n,) in the shape of the prompt's: (n,), or (3, n) for M-RoPE."""
    return positions if prompt.encoded.position_ids.dim() == 1 else positions.expand(3, -1)


def _layout(spans: list[PromptSpan]) -> PackedLayout:
    query_lengths, key_lengths, kv_index = [], [], []
    for span in spans:
        prefix = torch.arange(span.start, span.start + span.prefix)
        branch_start = span.start + span.prefix
        for number, length in enumerate(span.branches):
            if number > 0 and length == 0:
                continue
            query_lengths.append(length + (span.prefix if number == 0 else 0))
            key_lengths.append(span.prefix + length)
            kv_index += [prefix, torch.arange(branch_start, branch_start + length)]
            branch_start += length
    return PackedLayout(
        spans=tuple(spans),
        kv_index=torch.cat(kv_index),
        cu_seqlens_q=torch.tensor([0, *query_lengths]).cumsum(0).int(),
        cu_seqlens_k=torch.tensor([0, *key_lengths]).cumsum(0).int(),
        max_seqlen_q=max(query_lengths),
        max_seqlen_k=max(key_lengths),
    )


def _pad_rows(prompts: list[_Prompt], responses: int, adapter: PolicyAdapter) -> PackedBatch:
    inputs: list[Tensor] = [torch.empty(0)] * responses
    positions: list[Tensor] = [torch.empty(0)] * responses
    owners: list[_Prompt] = [prompts[0]] * responses
    width = max(len(p.encoded.prompt_ids) + len(r) - 1 for p in prompts for r in p.responses)
    predictions = _Predictions(responses)
    for prompt in prompts:
        prompt_ids = prompt.encoded.prompt_ids
        next_position = int(prompt.encoded.position_ids.max()) + 1
        for member, response in zip(prompt.members, prompt.responses, strict=True):
            inputs[member] = torch.cat([prompt_ids, response[:-1]])
            answer = torch.arange(next_position, next_position + len(response) - 1)
            positions[member] = torch.cat([prompt.encoded.position_ids, _like_positions(answer, prompt)], dim=-1)
            owners[member] = prompt
            first = member * width + len(prompt_ids) - 1
            predictions.add(member, range(first, first + len(response)), response.tolist())

    lengths = torch.tensor([len(ids) for ids in inputs])
    position_rows = [torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in positions]
    return PackedBatch(
        input_ids=torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True),
        position_ids=torch.stack(position_rows, dim=-2),
        attention_mask=(torch.arange(width) < lengths[:, None]).long(),
        layout=None,
        vision=_vision(owners, [1] * responses, adapter),
        **predictions.tensors(),
    )
