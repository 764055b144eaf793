"""Scored files hold what a plain loop over the stock model gives, whatever the batches, the kills and the number of processes."""

import io
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from muffin.packing import pack
from muffin.pairs import REFERENCE_COLUMNS, PreferenceDataset, RowError, load_preferences
from muffin.policies import Checkpoint, PolicyOptions, encode_pair, load_adapter, load_policy
from muffin.provenance import Numerics, foreign_rows
from muffin.scoring import (
    EncodedRow,
    RowStream,
    Scorer,
    ScoringRun,
    batch_by_tokens,
    begin,
    count_tokens,
    fingerprint,
    refuse_other_run,
    score_missing,
    scoring_order,
    summarize,
)
from muffin.shards import Shard, plan_shards
from tests.plain_logps import assert_scored_like

FP32 = Numerics("float32", None, None, "sdpa")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def adapter(tiny_llava_path):
    return load_adapter(Checkpoint(tiny_llava_path), PolicyOptions())


@pytest.fixture(scope="module")
def scorer(tiny_llava_path, adapter) -> Scorer:
    return Scorer(load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32).eval(), adapter, FP32)


@pytest.fixture(scope="module")
def dataset(tiny_rows_path) -> PreferenceDataset:
    return load_preferences(tiny_rows_path)


def score(scorer: Scorer, dataset: PreferenceDataset, output_dir: Path, *, shard_rows=5, bad_rows=(), batch_tokens=300, workers=0) -> int:
    """Score `dataset` into `output_dir`; returns the rows scored by this call."""
    output_dir.mkdir(exist_ok=True)
    rows = dataset.without_reference()
    run = ScoringRun(rows, dataset.table, output_dir, plan_shards(len(rows), shard_rows), frozenset(bad_rows), batch_tokens)
    with tqdm(total=len(rows), disable=True) as progress:
        return score_missing(run, scorer, RowStream(rows, scorer.adapter, "reference", workers), progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(scorer, dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert score(scorer, dataset, folder) == 24
    return folder


# --- the order of work


def test_plan_shards():
    assert plan_shards(5, 2) == [
        Shard("shard-00000-of-00003.parquet", 0, 2),
        Shard("shard-00001-of-00003.parquet", 2, 4),
        Shard("shard-00002-of-00003.parquet", 4, 5),
    ]
    assert plan_shards(4, 1000) == [Shard("shard-00000-of-00001.parquet", 0, 4)]
    with pytest.raises(ValueError, match="--shard_rows, got 4 and 0"):
        plan_shards(4, 0)


def test_rows_of_an_image_follow_each_other_and_those_of_a_question(dataset):
    shuffled = dataset.select(torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist())
    order = scoring_order(shuffled, range(4, 24))
    assert sorted(order) == list(range(4, 24))
    pairs = [shuffled[position] for position in order]

    def runs(names: list) -> int:
        return 1 + sum(one != other for one, other in zip(names, names[1:], strict=False))

    for names in ([pair.image_bytes for pair in pairs], [(pair.image_bytes, pair.question) for pair in pairs]):
        assert runs(names) == len(set(names)) < len(names)


def encoded_rows(dataset, adapter) -> list[EncodedRow]:
    return [EncodedRow(position, position, "key", encode_pair(adapter, dataset[position])) for position in range(len(dataset))]


def test_counted_tokens_bound_the_packed_ones(dataset, adapter):
    encoded = [row.encoded for row in encoded_rows(dataset, adapter)]
    padded = SimpleNamespace(spec=replace(adapter.spec, prefix_sharing=False), cat_vision=adapter.cat_vision)
    for count in (1, 2, 3, 8):
        shared_beginnings = sum(min(map(len, item.response_ids)) for item in encoded[:count])
        tokens = pack(encoded[:count], adapter).num_tokens
        assert tokens <= count_tokens(encoded[:count], adapter) <= tokens + shared_beginnings
        assert count_tokens(encoded[:count], padded) == pack(encoded[:count], padded).num_tokens


def test_batches_keep_the_budget_but_for_a_row_alone(dataset, adapter):
    rows = encoded_rows(dataset, adapter)
    batches = list(batch_by_tokens(rows, 400, adapter))
    assert [row for batch in batches for row in batch] == rows
    for batch, following in zip(batches, batches[1:], strict=False):
        tokens = count_tokens([row.encoded for row in batch], adapter)
        assert tokens <= 400 < count_tokens([row.encoded for row in [*batch, following[0]]], adapter)
    assert [len(batch) for batch in batch_by_tokens(rows, 1, adapter)] == [1] * 24


# --- the values


def test_stored_values_equal_a_plain_loop(undisturbed, tiny_llava_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_path, dtype=torch.float32).eval()
    assert_scored_like(model, tiny_llava_path, undisturbed, 24)


def test_real_photos_equal_a_plain_loop(samples, scorer, tiny_llava_path, tmp_path):
    photos = load_preferences(samples / "rlaifv_photos" / "photos_30.parquet")
    assert score(scorer, photos, tmp_path / "out", shard_rows=12, batch_tokens=2048) == 30
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_path, dtype=torch.float32).eval()
    assert_scored_like(model, tiny_llava_path, tmp_path / "out", 30)
    assert foreign_rows(load_preferences(tmp_path / "out"), "reference") == []


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_values_do_not_depend_on_the_batches(scorer, dataset, undisturbed, tmp_path, batch_tokens):
    score(scorer, dataset, tmp_path / "out", shard_rows=24, batch_tokens=batch_tokens)
    other, stored = load_preferences(tmp_path / "out").table, load_preferences(undisturbed).table
    for name in REFERENCE_COLUMNS:
        for ours, theirs in zip(other[name], stored[name], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5 if "token" in name else 0)


def test_an_image_is_encoded_once_per_batch(scorer, dataset, tmp_path):
    images = []
    patches = scorer.model.model.vision_tower.embeddings.patch_embedding
    handle = patches.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    score(scorer, dataset, tmp_path / "out", shard_rows=24, batch_tokens=100_000)
    handle.remove()
    assert images == [8]  # 24 rows on 8 images


def test_a_log_prob_that_is_not_finite_names_its_row(tiny_llava_path, adapter, dataset):
    model = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32).eval()
    rows = encoded_rows(dataset, adapter)
    token = int(rows[5].encoded.response_ids[1][0])
    first = next(row for row in rows if any(token in ids for ids in row.encoded.response_ids))
    with torch.no_grad():
        model.lm_head.weight[token] = float("nan")
    with pytest.raises(RowError, match=r"row \d+ \(idx \d+\): the log-prob of token 0 .* is nan") as raised:
        Scorer(model, adapter, FP32).score([first])
    assert raised.value.position == first.position


