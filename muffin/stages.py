"""A long job as a list of recipes, each in a process of its own, with a ledger that says what ran, how long, and what came of it.

    Stage(name, words of a command, output) --Ledger.run--> files, and an entry in manifest.json: command, seconds, sha256 of each file

A job that was killed is run again: finished stages are not repeated, the one that was cut short gets its own folder back and goes on as
far as its recipe can. While a stage of a killed job still runs by itself, a new job on the same folder waits for it.
"""

import contextlib
import fcntl
import importlib.util
import io
import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from transformers import HfArgumentParser

from muffin.provenance import differing, hash_files, write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
HASHED = (".parquet", ".safetensors")  # of what a folder holds; the rest has times and paths in it


@dataclass(frozen=True)
class Stage:
    """One recipe with its flags.

    command: the recipe's path and its flags. output: the file or folder that it makes. processes: how many of them, through torchrun
    ("8", or "gpu" for one per GPU); None starts one.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    processes: str | None = None

    @property
    def words(self) -> list[str]:
        """What follows `python` on the command line."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", self.processes] if self.processes else []
        return [*launcher, *self.command]


class Ledger:
    """The stages that made a folder, in order; a context manager, inside of which nobody else runs stages there.

    root: where the recipes' paths start, and the directory that they run in. environment: of the stages' processes.
    redo_changed: remove what a stage made under other flags, and what every later stage made, and make it again; else that is an error.
    """

    def __init__(self, folder: Path, *, root: Path, environment: Mapping[str, str], redo_changed: bool = False) -> None:
        self.folder, self.root, self.environment, self.redo_changed = folder, root, dict(environment), redo_changed
        self.file = folder / MANIFEST
        self.stages: dict[str, dict[str, Any]] = {}
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Wait for whoever works in the folder, then read what there is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".stages.lock", "wb")  # noqa: SIM115 (closed in __exit__; stages inherit it)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another job, or a stage that a killed one left running, works in %s; waiting for its end", self.folder)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.stages = json.loads(self.file.read_text()) if self.file.exists() else {}
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()
        self._lock = None

    def run(self, *stages: Stage) -> None:
        """Run those that are not finished, all at once: stages given together do not depend on each other.

        Raises ValueError when one was made with other flags and `redo_changed` is off; SystemExit when one fails.
        """
        todo = [stage for stage in stages if not self.finished(stage)]
        for stage in todo:
            self._begin(stage)
        start = time.perf_counter()
        processes = [launch(stage, self.root, self.environment, self._lock.fileno()) for stage in todo]
        try:
            for stage, process in zip(todo, processes, strict=True):
                if process.wait() != 0:
                    raise SystemExit(
                        f"stage {stage.name} failed with exit code {process.returncode}; mend the cause above and give the command again, "
                        "which goes on from here (what a flag of an earlier stage made is made again with --redo_changed True)"
                    )
                self._finish(stage, time.perf_counter() - start)
        except KeyboardInterrupt:
            names = ", ".join(stage.name for stage in todo)
            raise SystemExit(f"interrupted in stage {names}; finished stages are kept, the same command goes on") from None
        finally:
            for process in processes:  # of a failure, or of Ctrl-C
                process.terminate()

    def finished(self, stage: Stage) -> bool:
        """Whether this very command ran to its end before."""
        known = self.stages.get(stage.name, {})
        return "seconds" in known and known["command"] == stage.words

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of every finished stage."""
        return {name: stage["seconds"] for name, stage in self.stages.items() if "seconds" in stage}

    def _begin(self, stage: Stage) -> None:
        """Note what is about to run."""
        known = self.stages.get(stage.name)
        if known is not None and known["command"] != stage.words:
            if "seconds" not in known and not Path(known["output"]).exists():  # it failed before it made anything
                del self.stages[stage.name]
            else:
                self._remove_changed(stage, known["command"])
        self.stages.setdefault(stage.name, {"command": stage.words, "output": str(stage.output)})
        self._save()
        logger.info("stage %s: python %s", stage.name, shlex.join(stage.words))

    def _remove_changed(self, stage: Stage, words: Sequence[str]) -> None:
        names = list(self.stages)
        later = names[names.index(stage.name) :]
        if not self.redo_changed:
            changes = "\n".join(
                f"  - {flag}: {then} then, {now} now" for flag, then, now in differing(by_flag(words), by_flag(stage.words))
            )
            seconds = sum(self.stages[name].get("seconds", 0) for name in later)
            after = f" and the {len(later) - 1} stages after it in {self.file}" if len(later) > 1 else ""
            raise ValueError(
                f"{self.folder} holds stage {stage.name}, made with other flags:\n{changes}\nGive the flags it was made with, an empty "
                f"folder, or --redo_changed True, which removes what it{after} made, {seconds:.0f} s of work, and makes it again"
            )
        outputs = {name: Path(self.stages[name]["output"]) for name in later}
        if outside := [output for output in outputs.values() if not output.resolve().is_relative_to(self.folder.resolve())]:
            raise ValueError(
                f"{self.file} names {outside[0]}, which is not in this folder: the run was moved or copied. Nothing is "
                "removed; move it back, or give an empty folder"
            )
        for name in reversed(later):
            self.stages.pop(name)
            remove(outputs[name])

    def _finish(self, stage: Stage, seconds: float) -> None:
        self.stages[stage.name] |= {"seconds": round(seconds, 1), "sha256": hashes_of(stage.output)}
        self._save()

    def _save(self) -> None:
        write_atomically(self.file, (json.dumps(self.stages, indent=1) + "\n").encode())


def launch(stage: Stage, root: Path, environment: Mapping[str, str], lock: int) -> subprocess.Popen:
    """The stage's process. It holds the file `lock` for as long as it lives, whatever becomes of this one."""
    return subprocess.Popen([sys.executable, *stage.words], cwd=root, env=environment, pass_fds=(lock,))


