"""FLOP counts worked out by hand on a tiny shape, and against the figures known for LLaVA-1.5-7B."""

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from muffin.flops import Work, forward_flops, packed_work, padded_work, step_flops
from muffin.packing import pack
from tests.tiny_decoders import SHARING, prompt

# 2 x 2 patches of 2 x 2 pixels, one tower layer of width 4; one decoder layer of width 6: 2 query heads and 1 key head of 3.
TINY = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2, projection_dim=4
    ),
    text_config=LlamaConfig(
        vocab_size=10, hidden_size=6, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=3
    ),
)


def test_forward_flops_of_a_tiny_model():
    counted = forward_flops(TINY, Work(images=1, tokens=7, attended=20, head_rows=3))
    # patches: 4 x (12 -> 4); tower: 5 positions x (q k v o: 4 x 16, mlp: 2 x 32), scores and values: 2 x 25 x 4
    assert counted.vision == 2 * (4 * 12 * 4 + 5 * (64 + 64) + 200)
    assert counted.projector == 2 * 4 * (4 * 6 + 6 * 6)
    # q and o: 6 x 6, k and v: 6 x 3, gate, up and down: 6 x 5
    assert counted.linears == 2 * 7 * (36 + 36 + 18 + 18 + 3 * 30)
    assert counted.attention == 2 * 20 * 6 + 2 * 20 * 6
    assert counted.head == 2 * 3 * 6 * 10


def test_step_flops_count_the_backward_of_what_is_trained():
    work = Work(1, 7, 20, 3)
    part = forward_flops(TINY, work)
    assert step_flops(TINY, work, "score") == part.vision + part.projector + part.linears + part.attention + part.head
    assert step_flops(TINY, work, "full") == part.vision + 3 * (part.projector + part.linears + part.attention + part.head)
    assert step_flops(TINY, work, "lora") == part.vision + part.projector + 2 * part.linears + 3 * part.attention + 2 * part.head


def test_packed_work_counts_the_prefix_once():
    # prompt of 8 tokens; inputs lose the last response token, so branches are 2 and 1 tokens long
    batch = pack([prompt([[11, 12, 13], [14, 15]])], SHARING)
    # prefix: 8 x 9 / 2; branches see it whole and themselves causally: 2 x 8 + 3 and 1 x 8 + 1; rows: last prefix token (twice), 2, 1
    assert packed_work(batch) == Work(images=1, tokens=11, attended=36 + 19 + 9, head_rows=4)


def test_padded_work_counts_every_copy():
    assert padded_work(sequences=2, length=4, head_rows=8) == Work(images=2, tokens=8, attended=20, head_rows=8)
    assert padded_work(1, 4, 4) + padded_work(1, 4, 4) == padded_work(2, 4, 8)


@pytest.mark.parametrize("response,plain,packed", [(120, 60.1, 34.5), (60, 55.2, 29.5), (500, 91.5, 66.1)])
def test_llava_7b(response, plain, packed):
    """TFLOP of a full step on a pair with a prefix of 616 tokens; the figures come from a separate analysis."""
    llava = LlavaConfig()  # transformers' default is LLaVA-1.5-7B
    branch = response - 1
    one_row = Work(1, 616 + 2 * branch, 616 * 617 // 2 + 2 * (616 * branch + branch * (branch + 1) // 2), 2 * response)
    assert step_flops(llava, padded_work(2, 616 + response, 2 * (616 + response)), "full") / 1e12 == pytest.approx(plain, rel=0.01)
    assert step_flops(llava, one_row, "full") / 1e12 == pytest.approx(packed, rel=0.01)
