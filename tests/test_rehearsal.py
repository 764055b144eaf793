"""A rehearsed step takes the bytes that the real one takes, and an empty model is the real one without its numbers."""

import pytest
import torch
from torch import nn
from transformers import LlavaConfig

from muffin.flops import forward_flops, packed_work, step_flops
from muffin.packing import pack
from muffin.pairs import load_preferences
from muffin.policies import PolicyOptions, encode_pair, load_adapter, load_policy, resolve_checkpoint
from muffin.policy_trainer import add_lora, freeze
from muffin.provenance import resolve_numerics
from muffin.rehearsal import LiveBytes, StepMemory, rehearse, step_memory
from tests.policies.tiny_families import FAMILIES
from tests.tiny import write_parquet


def prepared(model: nn.Module, adapter, *, lora: bool, checkpointing: bool) -> nn.Module:
    if lora:
        model = add_lora(model, adapter.spec.lora_targets, r=8, alpha=16, dropout=0.05, base="base")
    else:
        freeze(model, adapter.spec.frozen_modules)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def empty(adapter, folder, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = adapter.empty_model(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def world(tiny_llava_path, tmp_path_factory):
    """Folder, adapter, and a packed batch of three pairs."""
    adapter = load_adapter(resolve_checkpoint(tiny_llava_path), PolicyOptions())
    rows = load_preferences(write_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", 4))
    return tiny_llava_path, adapter, pack([encode_pair(adapter, rows[position]) for position in (0, 1, 3)], adapter)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_rehearsal_counts_what_the_real_step_takes(lora, dtype, checkpointing, world):
    folder, adapter, batch = world
    numerics = resolve_numerics(dtype=dtype, bits=None, lora_enable=lora, device_type="cpu")
    real = load_policy(resolve_checkpoint(folder), adapter, dtype=numerics.load_dtype)
    real = prepared(real, adapter, lora=lora, checkpointing=checkpointing)
    rehearsed = prepared(empty(adapter, folder, numerics.load_dtype), adapter, lora=lora, checkpointing=checkpointing)
    assert rehearse(rehearsed, batch, numerics, "cpu") == step_memory(real, batch, numerics)


def test_flops_are_those_of_the_formula(world):
    """Those of muffin.flops, but for attention's products and a gradient that the projector hands to the frozen tower."""
    folder, adapter, batch = world
    numerics = resolve_numerics(dtype="bfloat16", bits=None, lora_enable=False, device_type="cpu")
    rehearsed = prepared(empty(adapter, folder, torch.float32), adapter, lora=False, checkpointing=False)
    config, work = rehearsed.config, packed_work(batch)
    step = rehearse(rehearsed, batch, numerics, "cuda")
    tower, width = config.vision_config, config.text_config.hidden_size
    patches = (tower.image_size // tower.patch_size) ** 2
    tower_attention = 4 * work.images * tower.num_hidden_layers * (patches + 1) ** 2 * tower.hidden_size
    to_the_tower = 2 * work.images * patches * tower.hidden_size * width
    attention = forward_flops(config, work).attention
    assert step.forward_flops == step_flops(config, work, "score") - attention - tower_attention
    assert step.flops == step_flops(config, work, "full") - 3 * attention - tower_attention - to_the_tower


def test_live_bytes_of_a_matrix_product():
    """y = relu(x w): worked out by hand, 2 x 3 times 3 x 4, float32."""
    x, w = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
    live = LiveBytes([x, w])
    w.register_post_accumulate_grad_hook(live.gradient_is_ready)
    with live:
        (x @ w).relu().sum().backward()
    # forward: product 32, relu 32 beside it; then the product is let go (relu's backward keeps its output), sum 4
    # backward: ones 4 (their expansion is a view), gradient of relu 32, relu's output let go, gradient of w 48
    before = [activations for activations, gradients in live.moments if gradients == 0]
    assert before == [0, 32, 64, 32 + 4, 32 + 4 + 4, 32 + 4 + 4 + 32, 4 + 4 + 32 + 48]
    assert live.moments[-1][1] == 48


def test_step_memory_shares_gradients():
    memory = StepMemory(((100, 0), (80, 40), (10, 120)))
    assert memory.activations == 100
    assert memory.peak() == 130
    assert memory.peak(1 / 4) == 100
    assert memory.peak(1 / 2) == 100


def test_llava_7b_from_its_config_alone(world, tmp_path):
    """llava-hf/llava-1.5-7b-hf has 7,063,427,072 parameters: CLIP-L/14-336, Vicuna-7B, and 64 rows beyond Vicuna's 32,000."""
    config = LlavaConfig()
    config.text_config.vocab_size = 32064
    config.save_pretrained(tmp_path)
    model = empty(world[1], tmp_path, torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_063_427_072
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_rehearsed(family, tmp_path):
    FAMILIES[family].build(tmp_path)
    adapter = load_adapter(resolve_checkpoint(tmp_path), PolicyOptions())
    real = load_policy(resolve_checkpoint(tmp_path), adapter, dtype=torch.float32)
    shapes = [
        {name: tensor.shape for name, tensor in model.named_parameters()} for model in (real, empty(adapter, tmp_path, torch.float32))
    ]
    assert shapes[0] == shapes[1]
    rows = load_preferences(write_parquet(tmp_path / "rows.parquet", 2))
    batch = pack([encode_pair(adapter, rows[position]) for position in (0, 1)], adapter)
    numerics = resolve_numerics(dtype="float32", bits=None, lora_enable=False, device_type="cpu")
    real, rehearsed = (
        prepared(model, adapter, lora=False, checkpointing=False) for model in (real, empty(adapter, tmp_path, torch.float32))
    )
    assert rehearse(rehearsed, batch, numerics, "cpu").peak() == pytest.approx(step_memory(real, batch, numerics).peak(), rel=0.02)
