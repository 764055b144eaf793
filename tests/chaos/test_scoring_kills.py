"""Scoring by one to three processes that are killed at random: the files end as those of an undisturbed run, byte for byte."""

import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.chaos.kills import kill_until_done, wait_for

FILES = "*.parquet", "*.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for pattern in FILES for file in folder.glob(pattern)}


@pytest.mark.parametrize("workers", [0, 2])
def test_files_equal_those_of_an_undisturbed_run(starter, chaos, rng, workers, tiny_llava_path, tiny_rows_path, tmp_path):
    def start(output_dir: Path):
        flags = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(tiny_rows_path), "--output_dir", str(output_dir)]
        flags += ["--dtype", "float32", "--shard_rows", "2", "--batch_tokens", "300", "--num_workers", str(workers)]
        return starter("eval/muffin_inference_logp.py", flags)

    begin = time.monotonic()
    assert wait_for(start(tmp_path / "whole")()) == 0
    life = time.monotonic() - begin
    whole = contents(tmp_path / "whole")
    shards = [name for name in whole if name.startswith("shard-")]
    assert len(shards) == 12
    ids = [idx for name in sorted(shards) for idx in pq.read_table(tmp_path / "whole" / name, columns=["idx"])["idx"].to_pylist()]
    assert ids == [str(number) for number in range(24)]  # none lost, none doubled

    wanted, killed, runs = (25 if chaos else 3), 0, 0
    while killed < wanted:
        output_dir = tmp_path / f"killed-{runs}"
        killed += kill_until_done(start(output_dir), rng=rng, kills=wanted - killed, longest_life=life, most_processes=3)
        runs += 1
        assert contents(output_dir) == whole
        left = [file.name for file in output_dir.iterdir() if file.name.startswith((".shard", ".muffin"))]
        assert not left, "partial files of killed processes"
    print(f"{killed} kills over {runs} runs of {life:.1f} s each")
