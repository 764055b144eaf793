"""Shared-prefix attention against a mask written token by token, on the SDPA path and through stand-ins for the CUDA kernels."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from muffin import attention
from muffin.attention import (
    check_prefix_sharing,
    choose_kernel,
    decoder_config,
    packed_attention,
    resolve_kernel,
    set_kernel,
    shared_prefix_attention,
)
from muffin.logps import response_logps
from muffin.packing import PackedLayout, pack
from tests.tiny_decoders import SHARING, decoder, prompt

BATCHES = {
    "one pair": [prompt([[11, 12, 13, 2], [21, 2]])],
    "empty branches": [prompt([[2], [3]]), prompt([[11, 2], [11, 12, 2]], image=1), prompt([[5, 2]], image=2)],
    "many responses": [prompt([[11, 2], [12, 13, 2], [14, 15, 16, 2], [17, 2], [2]]), prompt([[11, 12, 2], [3, 2]], image=1)],
}


def visible(layout: PackedLayout) -> Tensor:
    """(T, T) True where a query token sees a key token: both in one prompt, key not later, and key in the prefix or in the same branch."""
    owner = []
    for number, span in enumerate(layout.spans):
        owner += [(number, -1)] * span.prefix
        for branch, length in enumerate(span.branches):
            owner += [(number, branch)] * length
    size = len(owner)
    return torch.tensor(
        [[k <= q and owner[q][0] == owner[k][0] and owner[k][1] in (-1, owner[q][1]) for k in range(size)] for q in range(size)]
    )


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The oracle: explicit softmax over masked scores; (1, H, T, D) in, (1, T, H, D) out."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash-attn 2's function with its signature and semantics, in plain PyTorch: (total, H, D) tensors, causal aligned bottom-right."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
    assert (cu_seqlens_q[0], cu_seqlens_k[0]) == (0, 0) and (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(lengths_q), max(lengths_k)) == (max_seqlen_q, max_seqlen_k)
    outputs = []
    for n, m, queries, keys, values in zip(lengths_q, lengths_k, q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        mask = torch.ones(n, m, dtype=torch.bool)
        if causal:
            mask = torch.arange(m)[None] <= torch.arange(n)[:, None] + (m - n)
        heads = [tensor.transpose(0, 1)[None] for tensor in (queries, keys, values)]
        outputs.append(masked_attention(*heads, mask, softmax_scale)[0])
    return torch.cat(outputs)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
    seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn with its signature: causal is window_size (-1, 0); more query heads need enable_gqa."""
    assert window_size in ((-1, -1), (-1, 0))
    assert enable_gqa or query.shape[1] == key.shape[1]
    causal = window_size == (-1, 0)
    return flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=causal)


