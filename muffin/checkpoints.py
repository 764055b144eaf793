"""Checkpoints that are whole or absent, and a run that is asked to stop: it saves at the end of its step and says how to go on.

    .partial-checkpoint-20/ --every process has written, on disk--> checkpoint-20/ --older ones beyond the limit--> gone, each at once

A folder appears and disappears under its name by one rename, so whatever kills the run, what is called checkpoint-N can be resumed from.
"""

import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

PARTIAL = ".partial-"  # before the name of a folder that is being written or deleted


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint in `output_dir`."""
    return next(reversed(complete_checkpoints(output_dir)), None)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """In the order of their steps; one that another program left half-written has no trainer_state.json and is passed over."""
    found = sorted(checkpoints(output_dir), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
    for folder in found:
        if not (folder / "trainer_state.json").is_file():
            logger.warning("%s is incomplete (no trainer_state.json) and passed over", folder)
    return [folder for folder in found if (folder / "trainer_state.json").is_file()]


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-N, complete or not, in no order."""
    return [folder for folder in output_dir.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]


def checkpoint_name(step: int) -> str:
    """checkpoint-STEP."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def partial_run(output_dir: Path) -> Path:
    """Stands in for `output_dir` while a checkpoint is written."""
    return output_dir / f"{PARTIAL}{PREFIX_CHECKPOINT_DIR}"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Errors of writing `folder` (disk full, quota, permissions) leave nothing of it and say what to do.

    torch and safetensors report a full disk as errors of their own. Raises OSError.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 1e9
        raise OSError(
            f"a checkpoint could not be written to {folder.parent} ({free:.1f} GB free there): {error}. Earlier checkpoints are intact: "
            "make room (--save_total_limit keeps fewer), then run the same command with --resume_from_checkpoint last"
        ) from error


def publish(partial: Path, folder: Path) -> None:
    """Give a written folder its name, in place of one that may have it; on disk before it is seen."""
    for file in partial.rglob("*"):
        _sync(file)
    _sync(partial)
    if folder.exists():
        remove([folder])
    os.replace(partial, folder)
    _sync(folder.parent)


def remove(folders: Sequence[Path]) -> None:
    """Delete folders so that none is ever seen with a part of its files."""
    for folder in folders:
        doomed = folder.with_name(f"{PARTIAL}deleted-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """What a killed run was writing or deleting."""
    for folder in output_dir.glob(f"{PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Preempted(SystemExit):
    """The run was asked to stop, and has saved. The exit status is the shell's for that signal: 143 for SIGTERM, 138 for SIGUSR1."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopSignals:
    """Notes SIGTERM (Slurm's preemption, a node that is drained) and SIGUSR1 (`#SBATCH --signal`) instead of dying of them.

    A scheduler and a launcher may both send one, so repeated ones change nothing.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Handlers are the main thread's; elsewhere (a notebook's worker) signals stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