def hashes_of(output: Path) -> dict[str, str]:
    """SHA-256 by name (relative to the output's parent) of a file, or of the data and weights in a folder."""
    files = [output] if output.is_file() else [file for file in sorted(output.rglob("*")) if file.suffix in HASHED]
    return {str(file.relative_to(output.parent)): digest for file, digest in zip(files, hash_files(files), strict=True)}


def by_flag(words: Sequence[str]) -> dict[str, str]:
    """["train/dpo.py", "--lr", "1", "--names", "a", "b"] -> {"command": "train/dpo.py", "--lr": "1", "--names": "a b"}; of a flag that
    is given twice, the last counts."""
    values: dict[str, list[str]] = {"command": []}
    flag = "command"
    for word in words:
        if word.startswith("--"):
            flag = word
            values[flag] = []
        else:
            values[flag].append(word)
    return {name: " ".join(each) for name, each in values.items()}


def remove(output: Path) -> None:
    """A file or a folder, which need not exist."""
    output.unlink() if output.is_file() else shutil.rmtree(output, ignore_errors=True)


def check_flags(recipe: Path, words: Sequence[str], named: str, reserved: Collection[str] = ()) -> None:
    """Raise ValueError when the recipe's parser refuses `words`, so that a typing error does not show after the stages before it.

    named: the option that they were given under. reserved: flags that the job itself gives. Loads the recipe for its OPTIONS; nothing
    of it runs.
    """
    if taken := [word for word in words if word.partition("=")[0] in reserved]:
        raise ValueError(f"{named}: {taken[0].partition('=')[0]} of {recipe.parent.name}/{recipe.name} is given by the job; leave it out")
    parser = HfArgumentParser(recipe_options(recipe), allow_abbrev=False)
    for action in parser._actions:
        action.required = False
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            unknown = parser.parse_known_args(list(words))[1]
    except SystemExit:
        unknown = [message.getvalue().strip().rpartition(": error: ")[2]]
    if unknown:
        raise ValueError(f"{named}: {recipe.parent.name}/{recipe.name} refuses {unknown[0]}; see python {recipe} --help")


def recipe_options(recipe: Path) -> tuple[type, ...]:
    """The option classes of a recipe, in the order of its parser."""
    name = f"recipe_{recipe.parent.name}_{recipe.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, recipe)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].OPTIONS
