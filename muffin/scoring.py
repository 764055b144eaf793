"""Reference log-probs of a data set: the log-probs of chosen and rejected under the policy as it is before training.

    rows 0..999 --scoring_order--> by image --encode, in workers--> EncodedRow --token budget--> PackedBatch --response_logps--> shard file

The order of work inside a shard is free, so rows of one image stand in one batch (the image is encoded once, an equal prompt is computed
once); shards are cut by row position and each is a function of its own rows. Any number of processes may work on one output folder, at
once or one after the other: a process takes the next shard that nobody holds, and a lock dies with its process.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from muffin.logps import response_logps
from muffin.packing import pack
from muffin.pairs import REFERENCE_COLUMNS, PreferenceDataset, ReferenceLogps, RowError
from muffin.policies.base import EncodedResponses, PolicyAdapter, encode_pair
from muffin.provenance import (
    REFERENCE_FILE,
    Numerics,
    differing,
    environment_differences,
    explain_difference,
    hash_files,
    logps_key,
    write_atomically,
)
from muffin.shards import Shard, ShardFolder, WorkStream, with_columns, write_missing

logger = logging.getLogger(__name__)

KEY_COLUMN = "logps_key"

# Sums and averages are float64 sums of the float32 per-token values, so their order of addition never varies.
_STORED_FEATURES = datasets.Features(
    {
        name: datasets.List(datasets.Value("float32")) if name.endswith("per_token_logp") else datasets.Value("float64")
        for name in REFERENCE_COLUMNS
    }
    | {KEY_COLUMN: datasets.Value("string")}
)


def scoring_order(dataset: PreferenceDataset, positions: Iterable[int]) -> list[int]:
    """Positions by image, then question, then length of text (a stand-in for tokens), the image with the longest row first."""
    rows: dict[int, tuple[bytes, str, int]] = {}
    longest: dict[bytes, int] = {}
    for position in positions:
        pair = dataset[position]
        image = hashlib.blake2b(pair.image_bytes, digest_size=16).digest()
        length = len(pair.question) + len(pair.chosen) + len(pair.rejected)
        rows[position] = (image, pair.question, length)
        longest[image] = max(longest.get(image, 0), length)

    def key(position: int) -> tuple:
        image, question, length = rows[position]
        return -longest[image], image, question, length, position

    return sorted(rows, key=key)


@dataclass(frozen=True)
class EncodedRow:
    """A row ready for packing, with the key that its log-probs will carry."""

    position: int
    idx: int | str
    key: str
    encoded: EncodedResponses


@dataclass(frozen=True)
class _RowEncoder:
    """position -> EncodedRow, in worker processes. A RowError is returned: raised, it would arrive wrapped in the worker's traceback."""

    dataset: PreferenceDataset
    adapter: PolicyAdapter
    reference_id: str

    def __call__(self, position: int) -> EncodedRow | RowError:
        try:
            pair = self.dataset[position]
        except RowError as error:
            return error
        try:
            encoded = encode_pair(self.adapter, pair)
        except ValueError as error:
            return RowError(position, pair.idx, str(error))
        key = logps_key(self.reference_id, pair.image_bytes, pair.question, pair.chosen, pair.rejected)
        return EncodedRow(position, pair.idx, key, encoded)


class RowStream:
    """Encodes rows in worker processes that live as long as the stream; `rows(positions)` yields them in that order."""

    def __init__(self, dataset: PreferenceDataset, adapter: PolicyAdapter, reference_id: str, num_workers: int) -> None:
        self._stream = WorkStream(_RowEncoder(dataset, adapter, reference_id), num_workers)

    def rows(self, positions: Sequence[int]) -> Iterator[EncodedRow]:
        """Raises RowError for a row that cannot be encoded."""
        for row in self._stream.results(positions):
            if isinstance(row, RowError):
                raise RowError(row.position, row.idx, row.reason)  # not `row`: its traceback would hold this frame, and so the workers
            yield row


def count_tokens(encoded: Sequence[EncodedResponses], adapter: PolicyAdapter) -> int:
    """Upper bound of `pack(encoded, adapter).num_tokens`: equal prompts count once, shared beginnings of answers once per answer."""
    inputs = [len(item.prompt_ids) + len(response) - 1 for item in encoded for response in item.response_ids]
    if not adapter.spec.prefix_sharing:
        return max(inputs) * len(inputs)
    prompts = {(item.vision_key, tuple(item.prompt_ids.tolist())) for item in encoded}
    return sum(len(ids) for _, ids in prompts) + sum(len(response) - 1 for item in encoded for response in item.response_ids)


