"""Packed layouts worked out by hand."""

import pytest
import torch

from muffin.packing import PackedBatch, PromptSpan, pack
from muffin.policies.base import EncodedResponses
from tests.tiny_decoders import PADDING, SHARING

PIXELS = {"pixel_values": torch.zeros(1, 3, 2, 2)}


def encoded(prompt: list[int], *responses: list[int], image: str = "a", positions: torch.Tensor | None = None) -> EncodedResponses:
    positions = torch.arange(len(prompt)) if positions is None else positions
    return EncodedResponses(torch.tensor(prompt), tuple(torch.tensor(r) for r in responses), PIXELS, image, positions)


def predictions(batch: PackedBatch) -> list[list[tuple[int, int]]]:
    """(row of hidden states, target token) of every token of every response."""
    rows = batch.logit_rows[batch.prediction_rows][batch.token_predictions].tolist()
    pairs = list(zip(rows, batch.prediction_targets[batch.token_predictions].tolist(), strict=True))
    ends = batch.lengths.cumsum(0).tolist()
    return [pairs[end - length : end] for end, length in zip(ends, batch.lengths.tolist(), strict=True)]


def test_the_example_of_the_docstring():
    batch = pack([encoded([1, 2, 3], [7, 8, 9], [7, 5])], SHARING)
    assert batch.input_ids.tolist() == [[1, 2, 3, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.layout.spans == (PromptSpan(start=0, prefix=4, branches=(1, 0)),)
    assert predictions(batch) == [[(2, 7), (3, 8), (4, 9)], [(2, 7), (3, 5)]]
    assert batch.logit_rows.tolist() == [2, 3, 4]
    assert len(batch.prediction_targets) == 4  # the shared 7 is predicted once


def test_two_prompts_in_one_row_with_varlen_lengths():
    batch = pack([encoded([1, 2], [7, 8, 9], [5, 6]), encoded([3], [4, 4], image="b")], SHARING)
    assert batch.input_ids.tolist() == [[1, 2, 7, 8, 5, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.layout.spans == (PromptSpan(0, 2, (2, 1)), PromptSpan(5, 2, (0,)))
    # sequences: [1 2 | 7 8] with its prefix's queries, [5] behind prefix [1 2], [3 4]
    assert batch.layout.cu_seqlens_q.tolist() == [0, 4, 5, 7]
    assert batch.layout.cu_seqlens_k.tolist() == [0, 4, 7, 9]
    assert batch.layout.kv_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert (batch.layout.max_seqlen_q, batch.layout.max_seqlen_k) == (4, 4)
    assert batch.layout.cu_seqlens_q.dtype == batch.layout.cu_seqlens_k.dtype == torch.int32
    assert predictions(batch) == [[(1, 7), (2, 8), (3, 9)], [(1, 5), (4, 6)], [(5, 4), (6, 4)]]
    assert batch.vision["pixel_values"].shape[0] == 2
    assert "image_index" not in batch.vision


def test_equal_prompts_share_a_prefix_and_keep_their_order():
    """Two pairs of one image and question, another pair between them: one prefix with K = 4, responses numbered as given."""
    same = [encoded([1, 2], [7, 9], [8, 9]), encoded([1, 2], [5, 9], [7, 9])]
    other = encoded([1, 3], [6, 9], [4, 9])
    batch = pack([same[0], other, same[1]], SHARING)
    assert batch.input_ids.tolist() == [[1, 2, 7, 8, 5, 1, 3, 6, 4]]  # the second 7 shares the first one's branch
    assert batch.vision["image_index"].tolist() == [0, 0]
    assert batch.vision["pixel_values"].shape[0] == 1
    targets = [[token for _, token in response] for response in predictions(batch)]
    assert targets == [[7, 9], [8, 9], [6, 9], [4, 9], [5, 9], [7, 9]]
    assert predictions(batch)[0] == predictions(batch)[5]


def test_same_text_on_another_image_is_another_prompt():
    batch = pack([encoded([1, 2], [7]), encoded([1, 2], [7], image="b")], SHARING)
    assert batch.input_ids.tolist() == [[1, 2, 1, 2]]
    assert predictions(batch) == [[(1, 7)], [(3, 7)]]


def test_mrope_positions_continue_after_the_largest():
    """(3, L) positions: responses continue at max + 1 on all three axes."""
    positions = torch.tensor([[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]])
    batch = pack([encoded([1, 9, 9, 2], [7, 8], [7, 6, 5], positions=positions)], SHARING)
    assert batch.input_ids.tolist() == [[1, 9, 9, 2, 7, 6]]
    assert batch.position_ids.shape == (3, 1, 6)
    assert batch.position_ids[:, 0].tolist() == [[0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 1, 3, 4, 5]]


def test_padded_rows_for_families_that_cannot_share():
    batch = pack([encoded([1, 2], [7, 8, 9], [5]), encoded([3], [4, 4], image="b")], PADDING)
    assert batch.layout is None
    assert batch.input_ids.tolist() == [[1, 2, 7, 8], [1, 2, 0, 0], [3, 4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert predictions(batch) == [[(1, 7), (2, 8), (3, 9)], [(5, 5)], [(8, 4), (9, 4)]]
    assert batch.vision["image_index"].tolist() == [0, 0, 1]
    assert batch.vision["pixel_values"].shape[0] == 2


def test_to_moves_every_tensor():
    batch = pack([encoded([1, 2], [7, 8], [5, 6]), encoded([1, 3], [4], [6])], SHARING).to("meta")
    tensors = [batch.input_ids, batch.position_ids, batch.logit_rows, batch.lengths, batch.layout.kv_index, *batch.vision.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.layout.spans[0] == PromptSpan(0, 2, (1, 1))


def test_no_response_is_an_error():
    with pytest.raises(ValueError, match="at least one response"):
        pack([encoded([1, 2])], SHARING)
