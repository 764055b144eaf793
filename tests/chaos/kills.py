"""SIGKILLs at random moments over work that any number of processes may do, join, leave and take up again.

    kills = kill_until_done(start, rng=rng, kills=25, longest_life=8.0, most_processes=3)

`start` begins one process of the work: `forked(action)`, cheap, since the imports are there already; or `command(words, log)`, the real
command line, whose imports can be killed, too.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.conftest import ROOT

PATIENCE_S = 1800.0
FORK = multiprocessing.get_context("fork")


class Process(Protocol):
    pid: int

    def status(self) -> int | None:
        """None while it runs, -9 after a SIGKILL."""
        ...

    def kill(self) -> None:
        """SIGKILL."""
        ...


class _Forked:
    def __init__(self, action: Callable[[], Any]) -> None:
        self._process = FORK.Process(target=action)
        self._process.start()
        self.pid = self._process.pid

    def status(self) -> int | None:
        self._process.join(0)  # reaps it
        return self._process.exitcode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class _Command:
    def __init__(self, words: Sequence[str], log: Path, own_session: bool) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=own_session
            )
        self.pid = self._process.pid

    def status(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def forked(action: Callable[[], Any]) -> Process:
    """`action` in a copy of this process. It ends with the status of a SystemExit, 1 for any other error."""
    return _Forked(action)


def command(words: Sequence[str], log: Path, own_session: bool = False) -> Process:
    """`python WORDS` from the repository root; what it says is added to `log`."""
    return _Command(words, log, own_session)


def kill_until_done(start: Callable[[], Process], *, rng: random.Random, kills: int, longest_life: float, most_processes: int = 1) -> int:
    """Kill processes of the work until one ends by itself; returns how many were killed, `kills` at most.

    Up to `most_processes` run at a time, as many as a die says. After a random time, `longest_life` seconds at most, a random one is
    killed and its place is drawn anew. When all kills are spent, the work goes on undisturbed.
    Raises AssertionError when a process ends by itself in any other way than with status 0.
    """
    running: list[Process] = []
    killed, deadline = 0, time.monotonic() + PATIENCE_S
    try:
        while killed < kills:
            while len(running) < rng.randint(1, most_processes):
                running.append(start())
            if _first_to_end(running, time.monotonic() + rng.uniform(0, longest_life)):
                break
            victim = running.pop(rng.randrange(len(running)))
            victim.kill()
            status = wait_for(victim, deadline)
            if status == 0:
                break  # it was faster
            assert status == -signal.SIGKILL
            killed += 1
        if not running:
            running.append(start())
        for process in running:
            assert wait_for(process, deadline) == 0
    finally:
        for process in running:
            if process.status() is None:
                process.kill()
    return killed


def wait_for(process: Process, deadline: float | None = None) -> int:
    """Its exit status. Raises TimeoutError at `deadline` (time.monotonic)."""
    deadline = time.monotonic() + PATIENCE_S if deadline is None else deadline
    while (status := process.status()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {process.pid} does not end")
        time.sleep(0.01)
    return status


def _first_to_end(running: Sequence[Process], until: float) -> bool:
    """Whether a process ended by itself before `until`, which then means that the work is done."""
    while time.monotonic() < until:
        for process in running:
            if (status := process.status()) is not None:
                assert status == 0, f"process {process.pid} ended with status {status}"
                return True
        time.sleep(0.01)
    return False
