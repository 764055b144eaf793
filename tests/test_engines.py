"""Two processes on a CPU (gloo): sharded engines give the losses and gradients of one process."""

import json
import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from muffin.logps import response_logps
from muffin.packing import pack
from tests.tiny_decoders import SHARING, decoder, prompt

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


@pytest.mark.slow  # DeepSpeed compiles its CPU communication on first use, which takes a C++ compiler and a minute
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(stage: int, load_recipe, tiny_llava_path: Path, tiny_rows_path: Path, tmp_path: Path):
    """ZeRO-2 and ZeRO-3 through the Trainer, float32: the first losses are those of one process with the same pairs per step."""
    main = load_recipe("train/dpo.py").main
    scored = tmp_path / "scored"
    policy = ["--model_name_or_path", str(tiny_llava_path), "--dtype", "float32"]
    scoring = [*policy, "--data_path", str(tiny_rows_path), "--output_dir", str(scored), "--num_workers", "0"]
    load_recipe("eval/muffin_inference_logp.py").main(scoring)
    fixed = [*policy, "--data_path", str(scored), "--max_steps", "3"]
    fixed += ["--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "True", "--learning_rate", "1e-4"]
    fixed += ["--lr_scheduler_type", "constant", "--max_grad_norm", "0"]
    alone = main([*fixed, "--output_dir", str(tmp_path / "alone"), "--per_device_train_batch_size", "4"])
    config = tmp_path / "zero.json"
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}}
    settings = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "optimizer": optimizer}
    settings |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto"}
    config.write_text(json.dumps(settings))
    command = [*fixed, "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2", "--deepspeed", str(config)]
    expected = [entry["loss"] for entry in alone.log_history if "loss" in entry]
    for wrapper, losses in in_two_processes(zero_training, main, command):
        assert "DEEPSPEED" in wrapper
        assert losses == pytest.approx(expected, rel=1e-4)