# --- the files


def test_columns_survive_and_load_as_images(undisturbed, dataset):
    table = datasets.load_dataset("parquet", data_files=[str(file) for file in sorted(undisturbed.glob("*.parquet"))], split="train")
    assert table.column_names == [*dataset.table.column_names, *REFERENCE_COLUMNS, "logps_key"]
    assert table.features["image"] == datasets.Image() and isinstance(table[0]["image"], Image.Image)
    originals = table.cast_column("image", datasets.Image(decode=False)).select_columns(dataset.table.column_names)
    assert originals.to_list() == dataset.table.to_list()
    schema = pq.read_schema(undisturbed / "shard-00000-of-00005.parquet")
    assert str(schema.field("ref_win_logp").type) == "double"
    assert schema.field("ref_rej_per_token_logp").type.value_type == "float"
    assert foreign_rows(load_preferences(undisturbed), "reference") == []


def test_stale_columns_are_replaced_and_extra_ones_kept(scorer, dataset, undisturbed, tmp_path):
    stale = load_preferences(undisturbed).table.add_column("logps", ["no JSON"] * 24).add_column("score", list(range(24)))
    for name in REFERENCE_COLUMNS:
        stale = stale.remove_columns(name).add_column(name, [[float("nan")] if "token" in name else float("nan")] * 24)
    assert score(scorer, PreferenceDataset(stale), tmp_path / "out") == 24
    scored = load_preferences(tmp_path / "out").table
    assert scored.column_names == [*dataset.table.column_names, "logps", "score", *REFERENCE_COLUMNS, "logps_key"]
    names = [*REFERENCE_COLUMNS, "logps_key"]
    assert scored.select_columns(names).to_list() == load_preferences(undisturbed).table.select_columns(names).to_list()


