"""Does training fit, and how long does it take? Worked out before anything is loaded, from the model's config and the data alone.

    config --count_weights--> Weights  --.
    longest rows --rehearse--> StepMemory --memory_per_gpu--> Memory: GB per GPU under ZeRO 0, 2, 3
    rows --measure_rows--> RowSample --> tokens, steps, TFLOP per pair, hours

GB is 1e9 bytes. The plan is for GPUs whatever machine it is made on: --dtype auto counts as bfloat16.
"""

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from muffin.flops import forward_flops, packed_work, step_flops
from muffin.packing import PackedBatch, pack
from muffin.pairs import PreferenceDataset, RowError
from muffin.policies import Checkpoint, EncodedResponses, PolicyAdapter, PolicyOptions, load_adapter
from muffin.provenance import Numerics, resolve_numerics
from muffin.reference_gate import spread_positions
from muffin.rehearsal import StepMemory, rehearse
from muffin.trainer import DPOArguments
from muffin.training_run import LoraOptions, ModelOptions, mark_trained

Method = Literal["full", "LoRA", "QLoRA"]
METHODS: tuple[Method, ...] = ("full", "LoRA", "QLoRA")
ZERO_STAGES = (0, 2, 3)
GB = 1e9

SAMPLED_ROWS = 1000
NO_LIMIT = 10**9  # as model_max_length: cuts nothing
# Share of a GPU's memory that is left free: CUDA's context, workspaces of kernels, NCCL, and holes between blocks of the allocator.
MARGIN = 0.1

# nf4 with double quantisation: half a byte, a byte per 64 numbers, and a float32 per 256 of those bytes.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)

# DeepSpeed's defaults in numbers: what is reduced at once, and how many gathered weights of ZeRO-3 may live at a time.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000

# bitsandbytes keeps two bytes and two float32 per block of 256 numbers; small tensors, and embeddings by Trainer's wish, stay in float32.
BITSANDBYTES_SMALLEST = 4096
STATE_BYTES_8BIT = 2 + 2 * 4 / 256
# --optim: bits of a state, and bytes per number that a step needs for a moment (torch's foreach form makes one copy).
OPTIMIZERS: dict[str, tuple[int, int]] = {
    "adamw_torch_fused": (32, 0),
    "adamw_torch": (32, 4),
    "paged_adamw_32bit": (32, 0),
    "adamw_8bit": (8, 0),
    "adamw_bnb_8bit": (8, 0),
    "paged_adamw_8bit": (8, 0),
}


@dataclass
class PlanOptions:
    """What --plan is made for."""

    plan_processes: int = field(default=8, metadata={"help": "--plan: number of GPUs of the run, one process each."})
    gpu_memory_gb: float = field(default=80.0, metadata={"help": "--plan: memory of a GPU in GB of 1e9 bytes, such as 24, 40 or 80."})
    gpu_tflops: float = field(
        default=300.0,
        metadata={
            "help": "--plan: TFLOP/s that a GPU achieves in matrix products of a training step, usually 30 to 50 % of its data sheet's "
            "dense bfloat16 figure (H100: 990, A100: 312); a run's own is TFLOP per pair times pairs per second and GPU."
        },
    )

    def __post_init__(self) -> None:
        if self.plan_processes < 1:
            raise ValueError(f"--plan_processes is {self.plan_processes}, want the number of GPUs, 1 or more")
        for name in ("gpu_memory_gb", "gpu_tflops"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, want a positive number such as {80 if name == 'gpu_memory_gb' else 300}"
                )


# --- memory


@dataclass(frozen=True)
class Trained:
    """A trained parameter: how many numbers it has, and whether it is the table of an embedding."""

    numbers: int
    embedding: bool