@pytest.fixture(params=["sdpa per span", "sdpa padded", "flash_attention_2", "torch_varlen"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(attention, "SHORT_SEQUENCE", 1000 if request.param == "sdpa padded" else 0)
    if request.param == "flash_attention_2":
        monkeypatch.setattr(attention, "varlen_kernel", lambda device_type, dtype: flash_attn_varlen_func)
    if request.param == "torch_varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        monkeypatch.setattr(attention, "varlen_kernel", lambda device_type, dtype: attention._torch_varlen)
    return request.param


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_written_out_mask(name: str, kv_heads: int, kernel: str):
    """Outputs and all three gradients, for multi-head, grouped-query and multi-query attention."""
    layout = pack(BATCHES[name], SHARING).layout
    mask = visible(layout)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, len(mask), 8) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(1, len(mask), 4, 8, generator=generator, dtype=torch.float64)
    expected = masked_attention(*inputs, mask, 0.3)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    actual, attention_weights = shared_prefix_attention(torch.nn.Module(), *inputs, None, scaling=0.3, packed_layout=layout)
    assert attention_weights is None
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    for gradient, wanted in zip(torch.autograd.grad((actual * weights).sum(), inputs), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-13)


A100, T4 = (8, 0), (7, 5)
HERE = {"device_type": "cuda", "capability": A100, "dtype": torch.bfloat16, "flash_attn": True, "torch_varlen": True}


@pytest.mark.parametrize(
    ("requested", "machine", "kernel", "reason"),
    [
        ("auto", {}, "flash_attention_2", "flash-attn is installed"),
        ("flash_attention_2", {"torch_varlen": False}, "flash_attention_2", "flash-attn is installed"),
        ("flash_attention_2", {"capability": None}, "flash_attention_2", "flash-attn is installed"),
        ("sdpa", {}, "sdpa", "as asked for"),
        ("auto", {"flash_attn": False}, "torch_varlen", "flash-attn is not installed"),
        ("auto", {"flash_attn": False, "torch_varlen": False}, "sdpa", "flash-attn is not installed"),
        ("auto", {"dtype": torch.float32}, "sdpa", "this run in float32"),
        ("auto", {"capability": T4}, "sdpa", "this one has 7.5"),
        ("auto", {"device_type": "cpu"}, "sdpa", "no CUDA GPU"),
    ],
)
def test_kernel_by_machine_and_flag(requested, machine, kernel, reason):
    choice = resolve_kernel(requested, **HERE | machine)
    assert choice.kernel == kernel and reason in choice.reason


@pytest.mark.parametrize(
    ("machine", "missing"),
    [
        ({"flash_attn": False}, r"flash-attn is not installed: pip install .*; mend that, or take auto or sdpa"),
        ({"dtype": torch.float32}, r"this run in float32 \(--dtype bfloat16\)"),
        ({"capability": T4}, "capability 8.0"),
        ({"device_type": "cpu"}, "there is no CUDA GPU"),
    ],
)
def test_flash_attention_that_cannot_run_is_refused(machine, missing):
    with pytest.raises(ValueError, match=f"--attn_implementation flash_attention_2 cannot run: .*{missing}"):
        resolve_kernel("flash_attention_2", **HERE | machine)


def test_kernel_follows_what_is_installed(monkeypatch: pytest.MonkeyPatch):
    installed = {"flash_attn", "torch.nn.attention.varlen"}
    monkeypatch.setattr(attention, "find_spec", lambda name: name if name in installed else None)
    assert choose_kernel("cuda", torch.bfloat16).kernel == "flash_attention_2"
    assert choose_kernel("cuda", torch.float32).kernel == "sdpa"
    installed.remove("flash_attn")
    assert choose_kernel("cuda", torch.float16).kernel == "torch_varlen"
    installed.clear()
    assert choose_kernel("cuda", torch.float16).kernel == "sdpa"


def test_sdpa_runs_where_a_varlen_kernel_could(monkeypatch: pytest.MonkeyPatch):
    """`set_kernel(model, "sdpa")` holds inside wrappers; the other model of the process keeps its varlen kernel."""
    ran = []

    def kernel(*arguments, **named):
        ran.append("varlen")
        return flash_attn_varlen_func(*arguments, **named)

    monkeypatch.setattr(attention, "varlen_kernel", lambda device_type, dtype: kernel)
    batch = pack([prompt([[11, 12, 2], [11, 21, 22, 2]])], SHARING)
    model, other = decoder("llama", kv_heads=2), decoder("llama", kv_heads=2)
    wrapped = torch.nn.Sequential(model)
    set_kernel(wrapped, "sdpa")
    set_kernel(other, "flash_attention_2")
    plain = response_logps(model, batch).sums
    assert ran == []
    varlen = response_logps(other, batch).sums
    assert len(ran) == len(other.model.language_model.layers)
    torch.testing.assert_close(plain, varlen, rtol=1e-9, atol=1e-9)


def test_context_restores_nests_and_survives_errors():
    model = decoder()
    config = decoder_config(model)
    assert config._attn_implementation == "sdpa"
    with packed_attention(model) as outer, packed_attention(model) as inner:
        assert inner is outer
        assert config._attn_implementation == attention.PACKED_ATTENTION
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), packed_attention(model):
        raise KeyError
    assert config._attn_implementation == "sdpa"


def test_two_models_in_one_context():
    """A second model (a reference beside the policy) gets its own packed attention inside the first one's context."""
    first, second = decoder(seed=0), decoder(seed=1)
    with packed_attention(first):
        with packed_attention(second):
            assert decoder_config(second)._attn_implementation == attention.PACKED_ATTENTION
        assert decoder_config(second)._attn_implementation == "sdpa"
        assert decoder_config(first)._attn_implementation == attention.PACKED_ATTENTION


def test_misuse_is_refused():
    layout = pack(BATCHES["one pair"], SHARING).layout
    states = [torch.zeros(1, 2, 12, 4)] * 3
    with pytest.raises(ValueError, match="without packed_layout"):
        shared_prefix_attention(torch.nn.Module(), *states, None)
    with pytest.raises(ValueError, match=r"no attention_mask.*\(1, 12\)"):
        shared_prefix_attention(torch.nn.Module(), *states, torch.ones(1, 12), packed_layout=layout)
    with pytest.raises(ValueError, match="no dropout, got 0.1"):
        shared_prefix_attention(torch.nn.Module(), *states, None, dropout=0.1, packed_layout=layout)


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        (Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"]), "linear_attention layers"),
        (Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=64, max_window_layers=0), "sliding"),
    ],
)
def test_decoders_that_cannot_share_are_refused_by_feature(config, feature: str):
    with pytest.raises(ValueError, match=feature):
        check_prefix_sharing(config)


def test_plain_decoders_pass():
    check_prefix_sharing(LlamaConfig())
    check_prefix_sharing(Qwen2Config(sliding_window=4096, use_sliding_window=False))
