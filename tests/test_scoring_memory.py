"""Memory of scoring does not grow with the rows: opening, pre-flight, scoring, summary and keys of a large data set with a tiny scorer."""

import io
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from muffin.pairs import ReferenceLogps, load_preferences
from muffin.policies.base import EncodedResponses, PolicySpec
from muffin.preflight import preflight
from muffin.provenance import foreign_rows
from muffin.scoring import EncodedRow, RowStream, Scorer, ScoringRun, fingerprint, score_missing, summarize
from muffin.shards import plan_shards

FORK = multiprocessing.get_context("fork")
RLAIFV_ROWS = 83_132


class PlainAdapter:
    """Two tokens a response, no vision: what is measured is the way of the rows."""

    spec = PolicySpec(prefix_sharing=True, frozen_modules=(), lora_targets="", quantization_skip=())
    model_max_length = 100

    def encode(self, image, question, responses) -> EncodedResponses:
        ids = (torch.tensor([1, 2]), torch.tensor([3, 4]))
        return EncodedResponses(torch.arange(8), ids, {"size": torch.tensor(image.size)}, question, torch.arange(8))

    def settings(self) -> dict:
        return {}


class ConstantScorer(Scorer):
    def score(self, batch: list[EncodedRow]) -> list[ReferenceLogps]:
        return [ReferenceLogps(-1.0, -0.5, [-0.5, -0.5], -3.0, -1.5, [-1.0, -2.0]) for _ in batch]


def write_folder(folder: Path, rows: int, image_bytes: int, rows_per_file: int = 5000) -> Path:
    """Parquet files whose images are all different: a PNG of one colour with bytes behind it that no reader looks at."""
    folder.mkdir()
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, "PNG")
    for start in range(0, rows, rows_per_file):
        numbers = range(start, min(start + rows_per_file, rows))
        images = [{"bytes": file.getvalue() + os.urandom(image_bytes), "path": f"{number}.png"} for number in numbers]
        texts = {"question": "What is it?", "chosen": "A red square.", "rejected": "A green dog."}
        table = pa.table({"image": images, **{name: [text] * len(numbers) for name, text in texts.items()}, "idx": list(numbers)})
        pq.write_table(table, folder / f"part-{start:06d}.parquet", row_group_size=100)
    return folder


def private_bytes() -> int:
    """Memory of this process that is no file of the page cache."""
    _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def score_all(data: Path, output_dir: Path, rows: int) -> None:
    output_dir.mkdir()
    dataset = load_preferences(data)
    fingerprint(str(data), dataset, output_dir / "hashes")
    adapter = PlainAdapter()
    plain = preflight(dataset.without_reference(), adapter, bad_rows="fail", report_path=output_dir / "bad_rows.json", num_workers=0)
    run = ScoringRun(plain, dataset.table, output_dir, plan_shards(rows, 500), frozenset(), 8192)
    with tqdm(disable=True) as progress:
        assert score_missing(run, ConstantScorer(None, adapter, None), RowStream(plain, adapter, "r", 0), progress) == rows
    assert summarize(run).rows == rows
    assert foreign_rows(load_preferences(output_dir), "r") == []


def peak(action, results) -> None:
    """Puts the largest growth of private memory during `action`."""
    start, highest, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, private_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.monotonic()
    try:
        action()
    finally:
        done.set()
        thread.join()
    results.put((highest, time.monotonic() - begin))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.slow  # three minutes; data much smaller than this does not fill the read-ahead of the files' readers
@pytest.mark.parametrize(("few", "many", "image_bytes"), [(10_000, RLAIFV_ROWS, 10_000)])
def test_memory_does_not_grow_with_the_rows(few, many, image_bytes, tmp_path):
    grown = []
    for rows in (few, many):
        data = write_folder(tmp_path / f"data-{rows}", rows, image_bytes)
        results = FORK.SimpleQueue()
        process = FORK.Process(target=peak, args=(lambda data=data, rows=rows: score_all(data, tmp_path / f"out-{rows}", rows), results))
        process.start()
        process.join(900)
        assert process.exitcode == 0
        growth, seconds = results.get()
        grown.append(growth)
        print(f"{rows} rows of {image_bytes} bytes: at most {growth / 1e6:.0f} MB more, {seconds:.0f} s")
    assert grown[1] - grown[0] < (many - few) * image_bytes / 5