@dataclass(frozen=True)
class Weights:
    """Parameters of a policy.

    total: their number, LoRA's own included. bytes: as held in memory. trained: the trained ones, which are float32.
    unpacked: bytes of the largest quantised matrix in bfloat16, which every product with it makes anew.
    """

    total: int
    bytes: int
    trained: tuple[Trained, ...]
    unpacked: int = 0

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numbers for parameter in self.trained)


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU at the peak of a training step.

    step: activations and gradients at their common peak, or gradients and what the optimizer needs for its step if that is more.
    buffers: of the engine (see `memory_per_gpu`), and the matrix that QLoRA unpacks.
    """

    weights: int
    optimizer: int
    step: int
    buffers: int

    @property
    def total(self) -> int:
        """Bytes at the peak, everything together."""
        return self.weights + self.optimizer + self.step + self.buffers

    def fits(self, gpu_memory_gb: float) -> bool:
        """Whether it leaves MARGIN of the GPU free."""
        return self.total <= (1 - MARGIN) * gpu_memory_gb * GB


def quantised_matrices(model: nn.Module, skip: Collection[str]) -> list[Tensor]:
    """Weights that `--bits 4` holds as nf4: those of linears, without the modules to skip (`PolicySpec.quantization_skip`)."""
    return [
        module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and should_convert_module(name, list(skip))
    ]


def count_weights(model: nn.Module, quantised: Sequence[Tensor] = ()) -> Weights:
    """Counts each parameter once, however many modules share it."""
    packed = {id(matrix) for matrix in quantised}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = list(model.parameters())
    return Weights(
        total=sum(parameter.numel() for parameter in parameters),
        bytes=round(sum(each.numel() * (NF4_BYTES if id(each) in packed else each.element_size()) for each in parameters)),
        trained=tuple(Trained(each.numel(), id(each) in embeddings) for each in parameters if each.requires_grad),
        unpacked=max((2 * matrix.numel() for matrix in quantised), default=0),
    )


def optimizer_bytes(trained: Sequence[Trained], optim: str) -> int:
    """Bytes of AdamW's two states. Raises ValueError for an optimizer whose states are not known here."""
    bits, _ = _optimizer(optim)
    return round(
        sum(
            parameter.numbers * (8 if bits == 32 or parameter.embedding or parameter.numbers < BITSANDBYTES_SMALLEST else STATE_BYTES_8BIT)
            for parameter in trained
        )
    )


