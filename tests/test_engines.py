"""Two processes on a CPU (gloo): sharded engines give the losses and gradients of one process."""

import json
import multiprocessing
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from muffin.logps import response_logps
from muffin.packing import pack
from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint
from muffin.policy_trainer import add_lora
from tests.conftest import ROOT
from tests.tiny_decoders import SHARING, decoder, prompt

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


def sharded_step(rank: int, port: int) -> tuple[list[float], dict[str, list[float]], int]:
    """One forward and backward under FSDP2, each rank on a batch of its own."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = decoder("llama", kv_heads=2).train()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    sums = response_logps(model, pack(BATCHES[rank], SHARING)).sums
    sums.sum().backward()
    gradients = {
        name: parameter.grad.full_tensor().flatten().tolist() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    dist.barrier()
    dist.destroy_process_group()
    return sums.tolist(), gradients, sum(parameter.to_local().numel() for parameter in model.parameters())


def test_fsdp2_equals_one_process():
    """Log-probs per rank, and gradients averaged over ranks; each rank holds about half of the weights."""
    results = in_two_processes(sharded_step)
    model = decoder("llama", kv_heads=2).train()
    expected_sums = [response_logps(model, pack(batch, SHARING)).sums for batch in BATCHES]
    (sum(sums.sum() for sums in expected_sums) / 2).backward()
    whole = sum(parameter.numel() for parameter in model.parameters())
    for (sums, gradients, held), expected in zip(results, expected_sums, strict=True):
        assert sums == pytest.approx(expected.tolist(), rel=1e-12)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    torch.tensor(gradients[name], dtype=torch.float64), parameter.grad.flatten(), rtol=1e-6, atol=1e-6
                )
        assert held < 0.6 * whole


def gathered_save(rank: int, port: int, output: str) -> float:
    """One step of a LoRA adapter under FSDP2; rank 0 saves the gathered adapter. Its loss."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = adapted_decoder()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = adapter_step(model, BATCHES[rank])
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)  # collective: every rank takes part
    if rank == 0:
        save_file({name: values.contiguous() for name, values in whole.items() if "lora_" in name}, output)
    dist.barrier()
    dist.destroy_process_group()
    return loss


def adapted_decoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return add_lora(
        decoder("llama", kv_heads=2), r".*language_model.*\.(q_proj|v_proj|down_proj)", r=4, alpha=8, dropout=0.0, base="none"
    ).train()


def adapter_step(model: torch.nn.Module, *batches) -> float:
    """SGD on the mean over `batches` of summed log-probs, twice: after the first step both halves of the adapter have gradients."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(response_logps(model, pack(batch, SHARING)).sums.sum() for batch in batches) / len(batches)
        loss.backward()
        optimizer.step()
    return float(loss)


def test_a_sharded_adapter_is_saved_whole_and_loads_again(tmp_path: Path):
    """Public reports: adapters that a sharded engine saved as zeros or empty. The file equals one process's adapter, which has moved."""
    file = tmp_path / "adapter.safetensors"
    losses = in_two_processes(gathered_save, str(file))
    alone = adapted_decoder()
    start = {name: values.clone() for name, values in alone.state_dict().items() if "lora_" in name}
    loss = adapter_step(alone, *BATCHES)
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-6)
    saved = load_file(file)
    trained = {name: values for name, values in alone.state_dict().items() if "lora_" in name}
    assert saved.keys() == trained.keys()
    for name, values in trained.items():
        torch.testing.assert_close(saved[name], values, rtol=1e-5, atol=1e-6)
        assert values.abs().max() > 0
    moved = [name for name in trained if (saved[name] - start[name]).abs().max() > 1e-4]
    assert len(moved) >= 0.9 * len(trained)
    loaded = adapted_decoder()
    assert not loaded.load_state_dict(saved, strict=False).unexpected_keys
    for batch in BATCHES:
        torch.testing.assert_close(response_logps(loaded, pack(batch, SHARING)).sums, response_logps(alone, pack(batch, SHARING)).sums)


def test_fsdp2_configuration_is_read():
    """scripts/train/fsdp2.json through transformers' own reader, which ignores keys that it does not know, into accelerate's plugin."""
    arguments = SimpleNamespace(fsdp=True, fsdp_config=str(CONFIGS / "fsdp2.json"), activation_checkpointing=False)
    plugin = FullyShardedDataParallelPlugin(**TrainingArguments._process_fsdp_args(arguments))
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL" in str(plugin.state_dict_type)
    known = {"version", "auto_wrap_policy", "reshard_after_forward", "state_dict_type", "activation_checkpointing"}
    assert set(json.loads((CONFIGS / "fsdp2.json").read_text())) == known


def zero_training(rank: int, port: int, main, command: list[str]) -> tuple[str, list[float]]:
    """train/dpo.py on one of two processes under DeepSpeed; what wraps the model, and the logged losses."""
    import os

    from accelerate.state import AcceleratorState, PartialState

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # inherited from the test process, which runs alone
    state = main(command)
    wrapper = str(PartialState().distributed_type)
    return wrapper, [entry["loss"] for entry in state.log_history if "loss" in entry]


def cpu_config(stage: int, path: Path) -> Path:
    """scripts/train/zeroN.json in float32, with an optimizer that needs no compiled kernel."""
    settings = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    del settings["torch_autocast"]
    parameters = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    settings |= {"zero_allow_untested_optimizer": True, "optimizer": {"type": "AdamW", "params": parameters}}
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.slow  # DeepSpeed compiles its CPU communication on first use, which takes a C++ compiler and a minute
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(stage: int, lora: bool, load_recipe, tiny_llava_path: Path, tiny_rows_path: Path, tmp_path: Path):
    """ZeRO-2 and ZeRO-3 through the Trainer, float32: the first losses are those of one process with the same pairs per step, and so is
    what is saved, read by the loader of every later command."""
    main = load_recipe("train/dpo.py").main
    scored = tmp_path / "scored"
    policy = ["--model_name_or_path", str(tiny_llava_path), "--dtype", "float32", "--lora_enable", str(lora)]
    scoring = [*policy, "--data_path", str(tiny_rows_path), "--output_dir", str(scored), "--num_workers", "0"]
    load_recipe("eval/muffin_inference_logp.py").main(scoring)
    fixed = [*policy, "--data_path", str(scored), "--max_steps", "3"]
    fixed += ["--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "True", "--learning_rate", "1e-3" if lora else "1e-4"]
    fixed += ["--lr_scheduler_type", "constant", "--max_grad_norm", "0", *(["--lora_r", "4", "--lora_dropout", "0"] if lora else [])]
    alone = main([*fixed, "--output_dir", str(tmp_path / "alone"), "--per_device_train_batch_size", "4"])
    config = cpu_config(stage, tmp_path / "zero.json")
    command = [*fixed, "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2", "--deepspeed", str(config)]
    expected = [entry["loss"] for entry in alone.log_history if "loss" in entry]
    for wrapper, losses in in_two_processes(zero_training, main, command):
        assert "DEEPSPEED" in wrapper
        assert losses == pytest.approx(expected, rel=1e-4)
    start, one, two = (weights_of(folder) for folder in (tiny_llava_path, tmp_path / "alone", tmp_path / "two"))
    moved = 0
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-3, atol=1e-4)
        moved += int((two[name] - start[name]).abs().max() > 1e-4)
    assert moved > 10  # what was trained is in the file


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = resolve_checkpoint(folder)
    return load_policy(checkpoint, load_adapter(checkpoint, PolicyOptions()), dtype=torch.float32).state_dict()
