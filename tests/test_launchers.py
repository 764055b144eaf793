"""scripts/train/slurm.sh and the several-node launcher that it starts, on a CPU: two torchrun "nodes" on this machine, no Slurm."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_engines import losses

# Starts the command once per node, as srun does. As Slurm does, it sends SIGUSR1 on to every process of the job step, and kills those
# that are left when the command has ended.
SRUN = """
import os, psutil, signal, subprocess, sys

nodes = [subprocess.Popen(sys.argv[2:]) for _ in range(int(os.environ["SLURM_NNODES"]))]
processes = []

def send_on(number, frame):
    for node in nodes:
        processes.extend([psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)])
    for process in processes:
        process.send_signal(number)

signal.signal(signal.SIGUSR1, send_on)
status = max(abs(node.wait()) for node in nodes)
for process in processes:
    if process.is_running():
        process.kill()
sys.exit(status)
"""
SCONTROL = """
import os, sys

if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nelsewhere")
else:
    open(os.environ["SCONTROL_CALLS"], "a").write(" ".join(sys.argv[1:]) + "\\n")
"""
STEPS = 40


def is_free(port: int) -> bool:
    with socket.socket() as taken:
        return taken.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def slurm(tmp_path: Path):
    """Starts scripts/train/slurm.sh with the given words after it, as a job on two nodes; its output goes to a file."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(f"#!{sys.executable}\n{code}")
        (commands / name).chmod(0o755)
    job = next(job for job in range(os.getpid() % 10000, 20000) if is_free(20000 + job % 10000))  # the port that the script takes
    paths = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "nodes", "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "1"}
    environment |= {"SCONTROL_CALLS": str(tmp_path / "scontrol_calls")}
    started = []

    def start(log: Path, *words: str) -> subprocess.Popen:
        with log.open("w") as output:
            command = ["bash", "scripts/train/slurm.sh", *words]
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow  # two nodes, each a torchrun and a process that trains, start twice: one to four minutes
def test_a_slurm_job_saves_before_its_limit_is_queued_again_and_goes_on(slurm, load_recipe, tiny_llava_path, tiny_rows_path, tmp_path):
    """SIGUSR1 to the batch script alone; the run that goes on has every step once, with one process's losses."""
    scored, run, calls = tmp_path / "scored", tmp_path / "run", tmp_path / "scontrol_calls"
    policy = ["--model_name_or_path", str(tiny_llava_path), "--dtype", "bfloat16"]
    policy += ["--prompt_name", "llava_v1", "--image_aspect_ratio", "pad"]
    load_recipe("eval/muffin_inference_logp.py").main(
        [*policy, "--data_path", str(tiny_rows_path), "--output_dir", str(scored), "--num_workers", "0"]
    )
    settings = ["--max_steps", str(STEPS), "--learning_rate", "1e-4", "--lr_scheduler_type", "constant", "--logging_steps", "1"]
    settings += ["--save_strategy", "no", "--disable_tqdm", "True", "--warmup_steps", "0", "--weight_decay", "0.01"]
    on_cpu = ["--tf32", "False", "--dataloader_num_workers", "0", "--report_to", "none"]
    words = [str(tiny_llava_path), str(scored), str(run), *settings, *on_cpu]

    first = slurm(tmp_path / "first.log", *words)
    wait_until(lambda: "{'loss'" in (tmp_path / "first.log").read_text() or first.poll() is not None, seconds=400)
    assert first.poll() is None, (tmp_path / "first.log").read_text()
    first.send_signal(signal.SIGUSR1)
    assert first.wait(timeout=120) != 0
    log = (tmp_path / "first.log").read_text()
    (saved,) = run.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 1 <= step < STEPS and f"SIGUSR1 at step {step} of {STEPS}: saved as {saved}" in log, log
    assert calls.read_text().split()[0] == "requeue"

    again = slurm(tmp_path / "again.log", *words)
    assert again.wait(timeout=400) == 0, (tmp_path / "again.log").read_text()
    assert calls.read_text().count("requeue") == 1 and (run / "model.safetensors").is_file()
    history = [entry for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in history] == list(range(1, STEPS + 1))
    alone = ["--data_path", str(scored), "--output_dir", str(tmp_path / "alone"), *settings, "--per_device_train_batch_size", "2"]
    expected = losses(load_recipe("train/dpo.py").main([*policy, *alone]))
    assert [entry["loss"] for entry in history] == pytest.approx(expected, abs=0.03)
    assert min(expected) < 0.5  # the losses move, so that they can differ


def wait_until(reached, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
