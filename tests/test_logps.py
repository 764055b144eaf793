"""The fast form of log-probs against the plain one: values and gradients, every layout and decoder that packing allows."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from muffin import attention, logps
from muffin.attention import packed_attention
from muffin.logps import ResponseLogps, get_batch_logps, response_logps
from muffin.packing import pack
from tests.tiny_decoders import LORA_TARGETS, PADDING, SHARING, decoder, plain_sequences, prompt

CASES = {
    "unequal pairs, several prompts": [prompt([[11, 12, 13, 2], [21, 2]]), prompt([[31, 2], [41, 42, 43, 44, 2]], question=(8,), image=1)],
    "common beginning": [prompt([[11, 12, 13, 2], [11, 12, 23, 24, 2]])],
    "chosen is a token prefix of rejected": [prompt([[11, 12, 2], [11, 12, 13, 2]])],
    "all but the terminator in common": [prompt([[11, 12, 2], [11, 12, 3]])],
    "one-token responses": [prompt([[2], [3]]), prompt([[2]], image=1)],
    "one response": [prompt([[11, 12, 2]])],
    "five responses with duplicates": [prompt([[11, 2], [11, 12, 2], [11, 2], [13, 14, 15, 2], [2]])],
    "rows of one prompt": [prompt([[11, 12, 2], [13, 2]]), prompt([[14, 2], [11, 15, 2]]), prompt([[16, 2], [17, 2]], question=(9, 9))],
    "one image, two questions": [prompt([[11, 2], [12, 2]]), prompt([[11, 2], [13, 14, 2]], question=(9, 8, 7, 6))],
}


def plain_logps(model: nn.Module, encoded) -> list[Tensor]:
    """Per-token log-probs of each response alone, through full logits and stock attention."""
    rows = []
    for ids, labels, pixels in plain_sequences(encoded):
        logits = model(input_ids=ids, pixel_values=pixels.to(model.dtype), attention_mask=torch.ones_like(ids)).logits
        per_token = get_batch_logps(logits, labels, return_per_token_logp=True)[0]
        rows.append(per_token[labels[0, 1:] != -100])
    return rows


def gradients(model: nn.Module, sums: Tensor) -> dict[str, Tensor]:
    """Gradients of an uneven mix of the sums, so that exchanged responses would show."""
    model.zero_grad()
    (sums * torch.arange(1, len(sums) + 1, dtype=sums.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_gradients_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Same parameters, and an error norm within `tolerance` of the largest gradient (some gradients are zero but for rounding)."""
    assert actual.keys() == expected.keys()
    scale = max(gradient.norm() for gradient in expected.values())
    worst = max((actual[name] - expected[name]).norm() / scale for name in expected)
    assert worst <= tolerance, worst


def in_double(module: nn.Module, hidden: Tensor) -> Tensor:
    """RMSNorm without transformers' detour through float32."""
    return module.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


@pytest.fixture
def double_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(norm, "forward", in_double)


