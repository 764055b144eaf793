"""Two processes on a CPU (gloo): sharded engines give the losses and gradients of one process."""

import json
import multiprocessing
import os
import re
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_auto_wrap_policy, fsdp2_prepare_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, StateDictType, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from muffin.attention import packed_attention
from muffin.logps import response_logps
from muffin.packing import PackedBatch, pack
from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint, save_adapter
from muffin.policy_trainer import PolicyArguments, add_lora
from tests.conftest import ROOT
from tests.tiny_decoders import LORA_TARGETS, SHARING, decoder, prompt

CONFIGS = ROOT / "scripts" / "train"

BATCHES = [
    [prompt([[11, 12, 13, 2], [11, 21, 2]]), prompt([[31, 2], [41, 42, 2]], question=(8,), image=1)],
    [prompt([[14, 2], [15, 16, 17, 2]], image=2)],
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(target, *arguments) -> list:
    """What `target(rank, port, *arguments)` returns on ranks 0 and 1."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    port = free_port()
    processes = [fork.Process(target=_report, args=(results, target, rank, port, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join(timeout=120)
    failed = [value for value in found.values() if isinstance(value, BaseException)]
    if failed:
        raise failed[0]
    return [found[0], found[1]]


def _report(results, target, rank: int, port: int, *arguments) -> None:
    torch.set_num_threads(1)
    try:
        results.put((rank, target(rank, port, *arguments)))
    except BaseException as error:  # a process that dies silently would leave the test waiting
        results.put((rank, RuntimeError(f"rank {rank}: {error!r}")))
        raise


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 by hand: every decoder layer, and the rest."""
    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_as_trainer(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 as accelerate applies scripts/train/fsdp2.json; its Accelerator would not on a CPU, so the parts it reads stand in."""
    plugin = FullyShardedDataParallelPlugin(**fsdp2_arguments())
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",  # PolicyArguments leaves precision to muffin's own autocast
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=("shards",)),
    )
    return fsdp2_prepare_model(accelerator, fsdp2_apply_ac(accelerator, model))


def fsdp2_arguments() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return TrainingArguments(folder, use_cpu=True, fsdp=True, fsdp_config=str(CONFIGS / "fsdp2.json")).fsdp_plugin_args


def full_policy() -> nn.Module:
    return decoder("llama", kv_heads=2).train()


def lora_policy() -> nn.Module:
    """A bfloat16 base and a float32 adapter that is not at its start, where half of it has no gradient."""
    model = decoder("llama", kv_heads=2, dtype=torch.bfloat16)
    policy = add_lora(model, LORA_TARGETS, r=4, alpha=8, dropout=0.0, base="tiny")
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy.train()


def batch_sums(model: nn.Module, batch: PackedBatch) -> Tensor:
    """(S,) log-probs of a batch, with its gradients added to the model's."""
    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=half), packed_attention(model):
        sums = response_logps(model, batch).sums
        sums.sum().backward()
    return sums.detach()


def sharded_step(rank: int, port: int, build, shard) -> tuple[list[float], dict[str, list[float]], int]:
    """One forward and backward under FSDP2, each rank on a batch of its own."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = shard(build(), init_device_mesh("cpu", (2,), mesh_dim_names=("shards",)))
    (layers,) = [module for name, module in model.named_modules() if name.endswith("language_model.layers")]
    assert all(isinstance(module, FSDPModule) for module in (model, *layers))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    sums = batch_sums(model, pack(BATCHES[rank], SHARING))
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.full_tensor().flatten().tolist()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    dist.barrier()
    dist.destroy_process_group()
    return sums.tolist(), gradients, sum(parameter.to_local().numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "shard"),
    [(full_policy, shard_layers), (full_policy, shard_as_trainer), (lora_policy, shard_layers)],
    ids=["full", "full_by_fsdp2.json", "lora"],
)
def test_fsdp2_equals_one_process(build, shard):
    """Log-probs per rank, and gradients averaged over ranks; each rank holds about half of the weights."""
    results = in_two_processes(sharded_step, build, shard)
    model = build()
    expected_sums = [batch_sums(model, pack(batch, SHARING)) for batch in BATCHES]
    expected_gradients = {name: parameter.grad / 2 for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(gradient.abs().max() > 0 for name, gradient in expected_gradients.items() if "lora_" in name)
    whole = sum(parameter.numel() for parameter in model.parameters())
    for (sums, gradients, held), expected in zip(results, expected_sums, strict=True):
        assert sums == pytest.approx(expected.tolist(), rel=1e-12)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(torch.tensor(gradients[name], dtype=gradient.dtype), gradient.flatten(), rtol=1e-6, atol=1e-6)
        assert held < 0.6 * whole


def test_why_fsdp_with_lora_is_refused(monkeypatch):
    """Once this fails, transformers can shard a model with an adapter layer by layer, and PolicyArguments need not refuse it."""
    policy = lora_policy()
    with pytest.raises(TypeError, match="Could not find the transformer layer class"):  # LLaVA's list names a class it does not have
        fsdp_auto_wrap_policy(policy)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    plugin = SimpleNamespace(auto_wrap_policy=fsdp_auto_wrap_policy(policy))
    assert fsdp2_prepare_auto_wrap_policy(plugin, policy) is None


def saved_shards(rank: int, port: int, checkpoint: Path, output_dir: Path, lora: bool) -> None:
    """Add 0.125 to every trained weight while it is sharded, and save as Trainer does under FSDP2."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    policy = float32_policy(checkpoint, lora)
    policy = (shard_layers if lora else shard_as_trainer)(policy, init_device_mesh("cpu", (2,), mesh_dim_names=("shards",)))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.125)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)  # those of Accelerator.get_state_dict
    state_dict = get_model_state_dict(policy, options=options)
    if rank == 0:
        policy.save_pretrained(output_dir, state_dict=state_dict)
        save_adapter(load_adapter(resolve_checkpoint(checkpoint), PolicyOptions()), output_dir)
    dist.barrier()
    dist.destroy_process_group()


