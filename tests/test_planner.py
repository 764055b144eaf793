"""The plan's arithmetic on numbers worked out by hand, and what it counts against real policies and rows."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import LlavaConfig

from muffin.flops import Work, forward_flops, packed_work, step_flops
from muffin.packing import pack
from muffin.pairs import load_preferences
from muffin.planner import (
    NO_LIMIT,
    Memory,
    PlanOptions,
    Trained,
    Weights,
    count_weights,
    empty_policy,
    hours,
    measure_rows,
    memory_per_gpu,
    optimizer_bytes,
    percentiles,
    quantised_matrices,
    steps_of_run,
    training_flops,
)
from muffin.policies import Checkpoint, PolicyOptions, encode_pair, load_adapter, load_policy
from muffin.rehearsal import StepMemory
from muffin.training_run import LoraOptions, ModelOptions
from tests.test_flops import TINY
from tests.tiny_decoders import SHARING, prompt

# 1,000 weights of 4 bytes, 900 of them trained; activations grow to 700 bytes, gradients arrive as they shrink.
WEIGHTS = Weights(total=1000, bytes=4000, trained=(Trained(600, embedding=False), Trained(300, embedding=True)))
STEP = StepMemory(((0, 0), (700, 0), (300, 2400), (100, 3600)))


def gpu(zero: int, processes: int = 4, optim: str = "adamw_torch_fused", **more) -> Memory:
    return memory_per_gpu(WEIGHTS, STEP, zero=zero, processes=processes, optim=optim, **more)


def test_a_process_alone():
    # AdamW: two float32 per trained weight; the step peaks where all 3,600 bytes of gradients have come and 100 of activations are left
    assert gpu(0, processes=1) == Memory(weights=4000, optimizer=7200, step=3700, buffers=0)
    assert gpu(0, processes=1).total == 14_900


def test_ddp_copies_the_gradients():
    assert gpu(0) == Memory(weights=4000, optimizer=7200, step=3700, buffers=3600)


def test_zero_2_shards_gradients_and_optimizer():
    # 7200 / 4; step: 700, or 300 + 2400 / 4 = 900, or 100 + 3600 / 4 = 1000; engine: a master copy of 3600 / 4 and two buckets of 3600
    assert gpu(2) == Memory(weights=4000, optimizer=1800, step=1000, buffers=900 + 7200)
    assert gpu(1) == Memory(weights=4000, optimizer=1800, step=3700, buffers=900 + 7200)


def test_zero_3_shards_the_weights():
    # engine: the master copy, one bucket, and all weights (fewer than 1e9) gathered while in use: the three quarters of the others
    assert gpu(3) == Memory(weights=1000, optimizer=1800, step=1000, buffers=900 + 3600 + 3000)


def test_buckets_and_gathered_weights_have_a_limit():
    large = Weights(total=10**10, bytes=4 * 10**10, trained=(Trained(10**10, embedding=False),))
    memory = memory_per_gpu(large, StepMemory(((0, 0),)), zero=3, processes=10, optim="adamw_torch_fused")
    # master copy 4 GB, a bucket of 5e8 float32, 1e9 of the 1e10 weights gathered, a tenth of which is there anyway
    assert memory.buffers == 4_000_000_000 + 2_000_000_000 + 3_600_000_000
    assert memory.weights == 4_000_000_000


def test_accumulated_gradients_are_there_from_the_start():
    assert gpu(0, processes=1, accumulates=True).step == 700 + 3600
    assert gpu(2, accumulates=True).step == 700 + 900


def test_foreach_adamw_needs_a_copy():
    assert gpu(0, processes=1, optim="adamw_torch").step == 3600 + 3600
    assert gpu(2, optim="adamw_torch").step == (3600 + 3600) // 4


def test_qlora_unpacks_a_matrix():
    packed = Weights(WEIGHTS.total, WEIGHTS.bytes, WEIGHTS.trained, unpacked=50)
    assert memory_per_gpu(packed, STEP, zero=0, processes=1, optim="adamw_torch_fused").buffers == 50


def test_8_bit_states():
    # two bytes and two float32 per 256 numbers; below 4,096 numbers, and in an embedding, two float32 per number
    matrix, small, embedding = Trained(25_600, embedding=False), Trained(4095, embedding=False), Trained(10_000, embedding=True)
    assert optimizer_bytes([matrix], "adamw_8bit") == 2 * 25_600 + 2 * 4 * 100
    assert optimizer_bytes([matrix, small, embedding], "paged_adamw_8bit") == 52_000 + 8 * 4095 + 8 * 10_000
    with pytest.raises(ValueError, match="--optim lion_32bit takes; it knows adamw_torch_fused"):
        optimizer_bytes([matrix], "lion_32bit")


def test_a_gpu_keeps_a_tenth_free():
    assert Memory(weights=72_000_000_000, optimizer=0, step=0, buffers=0).fits(80)
    assert not Memory(weights=72_000_000_000, optimizer=0, step=0, buffers=1).fits(80)


def test_count_weights_counts_shared_and_frozen_ones_once():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False), "inner": nn.Linear(4, 8)})
    model["head"].weight = model["table"].weight
    model["inner"].bias.requires_grad_(False)
    model.to(torch.bfloat16)
    counted = count_weights(model, [model["inner"].weight])
    # nf4: 32 numbers in 16 bytes, half a byte of their scale, and its own scale's share
    assert counted.total == 40 + 32 + 8
    assert counted.bytes == 2 * 40 + 16 + round(0.5 + 32 * 4 / 16_384) + 2 * 8
    assert counted.trained == (Trained(40, embedding=True), Trained(32, embedding=False))
    assert counted.unpacked == 64


def test_nf4_weights_take_what_bitsandbytes_takes(tiny_llava_path):
    checkpoint = Checkpoint(tiny_llava_path)
    adapter = load_adapter(checkpoint, PolicyOptions())
    real = load_policy(checkpoint, adapter, dtype=torch.bfloat16, bits=4)
    states = [module.weight.quant_state for module in real.modules() if isinstance(module, Linear4bit)]
    scales = [scale for state in states for scale in (state.absmax, state.state2.absmax)]
    taken = sum(tensor.nbytes for tensor in (*real.parameters(), *scales))
    with torch.device("meta"):
        empty = adapter.empty_model(tiny_llava_path).to(torch.bfloat16)
    counted = count_weights(empty, quantised_matrices(empty, adapter.spec.quantization_skip))
    assert counted.bytes == pytest.approx(taken, abs=4 * len(states))  # a scale of scales is not divided
    assert counted.total == sum(parameter.numel() for parameter in empty.parameters())


@pytest.mark.parametrize("method", ["full", "LoRA", "QLoRA"])
def test_an_empty_policy_trains_what_the_real_one_trains(method, tiny_llava_path):
    """The tiny model has 2 layers of width 64, 4 heads of 16 with 2 key heads, an MLP of 128; LoRA has rank 8."""
    checkpoint = Checkpoint(tiny_llava_path)
    adapter = load_adapter(checkpoint, PolicyOptions())
    given = (ModelOptions(str(tiny_llava_path)), LoraOptions(lora_r=8))
    policy = empty_policy(checkpoint, adapter, method, "auto", *given)
    real = load_policy(checkpoint, adapter, dtype=torch.float32)
    if method == "full":
        assert policy.weights.trainable == sum(p.numel() for name, p in real.named_parameters() if "vision_tower" not in name)
        assert policy.numerics.weights_dtype == "float32"
    else:
        # q and o: 64 -> 64; k and v: 64 -> 32; gate and up: 64 -> 128; down: 128 -> 64
        assert policy.weights.trainable == 2 * 8 * (2 * 128 + 2 * 96 + 3 * 192)
        assert policy.numerics.weights_dtype == ("bfloat16" if method == "LoRA" else "nf4")
    assert policy.numerics.autocast_dtype == "bfloat16"  # --dtype auto is that of a GPU


def test_steps_are_counted_as_the_trainer_does():
    run = {"batch_size": 2, "processes": 3, "accumulation": 4, "max_steps": -1}
    # 100 rows: 17 batches of 6, 5 steps of 4 batches
    assert steps_of_run(100, epochs=1, **run) == 5
    assert steps_of_run(100, epochs=2.5, **run) == 13
    assert steps_of_run(1, epochs=1, **run) == 1
    assert steps_of_run(100, epochs=1, **{**run, "max_steps": 7}) == 7


def test_hours():
    # 36 TFLOP for each of 1e6 pairs on 10 GPUs of 100 TFLOP/s: 36,000 s
    assert hours(36, 1e6, processes=10, gpu_tflops=100) == pytest.approx(10)


def test_percentiles_are_values_that_occur():
    assert percentiles(range(1, 201)) == {"50 %": 100, "90 %": 180, "99 %": 198, "longest": 200}
    assert percentiles([7]) == {"50 %": 7, "90 %": 7, "99 %": 7, "longest": 7}


def test_rows_are_measured_whole_and_computed_cut(tiny_llava_path, tiny_rows_path):
    checkpoint = Checkpoint(tiny_llava_path)
    limit = 80
    unlimited = load_adapter(checkpoint, PolicyOptions(model_max_length=NO_LIMIT))
    dataset = load_preferences(tiny_rows_path)
    config = LlavaConfig.from_pretrained(tiny_llava_path)
    sample = measure_rows(dataset, unlimited, limit, batch_size=3, config=config, lora=True, recomputes=True)

    pairs = [encode_pair(unlimited, dataset[position]) for position in range(len(dataset))]
    whole = [len(pair.prompt_ids) + max(map(len, pair.response_ids)) for pair in pairs]
    assert sample.whole == tuple(whole)
    assert 0 < sample.too_long == sum(length > limit for length in whole) < len(whole)
    assert sample.no_room == sum(len(pair.prompt_ids) >= limit for pair in pairs)
    assert sample.unreadable == 0
    assert max(sample.computed) <= 2 * limit
    assert len(sample.longest.lengths) == 2 * 3
    # the three longest pairs; pairs of one prompt share it in a row
    assert sample.longest.num_tokens <= sum(sorted(sample.computed)[-3:])
    usable = [row for row in range(len(dataset)) if len(pairs[row].prompt_ids) < limit]
    flops = []
    for row in usable:
        prompt = len(pairs[row].prompt_ids)
        chosen, rejected = (ids[: limit - prompt] for ids in pairs[row].response_ids)
        shared = next(
            (at for at, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)) if a != b), min(len(chosen), len(rejected)) - 1
        )
        prefix, tails = prompt + shared, [len(ids) - 1 - shared for ids in (chosen, rejected)]
        attended = prefix * (prefix + 1) // 2 + sum(tail * prefix + tail * (tail + 1) // 2 for tail in tails)
        work = Work(1, prefix + sum(tails), attended, 1 + shared + sum(tails))
        again = forward_flops(config, work)
        flops.append(step_flops(config, work, "lora") + again.linears + again.attention)
    assert sample.teraflops == pytest.approx(sum(flops) / len(flops) / 1e12, rel=1e-9)


def test_flops_of_a_reference_by_another_forward():
    config, batch = TINY, pack([prompt([[11, 12, 13], [14, 15]])], SHARING)
    stored = training_flops(config, batch, lora=True, recomputes=False)
    work = packed_work(batch)
    assert stored == step_flops(config, work, "lora")
    assert training_flops(config, batch, lora=True, recomputes=False, reference_forward=True) == stored + step_flops(config, work, "score")


def test_no_usable_row_is_an_error(tiny_llava_path, tiny_rows_path):
    adapter = load_adapter(Checkpoint(tiny_llava_path), PolicyOptions(model_max_length=NO_LIMIT))
    with pytest.raises(ValueError, match="24 leave no room for a response within --model_max_length 20"):
        measure_rows(load_preferences(tiny_rows_path), adapter, 20, batch_size=1, config=None, lora=False, recomputes=False)


@pytest.mark.parametrize(
    "flags", [{"plan_processes": 0}, {"gpu_memory_gb": 0}, {"gpu_tflops": float("inf")}, {"gpu_memory_gb": float("nan")}]
)
def test_impossible_options_are_refused(flags):
    (name, value), *_ = flags.items()
    with pytest.raises(ValueError, match=f"--{name} is {value}, want"):
        PlanOptions(**flags)
