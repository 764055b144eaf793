"""Shared-prefix attention over packed rows, as an attention function of transformers.

In a packed row (`muffin.packing`) every branch sees its own prefix and itself, causally, and nothing else. Equal forms:

- SDPA, per prompt: prefix and first branch are contiguous, one causal call; every further branch is one call on its own queries and the
  gathered keys `[prefix, branch]` with a bottom-right causal mask. Rows of short sequences only go as one padded batch.
- one varlen call for the whole row on CUDA in half precision: flash-attn's `flash_attn_varlen_func` if installed, else torch's
  `varlen_attn`. Queries stay where they are, keys and values are gathered as `[prefix, branch]`; causal is aligned bottom-right when
  there are fewer queries than keys.

The function is not registered with transformers' AttentionMaskInterface, so no T x T mask is ever built for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from muffin.packing import PackedLayout

# transformers treats names that contain "sdpa", "flash" or "flex" specially; this one must not.
PACKED_ATTENTION = "muffin_packed"
PLAIN_PACKED_ATTENTION = "muffin_packed_plain"  # on SDPA whatever is installed

# Keys of the longest sequence up to which SDPA takes the whole row as one padded batch: below it, calls cost more than padding.
SHORT_SEQUENCE = 96

VarlenKernel = Callable[..., Tensor]
Implementation = Literal["auto", "flash_attention_2", "sdpa"]  # of --attn_implementation


# A stand-in for the kernel of another machine, for `muffin.rehearsal`.
_stand_in: ContextVar[VarlenKernel | None] = ContextVar("stand_in_kernel", default=None)


@contextmanager
def stand_in_kernel(kernel: VarlenKernel | None) -> Iterator[None]:
    """Run packed attention on `kernel`, whatever the device; None leaves it as it is."""
    token = _stand_in.set(kernel)
    try:
        yield
    finally:
        _stand_in.reset(token)


class _Calls:
    """How often packed attention ran inside the current `packed_attention`; zero after a forward means it was bypassed."""

    def __init__(self) -> None:
        self.count = 0


_calls: ContextVar[_Calls | None] = ContextVar("packed_attention_calls", default=None)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model inside any wrapper (DDP, FSDP, DeepSpeed, peft)."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def decoder_config(model: nn.Module) -> PreTrainedConfig:
    """Config of the text decoder inside any wrapper."""
    return unwrapped(model).config.get_text_config()


def set_kernel(model: nn.Module, kernel: str) -> None:
    """Make packed attention of `model` run on `kernel`, a `Numerics.attention`: SDPA even where a varlen kernel could run.

    Any other value is what `varlen_kernel` takes by itself. Kept on the model, where wrappers and recomputation find it.
    """
    unwrapped(model).packed_attention_name = PLAIN_PACKED_ATTENTION if kernel == "sdpa" else PACKED_ATTENTION


def check_prefix_sharing(config: PreTrainedConfig) -> None:
    """Raise ValueError naming the feature if a decoder's attention is not plain causal softmax over the whole prefix."""
    values = config.to_dict()
    name = values.get("model_type")
    other_layers = sorted(set(values.get("layer_types") or ()) - {"full_attention"})
    if other_layers:
        raise ValueError(
            f"{name} has {', '.join(other_layers)} layers, which cannot share a prefix in one row; pack it with prefix_sharing=False"
        )
    if values.get("sliding_window") and values.get("use_sliding_window", True):
        raise ValueError(f"{name} uses sliding-window attention ({values['sliding_window']} tokens), which packed rows do not support")
    if values.get("attn_logit_softcapping"):
        raise ValueError(f"{name} soft-caps attention logits ({values['attn_logit_softcapping']}), which packed rows do not support")


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[_Calls]:
    """Run the decoder of `model` with shared-prefix attention; the implementation it had is restored on leaving.

    May be nested. Under gradient checkpointing the backward pass recomputes attention, so backward must run inside the context too.
    Raises ValueError for decoders that cannot share a prefix (`check_prefix_sharing`).
    """
    outer = _calls.get()
    config = decoder_config(model)
    if outer is not None and inside_packed_attention(model):
        yield outer
        return
    check_prefix_sharing(config)
    stock = config._attn_implementation
    calls = _Calls()
    token = _calls.set(calls)
    name = vars(unwrapped(model)).get("packed_attention_name", PACKED_ATTENTION)
    config._attn_implementation_internal = name  # the public setter walks every module and re-checks; this runs per batch
    try:
        yield calls
    finally:
        config._attn_implementation_internal = stock
        _calls.reset(token)