def _optimizer(optim: str) -> tuple[int, int]:
    if optim not in OPTIMIZERS:
        raise ValueError(f"--plan does not know how much memory --optim {optim} takes; it knows {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[optim]


def memory_per_gpu(weights: Weights, step: StepMemory, *, zero: int, processes: int, optim: str, accumulates: bool = False) -> Memory:
    """Memory of one of `processes` GPUs under a stage of ZeRO; 0 is DDP, or a process alone.

    Stage 1 shards the optimizer's states, 2 also the gradients, 3 also the weights. accumulates: gradients of earlier micro-batches are
    there from the start of a forward. Engines need more of their own, in float32:

        DDP, 2 processes or more   a copy of the gradients, in buckets
        ZeRO 1, 2, 3               its part of a copy of the trained weights, which the optimizer steps on
        ZeRO 1, 2                  two buckets of gradients, one of them on its way
        ZeRO 3                     a bucket of gradients, and gathered weights in use
    """
    if zero not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has stages 0 to 3, got {zero}")
    share = 1 / processes
    gradients = 4 * weights.trainable
    bucket = 4 * min(REDUCE_BUCKET, weights.trainable)
    states = optimizer_bytes(weights.trained, optim)
    held_weights, buffers = weights.bytes, weights.unpacked
    if zero == 0:
        buffers += gradients if processes > 1 else 0
    else:
        states *= share
        buffers += gradients * share + (bucket if zero == 3 else 2 * bucket)
    if zero == 3:
        buffers += weights.bytes * min(LIVE_PARAMETERS / weights.total, 1.0) * (1 - share)
        held_weights *= share
    gradient_share = share if zero >= 2 else 1.0
    backward = step.activations + gradients * gradient_share if accumulates else step.peak(gradient_share)
    _, extra = _optimizer(optim)
    update = gradients * gradient_share + extra * weights.trainable * (share if zero else 1.0)
    return Memory(round(held_weights), round(states), round(max(backward, update)), round(buffers))


# --- rows


@dataclass(frozen=True)
class RowSample:
    """What the rows of a data set ask of a step; all numbers are of the sampled rows.

    rows: of the data set. whole: tokens of prompt and longer response, not cut. computed: positions of the pair in a packed row.
    too_long: rows beyond model_max_length, whose responses are cut; no_room: those of them whose prompt leaves no room for a response.
    unreadable: rows that cannot be read or encoded.
    teraflops: mean TFLOP of a training step on the pair; None for families that muffin.flops does not know, whose
        rehearsed step tells.
    longest: the step's batch of the longest pairs.
    """

    rows: int
    whole: tuple[int, ...]
    computed: tuple[int, ...]
    too_long: int
    no_room: int
    unreadable: int
    teraflops: float | None
    longest: PackedBatch


def measure_rows(
    dataset: PreferenceDataset,
    adapter: PolicyAdapter,
    model_max_length: int,
    *,
    batch_size: int,
    config: object,
    lora: bool,
    recomputes: bool,
    reference_forward: bool = False,
) -> RowSample:
    """Encode at most SAMPLED_ROWS rows, evenly spread.

    adapter: one without a limit of its own; `model_max_length` is applied here. config: the model's; FLOPs are known for LlavaConfig.
    recomputes: activation checkpointing, which costs a second forward of the decoder. reference_forward: a forward more, for reference
    log-probs that are not stored. Raises ValueError when no row can be used.
    """
    whole, computed, flops = [], [], []
    too_long = no_room = unreadable = 0
    longest: list[tuple[int, int, EncodedResponses]] = []
    for position in tqdm(spread_positions(len(dataset), SAMPLED_ROWS), desc="rows of the plan", unit="row"):
        try:
            pair = dataset[position]
            encoded = adapter.encode(pair.image, pair.question, (pair.chosen, pair.rejected))
        except (RowError, ValueError, OSError):
            unreadable += 1
            continue
        prompt = len(encoded.prompt_ids)
        whole.append(prompt + max(map(len, encoded.response_ids)))
        too_long += whole[-1] > model_max_length
        if prompt >= model_max_length:
            no_room += 1
            continue
        encoded = replace(encoded, response_ids=tuple(ids[: model_max_length - prompt] for ids in encoded.response_ids))
        batch = pack([encoded], adapter)
        computed.append(batch.num_tokens)
        if isinstance(config, LlavaConfig):
            flops.append(training_flops(config, batch, lora=lora, recomputes=recomputes, reference_forward=reference_forward))
        heapq.heappush(longest, (batch.num_tokens, position, encoded))
        if len(longest) > batch_size:
            heapq.heappop(longest)
    if not computed:
        raise ValueError(
            f"none of {unreadable + no_room} sampled rows can be used: {unreadable} cannot be read or encoded, {no_room} leave no room "
            f"for a response within --model_max_length {model_max_length}; the same command without --plan says what is wrong with each"
        )
    return RowSample(
        rows=len(dataset),
        whole=tuple(whole),
        computed=tuple(computed),
        too_long=too_long,
        no_room=no_room,
        unreadable=unreadable,
        teraflops=sum(flops) / len(flops) / 1e12 if flops else None,
        longest=pack([encoded for _, _, encoded in longest], adapter),
    )


def training_flops(config: LlavaConfig, batch: PackedBatch, *, lora: bool, recomputes: bool, reference_forward: bool = False) -> int:
    """FLOPs of a training step, with the decoder's second forward under activation checkpointing and the reference's where it has one."""
    work = packed_work(batch)
    again = forward_flops(config, work)
    recomputed = again.linears + again.attention if recomputes else 0
    return (
        step_flops(config, work, "lora" if lora else "full") + recomputed + (step_flops(config, work, "score") if reference_forward else 0)
    )


def percentiles(values: Sequence[int]) -> dict[str, int]:
    """50th, 90th and 99th percentile (the smallest value that so many per cent do not exceed) and maximum."""
    found = {f"{percent} %": int(np.percentile(values, percent, method="inverted_cdf")) for percent in (50, 90, 99)}
    return found | {"longest": max(values)}


# --- time


def steps_of_run(rows: int, *, batch_size: int, processes: int, accumulation: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps, as transformers' Trainer counts them; max_steps decides when it is positive."""
    if max_steps > 0:
        return max_steps
    batches = math.ceil(rows / (batch_size * processes))
    return math.ceil(epochs * math.ceil(batches / accumulation))


def rehearsed_teraflops(sample: RowSample, step: StepMemory, args: DPOArguments) -> float:
    """Mean TFLOP of a pair of the sample out of a step on its longest pairs, by positions; attention's own products are left out."""
    flops = step.flops + (step.forward_flops if args.reference == "adapter_disabled" else 0)
    return flops / sample.longest.num_tokens * sum(sample.computed) / len(sample.computed) / 1e12


def hours(teraflops_per_pair: float, pairs: float, *, processes: int, gpu_tflops: float) -> float:
    """Hours of `pairs` pairs on all GPUs, each of which achieves `gpu_tflops` TFLOP/s."""
    return teraflops_per_pair * pairs / (processes * gpu_tflops) / 3600


# --- report


def gpu_numerics(method: Method, dtype: str) -> Numerics:
    """What `method` computes in on a GPU under --dtype."""
    return resolve_numerics(
        dtype="bfloat16" if dtype == "auto" else dtype,
        bits=4 if method == "QLoRA" else None,
        lora_enable=method != "full",
        device_type="cuda",
    )


@dataclass(frozen=True)
class EmptyPolicy:
    """A policy on the meta device, in train mode; `weights` as the real one would hold them, nf4 where it is."""

    model: nn.Module
    weights: Weights
    numerics: Numerics

    @property
    def config(self) -> PreTrainedConfig:
        """The model's own config."""
        return next(module for module in self.model.modules() if isinstance(module, PreTrainedModel)).config


def empty_policy(
    checkpoint: Checkpoint, adapter: PolicyAdapter, method: Method, dtype: str, model_options: ModelOptions, lora_options: LoraOptions
) -> EmptyPolicy:
    """What `training_run.build_policy` would load on a GPU for `method` under --dtype."""
    numerics = gpu_numerics(method, dtype)
    with torch.device("meta"):
        model = adapter.empty_model(checkpoint.base)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(numerics.load_dtype)
        quantised = quantised_matrices(model, adapter.spec.quantization_skip) if numerics.bits else []
        model = mark_trained(model, adapter, model_options, lora_options, lora_enable=method != "full")
    return EmptyPolicy(model.train(), count_weights(model, quantised), numerics)


def rehearse_both(policy: EmptyPolicy, batch: PackedBatch, checkpointing: Mapping[str, Any]) -> tuple[StepMemory, StepMemory]:
    """A step on a GPU without activation checkpointing, and with it (--activation_checkpointing_kwargs); the policy is used up."""
    plain = rehearse(policy.model, batch, policy.numerics, "cuda")
    every_n_layers = checkpointing.get("every_n_layers", 1)
    policy.model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every_n_layers)
    return plain, rehearse(policy.model, batch, policy.numerics, "cuda")


def refuses_zero3(method: Method, numerics: Numerics) -> bool:
    """Whether PolicyArguments refuses this under ZeRO-3, which would load the frozen base in float32."""
    return method != "full" and numerics.autocast_dtype is not None


def zero_stage(args: DPOArguments) -> int:
    """Stage of --deepspeed; --fsdp shards as stage 3 does; 0 without either."""
    if args.deepspeed:
        return int(HfDeepSpeedConfig(args.deepspeed).get_value("zero_optimization.stage", 0))
    return 3 if args.fsdp else 0


def plan_report(
    checkpoint: Checkpoint,
    policy_options: PolicyOptions,
    dataset: PreferenceDataset,
    model_options: ModelOptions,
    lora_options: LoraOptions,
    args: DPOArguments,
    options: PlanOptions,
) -> str:
    """The plan as text. Raises ValueError for an optimizer of unknown size, and when no row of the data can be used."""
    _optimizer(args.optim.value)
    adapter = load_adapter(checkpoint, policy_options)
    own: Method = "QLoRA" if args.bits else "LoRA" if args.lora_enable else "full"
    policies = {method: empty_policy(checkpoint, adapter, method, args.dtype, model_options, lora_options) for method in METHODS}
    sample = measure_rows(
        dataset,
        load_adapter(checkpoint, replace(policy_options, model_max_length=NO_LIMIT)),
        adapter.model_max_length,
        batch_size=args.per_device_train_batch_size,
        config=policies[own].config,
        lora=own != "full",
        recomputes=bool(args.activation_checkpointing),
        reference_forward=args.reference == "adapter_disabled",
    )
    kwargs = args.activation_checkpointing_kwargs
    steps = {method: rehearse_both(policies[method], sample.longest, kwargs) for method in ("full", "LoRA")}
    same = policies["LoRA"].numerics.load_dtype == policies["QLoRA"].numerics.load_dtype  # then the two keep the same activations
    steps["QLoRA"] = steps["LoRA"] if same else rehearse_both(policies["QLoRA"], sample.longest, kwargs)
    lines = _weight_lines(own, policies[own], steps[own], args, sample.longest)
    lines += ["", *_table_lines(own, policies, steps, args, options)]
    lines += [
        "",
        *_row_lines(sample, adapter.model_max_length),
        "",
        *_time_lines(sample, steps[own][bool(args.activation_checkpointing)], args, options),
    ]
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / GB:.3g}"


