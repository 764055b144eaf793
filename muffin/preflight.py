"""Pre-flight: every row is read, decoded and encoded once before the first step, so that a bad one costs minutes and not a run.

Rows are checked in worker processes; a row that kills its worker, or never comes back, is a bad row like any other. The outcome is
kept beside the output and used again for the same data and settings.
"""

import hashlib
import json
import logging
import os
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from muffin import __version__
from muffin.pairs import PreferenceDataset, RowError
from muffin.policies.base import PolicyAdapter, encode_pair

logger = logging.getLogger(__name__)

ROW_TIMEOUT_S = 120  # seconds without a result; the largest image that Pillow accepts takes a few
TABLE_ROWS = 20
IDLE = -1


def preflight(
    dataset: PreferenceDataset,
    adapter: PolicyAdapter,
    *,
    bad_rows: Literal["fail", "skip"],
    report_path: Path,
    num_workers: int,
    skip_positions: Sequence[int] = (),
) -> PreferenceDataset:
    """Check the rows of `dataset` and return those that can be used.

    bad_rows: "fail" stops at bad rows, after all have been checked; "skip" leaves them out.
    report_path: JSON file with the bad rows. When it is there for the same data and settings, only its bad rows are checked again,
        since the images they name may have been mended.
    skip_positions: rows known to be good (their logps_key matched, so they have been scored).
    Raises ValueError with a table of bad rows under "fail", and when no row is left under "skip".
    """
    if bad_rows not in ("fail", "skip"):
        raise ValueError(f"--bad_rows {bad_rows}: want fail or skip")
    key = _report_key(dataset, adapter, skip_positions)
    positions = _reported_positions(report_path, key)
    if positions is None:
        known_good = set(skip_positions)
        positions = [position for position in range(len(dataset)) if position not in known_good]
    faults = check_rows(dataset, adapter, num_workers=num_workers, positions=positions)
    _write_report(report_path, key, faults)
    if faults and bad_rows == "fail":
        raise ValueError(
            f"{_table(faults, len(dataset))}\nAll of them: {report_path}. Mend these rows, or leave them out with --bad_rows skip"
        )
    if faults:
        logger.warning("left out by --bad_rows skip: %s\nAll of them: %s", _table(faults, len(dataset)), report_path)
    bad = {fault.position for fault in faults}
    good = [position for position in range(len(dataset)) if position not in bad]
    if not good:
        raise ValueError(f"no row is left of {len(dataset)}: {_table(faults, len(dataset))}")
    return dataset.select(good) if bad else dataset


def check_rows(
    dataset: PreferenceDataset, adapter: PolicyAdapter, *, num_workers: int, positions: Iterable[int] | None = None
) -> list[RowError]:
    """Read and encode the rows at `positions` (default: all) and say what is wrong with the bad ones, in order of position.

    num_workers: worker processes; with 0 the rows are checked in this process, which a row can then take down with it.
    Raises RuntimeError when a worker dies without a row in hand. Errors of the program itself pass, with the row noted.
    """
    todo = list(range(len(dataset)) if positions is None else positions)
    faults: list[RowError] = []
    with tqdm(total=len(todo), desc="pre-flight", unit="row") as progress:
        while todo:
            results, suspects = _check_until_crash(dataset, adapter, todo, num_workers, progress)
            faults += filter(None, results)
            for suspect in suspects:  # each alone, to tell the row that killed its worker from those that were on the way beside it
                results_alone, crashed = _check_until_crash(dataset, adapter, [suspect], 1, progress)
                faults += filter(None, results_alone)
                if crashed:
                    reason = f"killed the process that read and encoded it, or took longer than {ROW_TIMEOUT_S} s"
                    faults.append(RowError(suspect, _idx(dataset, suspect), reason))
                    progress.update()
            todo = [position for position in todo[len(results) :] if position not in suspects]
    return sorted(faults, key=lambda fault: fault.position)


