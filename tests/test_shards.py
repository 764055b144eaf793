"""Sharded work ends with the same files whatever interrupts it, and a folder of another run is refused."""

import json
import multiprocessing
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from tqdm import tqdm

from muffin.shards import Shard, ShardFolder, WorkStream, begin_run, plan_shards, with_columns, write_missing, write_table

FORK = multiprocessing.get_context("fork")


def numbers(shard: Shard) -> pa.Table:
    return pa.table({"number": list(range(shard.start, shard.stop))})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_plan():
    assert plan_shards(5, 2) == [
        Shard("shard-00000-of-00003.parquet", 0, 2),
        Shard("shard-00001-of-00003.parquet", 2, 4),
        Shard("shard-00002-of-00003.parquet", 4, 5),
    ]
    with pytest.raises(ValueError, match="--shard_rows, got 4 and 0"):
        plan_shards(4, 0)


def test_missing_shards_are_written_and_nothing_else_is_left(tmp_path):
    folder = ShardFolder(tmp_path, plan_shards(5, 2))
    with tqdm(total=5, disable=True) as progress:
        assert write_missing(folder, numbers, progress) == folder.shards
        assert progress.n == 5
    whole = contents(tmp_path)
    assert sorted(whole) == [shard.name for shard in folder.shards]
    assert pq.read_table(tmp_path).column("number").to_pylist() == [0, 1, 2, 3, 4]

    (tmp_path / "shard-00001-of-00003.parquet").unlink()
    (tmp_path / ".shard-00001-of-00003.parquet.host-1").write_text("left by a killed process")
    assert (folder.missing(), folder.finished_rows()) == ([folder.shards[1]], 3)
    with tqdm(disable=True) as progress:
        assert write_missing(folder, numbers, progress) == [folder.shards[1]]
    assert contents(tmp_path) == whole


def test_a_shard_that_fails_is_not_there(tmp_path):
    folder = ShardFolder(tmp_path, plan_shards(4, 2))

    def fails_at_two(shard: Shard) -> pa.Table:
        if shard.start == 2:
            raise RuntimeError("killed")
        return numbers(shard)

    with tqdm(disable=True) as progress, pytest.raises(RuntimeError, match="killed"):
        write_missing(folder, fails_at_two, progress)
    assert folder.missing() == [folder.shards[1]]


def write_from_another_process(path: Path, pipe) -> None:
    with FileLock(path / ".shard-00000-of-00002.lock"):
        pipe.send("held")
        pipe.recv()
        write_table(numbers(Shard("", 0, 2)), path / "shard-00000-of-00002.parquet")


def test_a_held_shard_is_left_to_its_holder(tmp_path):
    folder = ShardFolder(tmp_path, plan_shards(4, 2))
    here, there = FORK.Pipe()
    holder = FORK.Process(target=write_from_another_process, args=(tmp_path, there))
    holder.start()
    assert here.recv() == "held"

    def second_then_release(shard: Shard) -> pa.Table:
        assert shard.start == 2, "the first is held"
        here.send("go on")
        return numbers(shard)

    with tqdm(disable=True) as progress:
        assert write_missing(folder, second_then_release, progress) == [folder.shards[1]]
    holder.join(10)
    assert not folder.missing()


def test_columns_are_added_replaced_and_rows_repeated(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "score": datasets.Value("int64"), "text": datasets.Value("string")}
    )
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": bytes([n]) * 50_000, "path": None}, "score": n, "text": str(n)} for n in range(3)], features=features
    )
    new = datasets.Features({"score": datasets.Value("float64"), "claims": datasets.List(datasets.Value("string"))})
    made = with_columns(table, [2, 2, 0], new, {"score": [0.5, None, 1.5], "claims": [["a"], [], ["b", "c"]]})
    write_table(made, tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 150_000, "an image that rows share is stored once"
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train", cache_dir=str(tmp_path))
    assert loaded.features == datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")} | new)
    rows = loaded.cast_column("image", datasets.Image(decode=False)).to_list()
    assert [(row["text"], row["score"], row["claims"], row["image"]["bytes"][0]) for row in rows] == [
        ("2", 0.5, ["a"], 2),
        ("2", None, [], 2),
        ("0", 1.5, ["b", "c"], 0),
    ]


def test_another_run_is_refused(tmp_path, caplog):
    manifest = {"policy": {"weights": "a", "environment": {"torch": "1"}}, "settings": {"seed": 0, "names": ["x"]}}
    begin_run(tmp_path / "run", "m.json", manifest)
    assert json.loads((tmp_path / "run" / "m.json").read_text()) == manifest
    newer = manifest | {"policy": {"weights": "a", "environment": {"torch": "2"}}}
    begin_run(tmp_path / "run", "m.json", newer)
    assert "policy.environment.torch 1, now it is 2" in caplog.text
    other = {"policy": {"weights": "b", "environment": {"torch": "1"}}, "settings": {"seed": 0, "names": ["x", "y"]}}
    with pytest.raises(ValueError, match="holds another run") as error:
        begin_run(tmp_path / "run", "m.json", other)
    assert str(error.value).splitlines()[1:3] == [
        "  - policy.weights: the run in this folder has a, this one b",
        "  - settings.names: the run in this folder has ['x'], this one ['x', 'y']",
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.parquet").touch()
    with pytest.raises(ValueError, match="already holds mine.parquet"):
        begin_run(tmp_path / "data", "m.json", manifest)


def square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("workers", [0, 2])
def test_work_stream(workers):
    stream = WorkStream(square, workers)
    assert list(stream.results(range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert list(stream.results([3, 1])) == [9, 1]
    assert list(stream.results([])) == []