def float32_policy(checkpoint: Path, lora: bool = False) -> nn.Module:
    """The policy of a folder through muffin's loader; lora: with a new adapter, always the same."""
    found = resolve_checkpoint(checkpoint)
    adapter = load_adapter(found, PolicyOptions())
    policy = load_policy(found, adapter, dtype=torch.float32)
    if lora:
        torch.manual_seed(0)
        policy = add_lora(policy, adapter.spec.lora_targets, r=4, alpha=8, dropout=0.0, base=str(checkpoint))
    return policy


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_fsdp2_saves_loads_in_one_process(lora: bool, tiny_llava_path: Path, tmp_path: Path):
    in_two_processes(saved_shards, tiny_llava_path, tmp_path / "saved", lora)
    expected = float32_policy(tiny_llava_path, lora)
    for parameter in expected.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.125)
    expected = expected.merge_and_unload() if lora else expected
    found = float32_policy(tmp_path / "saved").state_dict()
    start = float32_policy(tiny_llava_path).state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    changed = {name for name, value in start.items() if not torch.allclose(value, found[name], atol=1e-3)}
    assert len(changed) == (14 if lora else len(start))  # 7 linear layers in each of 2 decoder layers


# --- the shipped configurations, and DeepSpeed


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_configs_are_accepted(name: str, stage: int, tmp_path: Path, monkeypatch):
    """By PolicyArguments under bfloat16, by DeepSpeed's own parser, and with every "auto" filled in."""
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)  # one process here, and no torchrun around it
    args = PolicyArguments(str(tmp_path), dtype="bfloat16", deepspeed=str(CONFIGS / f"{name}.json"))
    try:
        args.hf_deepspeed_config.trainer_config_process(args)
        parsed = deepspeed.DeepSpeedConfig(args.hf_deepspeed_config.config)
    finally:
        unset_hf_deepspeed_config()
    assert parsed.zero_optimization_stage == stage and parsed.zero_config.gather_16bit_weights_on_model_save == (stage == 3)
    assert (parsed.torch_autocast_enabled, parsed.torch_autocast_dtype) == (True, torch.bfloat16)
    assert (parsed.train_micro_batch_size_per_gpu, parsed.gradient_clipping) == (8, 1.0)


def test_fsdp2_config_is_accepted():
    written = json.loads((CONFIGS / "fsdp2.json").read_text())
    plugin = FullyShardedDataParallelPlugin(**fsdp2_arguments())
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, True)
    assert plugin.transformer_cls_names_to_wrap == written["transformer_layer_cls_to_wrap"]
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    known = re.findall(r"^ +- (\w+) \(", TrainingArguments.__doc__, re.MULTILINE)  # a misspelt key would be ignored without a word
    assert "reshard_after_forward" in known and written.keys() <= set(known)