def inside_packed_attention(model: nn.Module) -> bool:
    """Whether the decoder of `model` runs packed attention now; another model's context does not count."""
    return decoder_config(model)._attn_implementation in (PACKED_ATTENTION, PLAIN_PACKED_ATTENTION)


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: PackedLayout | None = None,
    plain: bool = False,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function for packed rows.

    query (1, Hq, T, D), key and value (1, Hkv, T, D), after RoPE; returns (1, T, Hq, D) and None for the weights. plain: on SDPA.
    """
    if packed_layout is None:
        raise ValueError(
            "packed attention was called without packed_layout; use muffin.logps.response_logps, or generate outside packed_attention"
        )
    if attention_mask is not None:
        raise ValueError(f"packed attention takes no attention_mask, got one of shape {tuple(attention_mask.shape)}")
    if dropout:
        raise ValueError(f"packed attention has no dropout, got {dropout}; set attention_dropout to 0 in the model's config")
    calls = _calls.get()
    if calls is not None:
        calls.count += 1
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast RoPE promotes q and k to float32 while v stays bfloat16
    kernel = _stand_in.get() or (None if plain else varlen_kernel(query.device.type, query.dtype))
    if kernel is not None:
        return _attend_varlen(kernel, query, key, value, scaling, packed_layout), None
    attend = _attend_padded if packed_layout.max_seqlen_k <= SHORT_SEQUENCE else _attend_per_span
    # A CPU's attention runs in float32 at any length: for short sequences the backward of torch's bfloat16 kernel takes five times as
    # long, for long ones the two are equally fast, and log-probs must not depend on which form a batch happens to take.
    exact = torch.float32 if query.device.type == "cpu" and query.dtype != torch.float64 else query.dtype
    with torch.autocast(query.device.type, enabled=False):
        output = attend(query.to(exact), key.to(exact), value.to(exact), scaling, packed_layout)
    return output.to(value.dtype), None


AttentionInterface.register(PACKED_ATTENTION, shared_prefix_attention)
AttentionInterface.register(PLAIN_PACKED_ATTENTION, partial(shared_prefix_attention, plain=True))


def _attend_per_span(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout) -> Tensor:
    key, value = _repeat_heads(query, key, value)
    # Cut with split, whose backward is one concatenation; every slice's backward would write a whole row of zeros.
    lengths = [length for span in layout.spans for length in (span.prefix + span.branches[0], *span.branches[1:])]
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for span in layout.spans:
        own_query, own_key, own_value = next(pieces)
        outputs.append(F.scaled_dot_product_attention(own_query, own_key, own_value, is_causal=True, scale=scaling))
        prefix_key, prefix_value = own_key[:, :, : span.prefix], own_value[:, :, : span.prefix]
        for length in span.branches[1:]:
            branch_query, branch_key, branch_value = next(pieces)
            if length == 0:
                continue
            outputs.append(
                F.scaled_dot_product_attention(
                    branch_query,
                    torch.cat([prefix_key, branch_key], dim=2),
                    torch.cat([prefix_value, branch_value], dim=2),
                    attn_mask=torch.ones(length, span.prefix + length, dtype=torch.bool, device=query.device).tril(span.prefix),
                    scale=scaling,
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout) -> Tensor:
    """All sequences of the row as one padded batch: for many short ones, where calls cost more than padding."""
    key, value = _repeat_heads(query, key, value)
    start_q, start_k = layout.cu_seqlens_q[:-1, None], layout.cu_seqlens_k[:-1, None]
    length_q, length_k = layout.cu_seqlens_q.diff()[:, None], layout.cu_seqlens_k.diff()[:, None]
    place_q = torch.arange(layout.max_seqlen_q, device=query.device)
    place_k = torch.arange(layout.max_seqlen_k, device=query.device)
    inside_q, inside_k = place_q < length_q, place_k < length_k  # (sequences, longest)
    rows_q = torch.where(inside_q, start_q + place_q, 0)
    rows_k = layout.kv_index[torch.where(inside_k, start_k + place_k, 0)]
    visible = (place_k <= place_q[:, None] + (length_k - length_q)[:, :, None]) & inside_k[:, None]  # causal, aligned bottom-right

    def padded(tensor: Tensor, rows: Tensor) -> Tensor:
        return tensor[0].transpose(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        padded(query, rows_q), padded(key, rows_k), padded(value, rows_k), attn_mask=visible[:, None], scale=scaling
    )
    return output.transpose(1, 2)[inside_q][None]


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once per query head: SDPA's own enable_gqa falls back to a slow kernel when a mask is given."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))


def _attend_varlen(kernel: VarlenKernel, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout) -> Tensor:
    gathered = [tensor[0].transpose(0, 1).index_select(0, layout.kv_index) for tensor in (key, value)]
    output = kernel(
        query[0].transpose(0, 1).contiguous(),
        *gathered,
        cu_seqlens_q=layout.cu_seqlens_q,
        cu_seqlens_k=layout.cu_seqlens_k,
        max_seqlen_q=layout.max_seqlen_q,
        max_seqlen_k=layout.max_seqlen_k,
        softmax_scale=scaling,
        causal=True,
    )
    return output[None]


@dataclass(frozen=True)
class KernelChoice:
    """kernel: flash_attention_2, torch_varlen or sdpa, part of the reference's numerics. reason: why, for the log."""

    kernel: str
    reason: str


