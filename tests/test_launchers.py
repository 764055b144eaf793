"""Launchers for several nodes through stand-ins: what Slurm and torchrun are told, and a job that is stopped before its time limit."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAND_INS = {
    "scontrol": 'echo "$@" >> "$RECORD/scontrol"\nif [ "$1" = show ]; then printf "node7\\nnode8\\n"; fi',
    "srun": "export SLURM_PROCID=5 SLURM_LOCALID=1\nexec \"$@\"",
    "torchrun": 'echo "$@" > "$RECORD/torchrun"',
    # training: notes what it was started with, and with WAIT=1 saves and exits on the signal, as muffin.checkpoints does
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" > "$RECORD/python"\n'
    'trap "touch $RECORD/saved; exit 138" USR1\nwhile [ "$WAIT" = 1 ]; do sleep 0.05; done',
}  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "42"}
    return {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(tmp_path), "WAIT": "0"}


def start(script: str, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([ROOT / "scripts" / "train" / script, "MODEL", "DATA", "OUTPUT", "--max_steps", "3"], cwd=ROOT, env=environment)


def test_slurm_gives_every_task_its_rank(environment, tmp_path):
    assert start("slurm.sh", environment).wait(60) == 0
    started = (tmp_path / "python").read_text()
    assert started.startswith("5 1 8 node7:29500 train/dpo.py --model_name_or_path MODEL --data_path DATA --output_dir OUTPUT")
    assert "--resume_from_checkpoint last --max_steps 3" in started
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_a_stopped_job_saves_and_is_queued_again(environment, tmp_path):
    job = start("slurm.sh", environment | {"WAIT": "1"})
    end = time.monotonic() + 60
    while not (tmp_path / "python").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)  # the stand-in sets its trap after it wrote
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 42"


def test_nodes_meet_at_the_master(environment, tmp_path):
    assert start("llava15_7b_full_nodes.sh", environment | {"NODES": "2", "GPUS": "4", "MASTER": "node0:29500"}).wait(60) == 0
    said = (tmp_path / "torchrun").read_text()
    assert said.startswith("--nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint node0:29500")
    assert "train/dpo.py --model_name_or_path MODEL" in said and said.rstrip().endswith("--max_steps 3")