class HasEncoded(Protocol):
    """Anything that holds an encoded prompt with its responses."""

    @property
    def encoded(self) -> EncodedResponses:
        """The prompt and its responses."""
        ...


Row = TypeVar("Row", bound=HasEncoded)


def batch_by_tokens(rows: Iterable[Row], batch_tokens: int, adapter: PolicyAdapter) -> Iterator[list[Row]]:
    """Consecutive rows, as many as fit into `batch_tokens` positions but always at least one."""
    batch: list[Row] = []
    for row in rows:
        if batch and count_tokens([item.encoded for item in [*batch, row]], adapter) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@dataclass(frozen=True)
class Scorer:
    """A policy as it is before training: `score(batch)` gives the reference log-probs of a batch's rows."""

    model: nn.Module
    adapter: PolicyAdapter
    numerics: Numerics

    def score(self, batch: Sequence[EncodedRow]) -> list[ReferenceLogps]:
        """One forward. Raises RowError for a log-prob that is not finite."""
        packed = pack([row.encoded for row in batch], self.adapter)
        device = next(self.model.parameters()).device
        with torch.no_grad(), self.numerics.autocast(device.type):
            token_logps = response_logps(self.model, packed.to(device)).token_logps
        responses = token_logps.float().cpu().split(packed.lengths.tolist())
        scored = []
        for row, chosen, rejected in zip(batch, responses[0::2], responses[1::2], strict=True):
            _check_finite(row, "chosen", chosen)
            _check_finite(row, "rejected", rejected)
            scored.append(ReferenceLogps(*_stored_form(chosen), *_stored_form(rejected)))
        return scored


def _check_finite(row: EncodedRow, answer: str, token_logps: Tensor) -> None:
    broken = (~token_logps.isfinite()).nonzero()
    if len(broken):
        at = int(broken[0])
        reason = (
            f"the log-prob of token {at} of the {len(token_logps)} of its {answer} answer is {float(token_logps[at])}, want a finite number"
        )
        raise RowError(row.position, row.idx, f"{reason}; check the weights for NaN, or score with --dtype float32")


def _stored_form(token_logps: Tensor) -> tuple[float, float, list[float]]:
    total = float(token_logps.double().sum())
    return total, total / len(token_logps), token_logps.tolist()


@dataclass(frozen=True)
class ScoringRun:
    """A data set on its way into the shards of one folder.

    rows: what is scored; table: the same rows with all columns, which is what is written; bad_rows: positions that are left out.
    """

    rows: PreferenceDataset
    table: datasets.Dataset
    output_dir: Path
    shards: Sequence[Shard]
    bad_rows: frozenset[int]
    batch_tokens: int

    @property
    def folder(self) -> ShardFolder:
        """The run's shards and where they go."""
        return ShardFolder(self.output_dir, self.shards)

    def missing(self) -> list[Shard]:
        """Shards that nobody has written yet."""
        return self.folder.missing()

    def finished_rows(self) -> int:
        """Input rows of the shards that are there."""
        return self.folder.finished_rows()

    def good_rows(self, shard: Shard) -> list[int]:
        """Positions of a shard's rows that can be scored."""
        return [position for position in range(shard.start, shard.stop) if position not in self.bad_rows]


def score_missing(run: ScoringRun, scorer: Scorer, stream: RowStream, progress: tqdm) -> int:
    """Score every shard that is missing and not held by another process, then wait for the held ones; returns the rows scored here."""
    written = write_missing(run.folder, lambda shard: _scored_shard(run, shard, scorer, stream, progress), progress)
    return sum(len(run.good_rows(shard)) for shard in written)


def _scored_shard(run: ScoringRun, shard: Shard, scorer: Scorer, stream: RowStream, progress: tqdm) -> pa.Table:
    positions = run.good_rows(shard)
    rows = stream.rows(scoring_order(run.rows, positions))
    results: dict[int, tuple[ReferenceLogps, str]] = {}
    for batch in batch_by_tokens(rows, run.batch_tokens, scorer.adapter):
        for row, logps in zip(batch, scorer.score(batch), strict=True):
            results[row.position] = (logps, row.key)
        progress.update(len(batch))
    return scored_table(run.table, positions, results)