def resolve_kernel(
    requested: Implementation,
    *,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    flash_attn: bool,
    torch_varlen: bool,
) -> KernelChoice:
    """What packed attention runs on.

    capability: of the GPU, (8, 0) for an A100; None where unknown. flash_attn, torch_varlen: whether flash-attn is installed, and whether
    torch has its varlen kernel. Raises ValueError when flash_attention_2 is asked for and cannot run.
    """
    if requested == "sdpa":
        return KernelChoice("sdpa", "as asked for")
    if device_type != "cuda":
        missing = "there is no CUDA GPU"
    elif dtype not in (torch.float16, torch.bfloat16):
        missing = f"it computes in half precision, and this run in {str(dtype).removeprefix('torch.')} (--dtype bfloat16)"
    elif capability is not None and capability < (8, 0):
        missing = f"it needs a GPU of compute capability 8.0 (A100 and later), and this one has {capability[0]}.{capability[1]}"
    elif flash_attn:
        return KernelChoice("flash_attention_2", "flash-attn is installed, on a GPU in half precision")
    elif torch_varlen and requested == "auto":
        return KernelChoice("torch_varlen", "torch's own varlen kernel, since flash-attn is not installed")
    else:
        missing = 'flash-attn is not installed: pip install --no-build-isolation -e ".[cuda]"'
    if requested == "flash_attention_2":
        raise ValueError(f"--attn_implementation flash_attention_2 cannot run: {missing}; mend that, or take auto or sdpa")
    return KernelChoice("sdpa", f"flash attention cannot run: {missing}")


def choose_kernel(device_type: str, dtype: torch.dtype, requested: Implementation = "auto") -> KernelChoice:
    """`resolve_kernel` for this machine."""
    capability = torch.cuda.get_device_capability() if device_type == "cuda" and torch.cuda.is_available() else None
    return resolve_kernel(
        requested,
        device_type=device_type,
        capability=capability,
        dtype=dtype,
        flash_attn=find_spec("flash_attn") is not None,
        torch_varlen=find_spec("torch.nn.attention.varlen") is not None,
    )


@cache
def varlen_kernel(device_type: str, dtype: torch.dtype) -> VarlenKernel | None:
    """The varlen kernel for tensors of this device and dtype, with flash-attn's keyword names; None means SDPA."""
    match choose_kernel(device_type, dtype).kernel:
        case "flash_attention_2":
            from flash_attn import flash_attn_varlen_func

            return flash_attn_varlen_func
        case "torch_varlen":
            return _torch_varlen
    return None


def _torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
) -> Tensor:
    """torch's varlen_attn under flash-attn's keyword names; causal is a window that ends at the query."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