def _weight_lines(
    own: Method, policy: EmptyPolicy, steps: tuple[StepMemory, StepMemory], args: DPOArguments, batch: PackedBatch
) -> list[str]:
    weights, numerics = policy.weights, policy.numerics
    autocast = f", forward in {numerics.autocast_dtype}" if numerics.autocast_dtype else ""
    copies = "; they hold the bfloat16 copies of the weights that autocast makes" if own == "full" and numerics.autocast_dtype else ""
    pairs = len(batch.lengths) // 2
    return [
        f"{own} training, weights in {numerics.weights_dtype}{autocast}",
        f"parameters   {weights.total:,}, of which trained {weights.trainable:,}",
        f"weights      {_gb(weights.bytes)} GB",
        f"gradients    {_gb(4 * weights.trainable)} GB, in float32",
        f"optimizer    {_gb(optimizer_bytes(weights.trained, args.optim.value))} GB, {args.optim.value}",
        f"activations  {_gb(steps[0].activations)} GB in a step on the longest pairs of the sample ({pairs} of them, {batch.num_tokens:,} "
        f"positions), {_gb(steps[1].activations)} GB with --activation_checkpointing True{copies}",
    ]


def _table_lines(
    own: Method,
    policies: Mapping[Method, EmptyPolicy],
    steps: Mapping[Method, tuple[StepMemory, StepMemory]],
    args: DPOArguments,
    options: PlanOptions,
) -> list[str]:
    """A line per method and stage of ZeRO, with and without activation checkpointing."""
    own_stage = zero_stage(args)
    lines = [
        f"GB per GPU on {options.plan_processes} of them with {options.gpu_memory_gb:g} GB each; what fits leaves {MARGIN:.0%} free "
        "for CUDA, workspaces and fragmentation",
        f"{'':66}with --activation_checkpointing True",
        f"{'':6} ZeRO {'weights':>8} {'optimizer':>9} {'engine':>8} {'step':>8} {'total':>8}{'':14} {'step':>8} {'total':>8}",
    ]
    for method, stage in product(METHODS, sorted({*ZERO_STAGES, own_stage})):
        policy = policies[method]
        if stage == 3 and not args.fsdp and refuses_zero3(method, policy.numerics):
            mark = "  <- these flags" if (method, stage) == (own, own_stage) else ""
            lines.append(f"{method:6} {stage:>4} refused: ZeRO-3 would hold the base in float32{mark}")
            continue
        accumulates = args.gradient_accumulation_steps > 1
        plain, checkpointed = (
            memory_per_gpu(
                policy.weights, step, zero=stage, processes=options.plan_processes, optim=args.optim.value, accumulates=accumulates
            )
            for step in steps[method]
        )
        line = f"{method:6} {stage:>4} {_gb(plain.weights):>8} {_gb(plain.optimizer):>9} {_gb(plain.buffers):>8}"
        for memory in (plain, checkpointed):
            verdict = "fits" if memory.fits(options.gpu_memory_gb) else "does not fit"
            line += f" {_gb(memory.step):>8} {_gb(memory.total):>8}  {verdict:12}"
        if (method, stage) == (own, own_stage):
            line += f"  <- these flags, {'with' if args.activation_checkpointing else 'without'}"
        lines.append(line.rstrip())
    if args.fsdp:
        lines.append("--fsdp is counted as ZeRO-3")
    if args.deepspeed and HfDeepSpeedConfig(args.deepspeed).is_offload():
        lines.append(f"what --deepspeed {args.deepspeed} offloads to the CPU is counted on the GPU here")
    return lines