def test_bad_rows_are_left_out_and_repeated_ids_are_not(scorer, dataset, undisturbed, tmp_path):
    same_id = dataset.table.remove_columns("idx").add_column("idx", ["7"] * 24)
    repeated = PreferenceDataset(same_id.select([*range(24), 3, 3]))
    bad = [0, 2, *range(5, 10)]  # two of the first shard, all of the second
    assert score(scorer, repeated, tmp_path / "out", bad_rows=bad) == 26 - len(bad)
    assert pq.read_metadata(tmp_path / "out" / "shard-00001-of-00006.parquet").num_rows == 0
    scored = load_preferences(tmp_path / "out")
    good = [position for position in range(24) if position not in bad]
    assert scored.table["logps_key"][:] == load_preferences(undisturbed).select([*good, 3, 3]).table["logps_key"][:]


def test_a_row_that_cannot_be_encoded_is_named(scorer, dataset, tmp_path):
    rows = dataset.table.select(range(2)).to_list()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:60]
    broken = PreferenceDataset(datasets.Dataset.from_list(rows, features=dataset.table.features))
    with pytest.raises(RowError, match=r"^row 1 \(idx 1\): image does not decode"):
        score(scorer, broken, tmp_path / "out")
    stream = RowStream(broken, scorer.adapter, "reference", num_workers=1)  # as clear from a worker, without its traceback
    with pytest.raises(RowError, match=r"^row 1 \(idx 1\): image does not decode"):
        list(stream.rows([0, 1]))


def test_summary_is_the_mean_over_rows(scorer, dataset, undisturbed):
    run = ScoringRun(dataset, dataset.table, undisturbed, plan_shards(24, 5), frozenset(), 300)
    rows = load_preferences(undisturbed).table
    summary = summarize(run)
    assert summary.rows == 24
    assert summary.chosen_average_logp == pytest.approx(sum(rows["ref_win_avg_logp"]) / 24)
    assert summary.rejected_average_logp == pytest.approx(sum(rows["ref_rej_avg_logp"]) / 24)


# --- kills and several processes


def killed(action) -> None:
    """Run `action` in a forked process that is to die of SIGKILL."""
    process = FORK.Process(target=action)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


class DyingScorer(Scorer):
    """Kills its process at the `calls`-th batch."""

    def score(self, batch):
        deaths["calls"] -= 1
        if deaths["calls"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(batch)


deaths = {"calls": 0}


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_killed_while_scoring(scorer, dataset, undisturbed, tmp_path, calls):
    def action() -> None:
        deaths["calls"] = calls
        score(DyingScorer(scorer.model, scorer.adapter, FP32), dataset, tmp_path / "out")

    killed(action)
    finished = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("shard-*")}
    assert len(finished) < 5 and finished.items() <= contents(undisturbed).items()
    assert 0 < score(scorer, dataset, tmp_path / "out") <= 24
    assert contents(tmp_path / "out") == contents(undisturbed)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_while_writing(scorer, dataset, undisturbed, tmp_path, monkeypatch, moment):
    def action() -> None:
        monkeypatch.setattr(os, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        score(scorer, dataset, tmp_path / "out")

    killed(action)
    left = [file.name for file in (tmp_path / "out").iterdir()]
    assert len(left) == 2 and all(name.startswith(".shard-00000") for name in left)  # the lock and the partial file
    assert score(scorer, dataset, tmp_path / "out") == 24
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_a_finished_run_scores_nothing(scorer, dataset, undisturbed):
    before = {file: file.stat().st_mtime_ns for file in undisturbed.iterdir()}
    assert score(scorer, dataset, undisturbed) == 0
    assert {file: file.stat().st_mtime_ns for file in undisturbed.iterdir()} == before


class SlowScorer(Scorer):
    """Slow enough for several processes to meet."""

    def score(self, batch):
        time.sleep(0.1)
        return super().score(batch)


def test_processes_share_the_shards(scorer, dataset, undisturbed, tmp_path):
    results = FORK.Queue()
    slow = SlowScorer(scorer.model, scorer.adapter, FP32)
    processes = [FORK.Process(target=lambda: results.put(score(slow, dataset, tmp_path / "out"))) for _ in range(3)]
    for process in processes:
        process.start()
    scored = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert sum(scored) == 24 and scored[1] > 0  # nothing twice, work for more than one
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_whoever_waits_takes_over_the_shard_of_a_dead_process(scorer, dataset, undisturbed, tmp_path):
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    held = FORK.Event()

    def hold() -> None:
        with FileLock(output_dir / ".shard-00002-of-00005.lock"):
            held.set()
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)

    holder = FORK.Process(target=hold)
    holder.start()
    assert held.wait(30)
    assert score(scorer, dataset, output_dir) == 24
    holder.join(60)
    assert holder.exitcode == -signal.SIGKILL
    assert contents(output_dir) == contents(undisturbed)