def scored_table(table: datasets.Dataset, positions: Sequence[int], results: dict[int, tuple[ReferenceLogps, str]]) -> pa.Table:
    """The rows as they came in, with `results` (position -> log-probs and key) in place of what muffin had stored before."""
    stored = [asdict(results[position][0]) | {KEY_COLUMN: results[position][1]} for position in positions]
    return with_columns(table, positions, _STORED_FEATURES, {name: [row[name] for row in stored] for name in _STORED_FEATURES})


def fingerprint(data_path: str, dataset: PreferenceDataset, cache_dir: Path | None = None) -> dict[str, str]:
    """File name -> sha256 of the data at `data_path`. Images that rows name by path are not in it: each row's key covers its own."""
    path = Path(data_path)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for pattern in ("*.parquet", "*.arrow") for file in path.glob(pattern) if not file.name.startswith("."))
    else:
        files = [Path(entry["filename"]) for entry in dataset.table.cache_files]
    return dict(zip((file.name for file in files), hash_files(files, cache_dir), strict=True))


def begin(output_dir: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest `muffin_reference.json`, or check that the run that `output_dir` holds is this one.

    manifest: reference_id, reference (its description), settings (flag -> value, of those that decide the files' bytes),
        input (file name -> sha256), left_out (positions of bad rows).
    Raises ValueError naming every difference, or when the folder holds Parquet files of something else.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = output_dir / ".begin.lock"
    with FileLock(lock):
        if (output_dir / REFERENCE_FILE).exists():
            refuse_other_run(output_dir, manifest)
        elif found := sorted(path.name for path in output_dir.glob("*.parquet")):
            raise ValueError(f"--output_dir {output_dir} already holds {found[0]}, which this command did not write; give an empty folder")
        else:
            write_atomically(output_dir / REFERENCE_FILE, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
        lock.unlink(missing_ok=True)


def refuse_other_run(output_dir: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError naming every difference between `manifest`, or a part of it, and the run that `output_dir` holds, if any."""
    file = output_dir / REFERENCE_FILE
    if not file.exists():
        return
    stored = json.loads(file.read_text())
    lines = explain_difference(stored["reference"], manifest["reference"])
    for name, then, now in differing(stored["settings"], manifest["settings"]):
        mend = f"leaving --{name} out" if then is None else f"--{name} {then}"
        lines.append(f"{name}: the run in this folder has {then}, this one {now}; mended by {mend}")
    for name, then, now in differing(stored["input"], manifest["input"]):
        what = "is new" if then is None else "is gone" if now is None else "has other content"
        lines.append(f"input file {name} {what}; mended by the --data_path that the run began with")
    if manifest.get("left_out", stored["left_out"]) != stored["left_out"]:
        lines.append(
            f"bad rows: the run in this folder leaves out {stored['left_out']}, this one {manifest['left_out']}; images were changed"
        )
    if lines:
        differences = "\n".join(f"  - {line}" for line in lines)
        raise ValueError(
            f"--output_dir {output_dir} holds another run:\n{differences}\nResume with its settings, or give an empty --output_dir."
        )
    for name, then, now in environment_differences(stored["reference"], manifest["reference"]):
        logger.warning(
            "the run in %s began with %s %s, now it is %s; its remaining shards may differ in the last digits", output_dir, name, then, now
        )


@dataclass(frozen=True)
class ScoringSummary:
    """Of all shards: rows, and mean log-prob per token over the answers, in nats."""

    rows: int
    chosen_average_logp: float
    rejected_average_logp: float


def summarize(run: ScoringRun) -> ScoringSummary:
    """Read back what all processes wrote. Raises ValueError when no row is left."""
    rows, chosen, rejected = 0, 0.0, 0.0
    for shard in run.shards:
        table = pq.read_table(run.output_dir / shard.name, columns=["ref_win_avg_logp", "ref_rej_avg_logp"])
        rows += len(table)
        chosen += sum(table["ref_win_avg_logp"].to_pylist())
        rejected += sum(table["ref_rej_avg_logp"].to_pylist())
    if rows == 0:
        raise ValueError(f"{run.output_dir} holds no row: every row of the input is bad, see bad_rows.json there")
    return ScoringSummary(rows, chosen / rows, rejected / rows)