def training(rank: int, port: int, main, command: list[str]) -> tuple[str, list[float]]:
    """train/dpo.py on one of two processes; what kind of engine wraps the model, and the logged losses."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # inherited from the test process, which runs alone
    state = main(command)
    return str(PartialState().distributed_type), losses(state)


def losses(state: TrainerState) -> list[float]:
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


@pytest.fixture
def trained_by_one_and_two(load_recipe, tiny_llava_path: Path, tiny_rows_path: Path, tmp_path: Path):
    """Three steps of train/dpo.py in one process and, with more flags, in two, which must end with the same losses and weights.

    tolerance: of the change that training made to a weight, relative; of the losses, a tenth of it. Gives the kind of engine.
    """

    def run(engine: list[str], *, lora: bool, dtype: str = "float32", tolerance: float = 1e-3) -> str:
        main = load_recipe("train/dpo.py").main
        policy = ["--model_name_or_path", str(tiny_llava_path), "--dtype", dtype, "--lora_enable", str(lora)]
        scoring = [*policy, "--data_path", str(tiny_rows_path), "--output_dir", str(tmp_path / "scored"), "--num_workers", "0"]
        load_recipe("eval/muffin_inference_logp.py").main(scoring)
        fixed = [*policy, "--data_path", str(tmp_path / "scored"), "--max_steps", "3", "--lora_r", "4", "--lora_dropout", "0"]
        fixed += ["--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "True", "--learning_rate", "1e-3"]
        fixed += ["--lr_scheduler_type", "constant", "--max_grad_norm", "0", "--activation_checkpointing", "True"]
        fixed += ["--adam_epsilon", "1e-4"]  # near the gradients, so that their scale shows in the weights
        alone = main([*fixed, "--output_dir", str(tmp_path / "alone"), "--per_device_train_batch_size", "4"])
        command = [*fixed, "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2", *engine]
        results = in_two_processes(training, main, command)
        for _, found in results:
            assert found == pytest.approx(losses(alone), rel=tolerance / 10)
        start, expected, found = (float32_policy(path).state_dict() for path in (tiny_llava_path, tmp_path / "alone", tmp_path / "two"))
        changes = {name: (value - start[name]).norm() for name, value in expected.items() if not torch.equal(value, start[name])}
        assert len(changes) >= 14 and max(changes.values()) > 1e-2
        errors = {name: float((found[name] - value).norm()) for name, value in expected.items()}
        assert {name: error for name, error in errors.items() if error > tolerance * float(changes.get(name, 0.0))} == {}
        (kind,) = {kind for kind, _ in results}
        return kind

    return run


def test_ddp_with_lora_equals_one_process(trained_by_one_and_two):
    assert trained_by_one_and_two([], lora=True) == "DistributedType.MULTI_CPU"


@pytest.mark.slow  # DeepSpeed compiles its CPU communication on first use, which takes a C++ compiler and a minute
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(stage: int, lora: bool, trained_by_one_and_two, tmp_path: Path):
    """ZeRO-2 and ZeRO-3 through the Trainer, float32; adapters saved under ZeRO-3 are known to come out as zeros or empty elsewhere."""
    config = tmp_path / "zero.json"
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}}
    settings = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3}}
    settings |= {"zero_allow_untested_optimizer": True, "optimizer": optimizer, "gradient_clipping": "auto"}
    settings |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto"}
    config.write_text(json.dumps(settings))
    assert trained_by_one_and_two(["--deepspeed", str(config)], lora=lora) == "DistributedType.DEEPSPEED"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [("zero2", False), ("zero2", True), ("zero3", False)])
def test_shipped_deepspeed_configs_equal_one_process(name: str, lora: bool, trained_by_one_and_two):
    """In bfloat16, where rows that are packed otherwise are rounded otherwise."""
    engine = ["--deepspeed", str(CONFIGS / f"{name}.json")]
    assert trained_by_one_and_two(engine, lora=lora, dtype="bfloat16", tolerance=0.05) == "DistributedType.DEEPSPEED"
