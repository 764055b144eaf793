"""Long work on a table, written as Parquet shards: any number of processes may work on one folder, and a killed run continues.

    rows 0..999 --plan_shards--> Shard --make_table, whoever gets its lock--> shard-00000-of-00012.parquet

Shards are cut by row position and each is a function of its own rows, so the files do not depend on who wrote which. A process takes
the next shard that nobody holds; a lock dies with its process. A manifest beside the shards says what they were made with, and a run
with other settings is refused.
"""

import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch.utils.data
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader
from tqdm import tqdm

from muffin.provenance import differing, write_atomically

logger = logging.getLogger(__name__)

ROWS_PER_ROW_GROUP = 100  # some 10 MB with images: what a reader of one row has to load
IMAGES_PER_ROW_GROUP_BYTES = 64 << 20  # images that rows of a group share are stored once up to this size

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shard:
    """Input rows [start, stop); a file may hold fewer rows (bad ones left out) or more (several answers of a prompt)."""

    name: str
    start: int
    stop: int


def plan_shards(rows: int, shard_rows: int) -> list[Shard]:
    """Shards of `shard_rows` consecutive rows, the last one shorter. Raises ValueError when there would be none."""
    if rows < 1 or shard_rows < 1:
        raise ValueError(f"this needs at least one row in the data and in --shard_rows, got {rows} and {shard_rows}")
    starts = range(0, rows, shard_rows)
    return [
        Shard(f"shard-{number:05d}-of-{len(starts):05d}.parquet", start, min(start + shard_rows, rows))
        for number, start in enumerate(starts)
    ]


@dataclass(frozen=True)
class ShardFolder:
    """The shards of one run and the folder they go to."""

    path: Path
    shards: Sequence[Shard]

    def missing(self) -> list[Shard]:
        """Shards that are not there yet, in order."""
        return [shard for shard in self.shards if not (self.path / shard.name).exists()]

    def finished_rows(self) -> int:
        """Input rows of the shards that are there."""
        return self.shards[-1].stop - sum(shard.stop - shard.start for shard in self.missing())


def write_missing(folder: ShardFolder, make_table: Callable[[Shard], pa.Table], progress: tqdm) -> list[Shard]:
    """Write every shard that is missing and not held by another process, then wait for the held ones; returns those written here.

    A process that dies gives its shard back, and whoever waits takes it. `progress` counts the input rows of finished shards, whoever
    made them; `make_table` may add its own. Start worker processes before: one that is forked while a lock is held keeps it.
    """
    written = []
    for wait in (False, True):
        for shard in folder.missing():
            progress.n = folder.finished_rows()
            progress.refresh()
            try:
                with FileLock(folder.path / f".{Path(shard.name).stem}.lock", blocking=wait):
                    if not (folder.path / shard.name).exists():
                        write_table(make_table(shard), folder.path / shard.name)
                        written.append(shard)
            except Timeout:
                continue
    progress.n = folder.finished_rows()
    progress.refresh()
    # Locks, and partial files of killed processes: every shard is there, nobody needs them.
    for leftover in folder.path.glob(".shard-*"):
        leftover.unlink(missing_ok=True)
    return written


def write_table(table: pa.Table, path: Path) -> None:
    """Parquet through a temporary file: after a crash the whole file is there or none. Equal tables give equal bytes."""
    partial = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}")
    with open(partial, "wb") as stream:
        with pq.ParquetWriter(stream, table.schema, compression="snappy", dictionary_pagesize_limit=IMAGES_PER_ROW_GROUP_BYTES) as writer:
            if len(table):  # `datasets` cannot read a row group without rows
                writer.write_table(table, row_group_size=ROWS_PER_ROW_GROUP)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def with_columns(
    table: datasets.Dataset, positions: Sequence[int], features: datasets.Features, columns: dict[str, Sequence[Any]]
) -> pa.Table:
    """Rows of `table` at `positions` (a position may repeat), with `columns` of the given features added or put in place of old ones."""
    kept = {name: decoded_feature(feature) for name, feature in table.features.items() if name not in features}
    schema = datasets.Features(kept | features).arrow_schema
    rows = table.with_format("arrow")[list(positions)].select(list(kept))
    for name in features:
        rows = rows.append_column(schema.field(name), pa.array(columns[name], type=schema.field(name).type))
    return rows.replace_schema_metadata(schema.metadata)


def decoded_feature(feature: Any) -> Any:
    """`feature` with images marked for decoding, as readers of the written file expect; muffin itself opens them undecoded."""
    if isinstance(feature, datasets.Image):
        return datasets.Image()
    if isinstance(feature, datasets.List):
        return datasets.List(decoded_feature(feature.feature), length=feature.length)
    return feature


def begin_run(folder: Path, manifest_name: str, manifest: dict[str, Any]) -> None:
    """Write the manifest (JSON values), or check that the run that `folder` holds is this one.

    Entries called `environment` (package versions, device) may differ and are only warned about.
    Raises ValueError naming every other difference, or when the folder holds Parquet files of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, lock = folder / manifest_name, folder / ".begin.lock"
    with FileLock(lock):
        if file.exists():
            _refuse_other_run(file, manifest)
        elif found := sorted(path.name for path in folder.glob("*.parquet")):
            raise ValueError(f"--output_dir {folder} already holds {found[0]}, which this command did not write; give an empty folder")
        else:
            write_atomically(file, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
        lock.unlink(missing_ok=True)


def _refuse_other_run(file: Path, manifest: dict[str, Any]) -> None:
    lines = []
    for name, then, now in differing(dict(_flat(json.loads(file.read_text()))), dict(_flat(manifest))):
        if "environment" in name.split("."):
            logger.warning("the run in %s began with %s %s, now it is %s; what remains may differ a little", file.parent, name, then, now)
        else:
            lines.append(f"  - {name}: the run in this folder has {then}, this one {now}")
    if lines:
        differences = "\n".join(lines)
        raise ValueError(
            f"--output_dir {file.parent} holds another run:\n{differences}\nResume with its settings, or give an empty --output_dir."
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dicts as ("outer.inner", value)."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{name}.{key}" if name else key)


class WorkStream(Generic[Item, Result]):
    """Runs `work` on items in worker processes that live as long as the stream; results come in the order of the items.

    work and items travel to the processes pickled. An error that it raises arrives wrapped in the worker's traceback: return those that
    belong to an item.
    """

    def __init__(self, work: Callable[[Item], Result], num_workers: int) -> None:
        self._items: list[Item] = []
        self._loader = DataLoader(
            _Work(work),
            batch_size=None,
            sampler=self._items,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_identity,
        )
        for _ in self.results(()):  # starts the workers now: one that is forked later would inherit locks
            pass

    def results(self, items: Iterable[Item]) -> Iterator[Result]:
        """The results of `items`, in their order."""
        self._items[:] = items
        yield from self._loader


class _Work(torch.utils.data.Dataset):
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __getitem__(self, item: Any) -> Any:
        return self.work(item)


def _identity(result: Result) -> Result:
    return result