def _row_lines(sample: RowSample, model_max_length: int) -> list[str]:
    count = len(sample.whole) + sample.unreadable
    which = "all" if count == sample.rows else f"{count:,} rows, evenly spread, of"

    def line(name: str, values: Sequence[int]) -> str:
        return f"{name:52} " + ", ".join(f"{found}: {value:,}" for found, value in percentiles(values).items())

    return [
        f"tokens of a row, over {which} {sample.rows:,} rows",
        line("  prompt, image included, and the longer response", sample.whole),
        line("  positions computed for the pair, its prompt once", sample.computed),
        f"  longer than --model_max_length {model_max_length}: {sample.too_long:,}, whose responses are cut; without room for any: "
        f"{sample.no_room:,}; cannot be read or encoded: {sample.unreadable:,}",
    ]


def _time_lines(sample: RowSample, step: StepMemory, args: DPOArguments, options: PlanOptions) -> list[str]:
    steps = steps_of_run(
        sample.rows,
        batch_size=args.per_device_train_batch_size,
        processes=options.plan_processes,
        accumulation=args.gradient_accumulation_steps,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps,
    )
    per_step = args.per_device_train_batch_size * options.plan_processes * args.gradient_accumulation_steps
    pairs = steps * per_step if args.max_steps > 0 else sample.rows * args.num_train_epochs
    line = f"steps        {steps:,} of {per_step} pairs"
    teraflops = rehearsed_teraflops(sample, step, args) if sample.teraflops is None else sample.teraflops
    taken = hours(teraflops, pairs, processes=options.plan_processes, gpu_tflops=options.gpu_tflops)
    return [
        line,
        f"time         {teraflops:.3g} TFLOP per pair; {taken:.2g} hours on {options.plan_processes} GPUs that achieve "
        f"{options.gpu_tflops:g} TFLOP/s each (--gpu_tflops), reading data and talking between GPUs not counted",
    ]