# --- the manifest


@pytest.fixture
def manifest() -> dict:
    description = {
        "weights": "w",
        "tokenizer": "t",
        "encoding": {"prompt_name": "llava_v1"},
        "numerics": {"weights_dtype": "float32", "autocast_dtype": None, "bits": None, "attention": "sdpa"},
        "probe": "p",
        "environment": {"model": "m", "torch": "2.0"},
    }
    settings = {"batch_tokens": 8192, "max_rows": None}
    return {"reference_id": "r", "reference": description, "settings": settings, "input": {"a.parquet": "1"}, "left_out": []}


def test_the_same_run_may_go_on(manifest, tmp_path, caplog):
    refuse_other_run(tmp_path, manifest)  # nothing there yet
    begin(tmp_path, manifest)
    written = contents(tmp_path)
    assert list(written) == ["muffin_reference.json"]
    begin(tmp_path, manifest)
    assert not caplog.records
    newer = manifest["reference"] | {"environment": {"model": "m", "torch": "3.0"}}
    begin(tmp_path, manifest | {"reference": newer})
    assert "began with torch 2.0, now it is 3.0" in caplog.text
    assert contents(tmp_path) == written


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("settings", {"batch_tokens": 4096}, "batch_tokens: the run in this folder has 8192, this one 4096; mended by --batch_tokens 8192"),
        ("settings", {"max_rows": 9}, "max_rows: the run in this folder has None, this one 9; mended by leaving --max_rows out"),
        ("input", {"a.parquet": "2"}, "input file a.parquet has other content"),
        ("input", {"b.parquet": "2"}, "input file b.parquet is new"),
        ("reference", {"weights": "v"}, "weights: .*--model_name_or_path"),
        ("reference", {"encoding": {"prompt_name": "hf"}}, "--prompt_name llava_v1"),
    ],
)
def test_another_run_is_refused_by_name(manifest, tmp_path, part, change, named):
    begin(tmp_path, manifest)
    other = manifest | {part: manifest[part] | change}
    without_bad_rows = {name: value for name, value in other.items() if name != "left_out"}
    for check, current in ((begin, other), (refuse_other_run, without_bad_rows)):
        with pytest.raises(ValueError, match=named):
            check(tmp_path, current)


def test_other_bad_rows_are_refused(manifest, tmp_path):
    begin(tmp_path, manifest)
    with pytest.raises(ValueError, match=r"leaves out \[\], this one \[3\]"):
        begin(tmp_path, manifest | {"left_out": [3]})


def test_a_folder_with_other_data_is_refused(manifest, tmp_path):
    (tmp_path / "mine.parquet").touch()
    with pytest.raises(ValueError, match="already holds mine.parquet"):
        begin(tmp_path, manifest)
    assert [file.name for file in tmp_path.glob("*.*") if not file.name.startswith(".")] == ["mine.parquet"]


def test_fingerprint_is_by_content(dataset, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "b.parquet").write_bytes(b"x")
    (data / "a.parquet").write_bytes(b"")
    (data / "notes.txt").touch()
    digests = fingerprint(str(data), dataset, tmp_path / "cache")
    assert list(digests) == ["a.parquet", "b.parquet"]
    assert digests["a.parquet"].startswith("e3b0c44298fc1c14")  # sha256 of nothing
    assert fingerprint(str(data / "b.parquet"), dataset, tmp_path / "cache") == {"b.parquet": digests["b.parquet"]}


def test_image_of_one_pixel(scorer, dataset, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format="PNG")
    rows = dataset.table.select(range(2)).to_list()
    rows[0]["image"]["bytes"] = file.getvalue()
    assert score(scorer, PreferenceDataset(datasets.Dataset.from_list(rows, features=dataset.table.features)), tmp_path / "out") == 2