def test_get_batch_logps_by_hand():
    # Two tokens in the vocabulary; logits (0, ln 3) give probabilities (1/4, 3/4), (0, 0) give (1/2, 1/2).
    odds = [0.0, math.log(3.0)]
    logits = torch.tensor([[odds, [0.0, 0.0], odds, [9.0, 0.0]], [odds, odds, odds, odds]], dtype=torch.float64)
    labels = torch.tensor([[-100, 1, 0, 1], [-100, -100, 0, -100]])
    per_token, sums, averages = get_batch_logps(logits, labels, return_all=True)
    expected = torch.tensor([[math.log(0.75), math.log(0.5), math.log(0.75)], [0.0, math.log(0.25), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(per_token, expected)
    torch.testing.assert_close(sums, expected.sum(1))
    torch.testing.assert_close(averages, torch.tensor([expected[0].sum() / 3, math.log(0.25)], dtype=torch.float64))
    torch.testing.assert_close(get_batch_logps(logits, labels, return_per_token_logp=True), expected)
    torch.testing.assert_close(get_batch_logps(logits, labels)[0], sums)
    assert labels[0, 0] == -100  # the caller's labels are left alone


def test_get_batch_logps_refuses_bad_input():
    with pytest.raises(ValueError, match=r"\(2, 3, 5\).*\(2, 4\)"):
        get_batch_logps(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        get_batch_logps(torch.zeros(2, 3, 5), torch.tensor([[-100, 1, 1], [1, -100, -100]]))


def test_response_logps_views_by_hand():
    values = ResponseLogps(torch.tensor([-1.0, -2.0, -3.0, -5.0]), torch.tensor([3, 1]))
    assert [part.tolist() for part in values.split()] == [[-1, -2, -3], [-5]]
    assert values.sums.tolist() == [-6, -5]
    assert values.averages.tolist() == [-2, -5]
    assert values.weighted_sums(torch.tensor([1.0, 2.0, 1.0, 4.0])).tolist() == [-8, -20]


@pytest.mark.parametrize("adapter", [SHARING, PADDING], ids=["packed", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_response_at_a_time(case: str, adapter, double_norms):
    """Float64 log-probs to 1e-12 and gradients to 1e-13: what is left is the order of additions."""
    encoded, model = CASES[case], decoder("llama", kv_heads=2)
    expected = plain_logps(model, encoded)
    expected_gradients = gradients(model, torch.stack([row.sum() for row in expected]))
    batch = pack(encoded, adapter)
    actual = flattened_rows(model, batch) if batch.layout is None else response_logps(model, batch)
    for row, plain in zip(actual.split(), expected, strict=True):
        torch.testing.assert_close(row, plain, rtol=1e-12, atol=1e-12)
    assert_gradients_equal(gradients(model, actual.sums), expected_gradients, 1e-13)


def flattened_rows(model: nn.Module, batch) -> ResponseLogps:
    """`response_logps` on padded rows, with the stock LLaVA standing in for a family whose forward keeps rows of the flattened batch."""

    def forward(logits_to_keep, **inputs):
        outputs = model(**inputs)
        outputs.logits = outputs.logits.flatten(0, 1)[logits_to_keep][None]
        return outputs

    return response_logps(forward, batch)


@pytest.mark.parametrize(("name", "kv_heads"), [("llama", 4), ("llama", 1), ("qwen2", 2)])
def test_decoders_all_cases_in_one_row(name: str, kv_heads: int, double_norms):
    """Multi-head, multi-query and grouped-query attention; every case of above packed into a single row."""
    encoded = [item for case in CASES.values() for item in case]
    model = decoder(name, kv_heads)
    expected = torch.stack([row.sum() for row in plain_logps(model, encoded)])
    expected_gradients = gradients(model, expected)
    actual = response_logps(model, pack(encoded, SHARING)).sums
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert_gradients_equal(gradients(model, actual), expected_gradients, 1e-13)


def test_stock_norms():
    """As shipped, transformers' RMSNorm computes in float32: log-probs still agree to 1e-12, gradients to float32 rounding."""
    encoded, model = CASES["unequal pairs, several prompts"], decoder(hidden=128, initializer_range=0.05)
    expected = torch.stack([row.sum() for row in plain_logps(model, encoded)])
    expected_gradients = gradients(model, expected)
    actual = response_logps(model, pack(encoded, SHARING)).sums
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert_gradients_equal(gradients(model, actual), expected_gradients, 1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_and_gradient_checkpointing(checkpointing: bool):
    """Under both, with generation (stock attention) between forward and backward."""
    torch.manual_seed(0)
    model = get_peft_model(decoder("qwen2", 2), LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False)).double()
    model.train()
    encoded = CASES["common beginning"] + CASES["unequal pairs, several prompts"]
    expected = torch.stack([row.sum() for row in plain_logps(model, encoded)])
    expected_gradients = gradients(model, expected)
    assert all(".lora_" in name for name in expected_gradients)
    assert not any("vision_tower" in name for name in expected_gradients)
    ids, pixels = encoded[0].prompt_ids[None], encoded[0].vision["pixel_values"]
    stock_tokens = generate(model, ids, pixels)
    if checkpointing:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    with packed_attention(model):
        actual = response_logps(model, pack(encoded, SHARING)).sums
        actual_gradients = gradients(model, actual)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert_gradients_equal(actual_gradients, expected_gradients, 1e-7)
    assert torch.equal(generate(model, ids, pixels), stock_tokens)


def generate(model: nn.Module, ids: Tensor, pixels: Tensor) -> Tensor:
    model.eval()
    try:
        return model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4, do_sample=False, pad_token_id=0)
    finally:
        model.train()


def test_gradient_checkpointing_outside_the_context_is_refused():
    model = decoder().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="with packed_attention"):
        response_logps(model, pack(CASES["one response"], SHARING))
    with packed_attention(decoder(seed=1)), pytest.raises(ValueError, match="with packed_attention"):  # another model's does not help
        response_logps(model, pack(CASES["one response"], SHARING))
    with torch.no_grad():  # nothing is recomputed without a backward
        response_logps(model, pack(CASES["one response"], SHARING))


def test_negative_controls_differ(monkeypatch: pytest.MonkeyPatch):
    """A plain causal mask, positions that run on, and the other prompt's image are all far from the right value."""
    encoded, model = CASES["unequal pairs, several prompts"], decoder()
    batch = pack(encoded, SHARING)
    right = response_logps(model, batch).sums
    running = batch.position_ids.new_tensor(range(batch.num_tokens))[None]
    changed = {
        "positions": {"position_ids": running},
        "images": {"vision": {"pixel_values": batch.vision["pixel_values"].flip(0)}},
    }
    for name, fields in changed.items():
        wrong = response_logps(model, type(batch)(**{**vars(batch), **fields})).sums
        assert (wrong - right).abs().max() > 1e-2, name
    monkeypatch.setattr(
        attention,
        "_attend_padded",
        lambda q, k, v, scaling, layout: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2),
    )
    assert (response_logps(model, batch).sums - right).abs().max() > 1e-2


def test_only_response_rows_reach_the_head():
    """Five responses over one prompt: distinct rows only, and logits of no other position are ever made."""
    model, seen = decoder(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    response_logps(model, pack(CASES["five responses with duplicates"], SHARING))
    # rows: the prompt's last (predicts 11, 13 and 2), branch 11, branch 11 12, branch 13 14 15; the duplicate has no branch of its own
    assert [tuple(shape) for shape in seen] == [(1, 1 + 1 + 2 + 3, 100)]


def test_each_distinct_image_is_encoded_once():
    model, seen = decoder(), []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]), always_call=True)
    batch = pack(CASES["one image, two questions"] + CASES["unequal pairs, several prompts"], SHARING)
    response_logps(model, batch)
    assert seen == [2]
    assert batch.vision["image_index"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_selected_logps_equals_autograd(chunk: int, monkeypatch: pytest.MonkeyPatch):
    """The hand-written backward against autograd through log_softmax, with rows read several times and rows never read."""
    monkeypatch.setattr(logps, "LOGIT_ROWS_PER_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    rows, targets = torch.tensor([0, 0, 0, 2, 5, 5, 6]), torch.tensor([3, 3, 4, 10, 0, 1, 2])
    weights = torch.randn(7, generator=generator, dtype=torch.float64)
    expected = logits.log_softmax(-1)[rows, targets]
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    actual = logps._SelectedLogps.apply(logits, rows, targets)
    (gradient,) = torch.autograd.grad((actual * weights).sum(), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-13, atol=1e-14)


def test_bfloat16_logits_are_reduced_in_float32():
    """The only rounding is the logits' own: log-probs come out float32 and equal float64 arithmetic on the same bfloat16 logits."""
    logits = (torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    rows, targets = torch.arange(4), torch.tensor([1, 2, 3, 4999])
    actual = logps._SelectedLogps.apply(logits, rows, targets)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), logits.double().log_softmax(-1)[rows, targets], rtol=1e-6, atol=1e-6)


def test_a_decoder_that_bypasses_the_attention_interface_is_reported():
    model = decoder()
    model.model.language_model.forward = lambda inputs_embeds, **kwargs: type(
        "O", (), {"last_hidden_state": inputs_embeds, "past_key_values": None, "hidden_states": None, "attentions": None}
    )()
    with pytest.raises(RuntimeError, match="never called packed attention"):
        response_logps(model, pack(CASES["one response"], SHARING))