def _check_until_crash(
    dataset: PreferenceDataset, adapter: PolicyAdapter, positions: list[int], num_workers: int, progress: tqdm
) -> tuple[list[RowError | None], list[int]]:
    """Results of the leading `positions`, and the unfinished rows that workers held when one of them died (none when all are through)."""
    num_workers = min(num_workers, len(positions))
    in_hand = torch.full((max(num_workers, 1),), IDLE).share_memory_()
    rows = DataLoader(
        _RowCheck(dataset, adapter, in_hand),
        batch_size=None,
        sampler=positions,
        num_workers=num_workers,
        timeout=ROW_TIMEOUT_S if num_workers else 0,
    )
    results: list[RowError | None] = []
    try:
        for result in rows:
            results.append(result)
            progress.update()
    except RuntimeError as error:
        # Lets go of the loader (a reference cycle in torch would keep it), which ends its workers, the living ones after their present row.
        traceback.clear_frames(error.__traceback__)
        held = set(in_hand.tolist())
        suspects = [position for position in positions[len(results) :] if position in held]
        if not suspects:
            raise
        logger.warning("pre-flight: %s; the rows on the way were %s, checking each alone", error, suspects)
        return results, suspects
    return results, []


class _RowCheck(Dataset):
    """position -> what is wrong with the row, or None.

    in_hand: (workers,) shared memory: the row that each worker is at, IDLE between rows.
    """

    def __init__(self, dataset: PreferenceDataset, adapter: PolicyAdapter, in_hand: Tensor) -> None:
        self.dataset = dataset
        self.adapter = adapter
        self.in_hand = in_hand

    def __getitem__(self, position: int) -> RowError | None:
        idx: int | str = position
        with _Holding(self.in_hand, position):
            try:
                pair = self.dataset[position]
                idx = pair.idx
                encode_pair(self.adapter, pair)
            except RowError as error:
                return error
            except (ValueError, OSError) as error:
                return RowError(position, idx, str(error))
        return None


class _Holding:
    """Marks a row as in hand, so that the parent process can name it when this one dies."""

    def __init__(self, in_hand: Tensor, position: int) -> None:
        worker = get_worker_info()
        self.in_hand = in_hand
        self.slot = worker.id if worker else 0
        self.position = position

    def __enter__(self) -> None:
        self.in_hand[self.slot] = self.position

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            error.add_note(f"while checking row {self.position}")
        self.in_hand[self.slot] = IDLE


def _idx(dataset: PreferenceDataset, position: int) -> int | str:
    try:
        return dataset[position].idx
    except RowError as error:
        return error.idx


def _report_key(dataset: PreferenceDataset, adapter: PolicyAdapter, skip_positions: Sequence[int]) -> str:
    checked = [__version__, dataset.fingerprint, adapter.settings(), sorted(skip_positions)]
    return hashlib.sha256(json.dumps(checked, sort_keys=True).encode()).hexdigest()


def _reported_positions(report_path: Path, key: str) -> list[int] | None:
    """Bad rows of an earlier check of the same rows under the same settings; None when there was none."""
    if not report_path.is_file():
        return None
    try:
        report = json.loads(report_path.read_text(encoding="utf-8"))
        return [row["position"] for row in report["bad_rows"]] if report["key"] == key else None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{report_path} is no pre-flight report ({error!r}); remove it to have the rows checked again") from error


def _write_report(report_path: Path, key: str, faults: Sequence[RowError]) -> None:
    bad_rows = [{"position": fault.position, "idx": fault.idx, "reason": fault.reason} for fault in faults]
    report_path.parent.mkdir(parents=True, exist_ok=True)
    partial = report_path.with_name(f".{report_path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"key": key, "bad_rows": bad_rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, report_path)


def _table(faults: Sequence[RowError], rows: int) -> str:
    lines = [f"{len(faults)} of {rows} rows cannot be used:", f"{'position':>8}  {'idx':<12}  reason"]
    lines += [f"{fault.position:>8}  {str(fault.idx):<12}  {fault.reason}" for fault in faults[:TABLE_ROWS]]
    if len(faults) > TABLE_ROWS:
        lines.append(f"... and {len(faults) - TABLE_ROWS} more")
    return "\n".join(lines)
