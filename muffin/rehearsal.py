"""Memory of a training step without the memory: the step runs on tensors that have a shape and no content, and their bytes are counted.

    config --empty_model--> model without memory --rehearse(batch)--> StepMemory: (activations, gradients) in bytes at every moment

Floating-point tensors are torch's FakeTensors; whole numbers and masks are real, so that code which asks them for values (where are the
image tokens, how long is a response) gets an answer. A storage counts from the operation that makes it until nobody holds it, once,
however many views it has. What an operation's kernel takes and gives back inside is not seen.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from muffin.attention import packed_attention, stand_in_kernel
from muffin.logps import response_logps
from muffin.packing import PackedBatch, map_tensors
from muffin.provenance import Numerics

Device = Literal["cpu", "cuda"]

# Operations whose FLOPs count. Attention's are left out: its kernels differ between machines, and it has a few per cent of the whole.
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")}


@dataclass(frozen=True)
class StepMemory:
    """Live bytes of forward and backward beyond the weights, at every moment at which they grew.

    moments: (activations, gradients); gradients are those of finished parameters, activations everything else.
    forward_flops, flops: of the matrix products (PRODUCTS) of the forward, and of the whole step, recomputed ones included.
    """

    moments: tuple[tuple[int, int], ...]
    forward_flops: int = 0
    flops: int = 0

    @property
    def activations(self) -> int:
        """Their peak; gradients on the way to their parameter count here."""
        return max(activations for activations, _ in self.moments)

    def peak(self, gradient_share: float = 1.0) -> int:
        """Largest sum when a process keeps this share of the gradients (1 / processes when they are sharded)."""
        return max(activations + round(gradient_share * gradients) for activations, gradients in self.moments)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make. Storages of `known` tensors (weights, inputs) do not count."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._keep = known  # an address must not be used again while it means a known storage
        self._sizes: dict[int, int] = {}
        self._gradients: set[int] = set()
        self._activation_bytes = self._gradient_bytes = 0
        self._moments = {(0, 0): None}  # distinct ones, in order
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._activation_bytes += storage.nbytes()
        self._moments[self._activation_bytes, self._gradient_bytes] = None
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._gradients:
            self._gradients.remove(key)
            self._gradient_bytes -= size
        else:
            self._activation_bytes -= size

    def gradient_is_ready(self, parameter: Tensor) -> None:
        """A hook for `register_post_accumulate_grad_hook`: its gradient is no activation from here on."""
        key = parameter.grad.untyped_storage()._cdata
        if key in self._sizes and key not in self._gradients:
            self._gradients.add(key)
            self._activation_bytes -= self._sizes[key]
            self._gradient_bytes += self._sizes[key]
            self._moments[self._activation_bytes, self._gradient_bytes] = None

    @property
    def moments(self) -> tuple[tuple[int, int], ...]:
        """What was counted so far, as in `StepMemory`."""
        return tuple(self._moments)


def step_memory(model: nn.Module, batch: PackedBatch, numerics: Numerics) -> StepMemory:
    """Memory of a forward and backward of `model`, which may be real or without memory; gradients are set to None before and after."""
    model.zero_grad(set_to_none=True)
    tensors: list[Tensor] = []
    map_tensors(batch, tensors.append)  # for what it visits
    live = LiveBytes([*model.parameters(), *model.buffers(), *tensors])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(live.gradient_is_ready) for parameter in trained]
    with packed_attention(model) if batch.layout is not None else nullcontext(), live:
        with numerics.autocast("cpu"):
            logps = response_logps(model, batch)
        forward_flops = live.flops
        logps.sums.sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return StepMemory(live.moments, forward_flops, live.flops)


class _WithoutMemory(TorchDispatchMode):
    """Operations on FakeTensors, and those that make floating-point numbers, run on shapes alone; whole numbers are computed."""

    # Indexing by a mask has as many results as the mask has ones: real masks are turned into indices, which have a shape.
    INDEXING = (
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put.default,
        torch.ops.aten.index_put_.default,
        torch.ops.aten._index_put_impl_.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return tree_map_only(Tensor, self.emptied, func(*args, **kwargs))
        if func in self.INDEXING:
            args = (args[0], [index for each in args[1] for index in _as_indices(each)], *args[2:])
        with self.fake:
            output = func(*args, **kwargs)
        if not tensors and isinstance(output, Tensor) and not output.is_floating_point():
            return func(*args, **kwargs)
        return output

    def emptied(self, tensor: Tensor) -> Tensor:
        """Floating-point tensors without their content, others as they are."""
        return self.fake.from_tensor(tensor) if tensor.is_floating_point() and not isinstance(tensor, FakeTensor) else tensor

    def filled_in(self, tensor: Tensor) -> Tensor:
        """A tensor of the meta device as a FakeTensor of the CPU."""
        with self.fake:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if not isinstance(tensor, nn.Parameter):
            return empty
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)


def _as_indices(index: Tensor | None) -> tuple[Tensor | None, ...]:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return (index,)
    return index.nonzero().unbind(-1)


def rehearse(model: nn.Module, batch: PackedBatch, numerics: Numerics, device: Device) -> StepMemory:
    """`step_memory` of a model on the meta device, whose tensors are exchanged for FakeTensors (it is of no other use afterwards).

    device: "cuda" counts what its fused attention and dropout keep; "cpu" what the kernels of this machine do.
    """
    mode = _WithoutMemory()
    _exchange_tensors(model, mode.filled_in)
    if device == "cuda":
        _fuse_dropout(model)
    with mode, stand_in_kernel(_FlashAttention.kernel if device == "cuda" else None):
        return step_memory(model, map_tensors(batch, mode.emptied), numerics)


def _exchange_tensors(model: nn.Module, exchange: Callable[[Tensor], Tensor]) -> None:
    exchanged: dict[Tensor, Tensor] = {}  # a tensor that two modules share stays one
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if tensor not in exchanged:
                        exchanged[tensor] = exchange(tensor)
                    tensors[name] = exchanged[tensor]


class _FlashAttention(torch.autograd.Function):
    """The memory of a flash-attention kernel: backward keeps query, key, value, the output and a float32 per head and query."""

    @staticmethod
    def kernel(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        return _FlashAttention.apply(query, key, value)

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _FusedDropout(nn.Module):
    """Dropout that keeps a byte per number for backward, as CUDA's does; a CPU's keeps a number."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, numbers: Tensor) -> Tensor:
        return torch.native_dropout(numbers, self.p, self.training)[0]


def _fuse_dropout(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0:
                module.register_module(name, _FusedDropout(child.p).train(child.training))
