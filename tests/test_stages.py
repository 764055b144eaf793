"""Stages and their ledger: what runs, what is noted, and what happens after failures, kills and changed flags. Stages are tiny scripts."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muffin.stages import Ledger, Stage, by_flag, check_flags, hashes_of
from tests.conftest import ROOT

WRITE = """
import pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls", "a") as calls:
    calls.write("called\\n")
(folder / "started").touch()
time.sleep(float(flags.get("--sleep", 0)))
(folder / "rows.parquet").write_text(flags["--text"])
sys.exit(int(flags.get("--exit", 0)))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "write.py").write_text(WRITE)
    return tmp_path


def stage(root: Path, name: str, **flags: object) -> Stage:
    output = root / "run" / name
    words = [word for flag, value in ({"output_dir": output, "text": name} | flags).items() for word in (f"--{flag}", str(value))]
    return Stage(name, ("data/write.py", *words), output)


def ledger(root: Path, **options: bool) -> Ledger:
    return Ledger(root / "run", root=root, environment=os.environ, **options)


def calls(root: Path, name: str) -> int:
    return len((root / "run" / name / "calls").read_text().splitlines())


def test_stages_run_once_and_are_noted(root: Path):
    first, second = stage(root, "first"), stage(root, "second")
    for _ in range(2):
        with ledger(root) as book:
            book.run(first)
            book.run(second)
    assert (calls(root, "first"), calls(root, "second")) == (1, 1)
    noted = json.loads((root / "run" / "manifest.json").read_text())
    assert list(noted) == ["first", "second"]
    assert noted["first"]["command"] == list(first.command)
    assert noted["first"]["sha256"] == {"first/rows.parquet": hashlib.sha256(b"first").hexdigest()}  # and not that of `calls`
    assert set(book.seconds) == {"first", "second"}


def test_stages_given_together_run_side_by_side(root: Path):
    """Each of two waits until the other has started."""
    wait = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[2])
folder.mkdir(parents=True)
(folder / "started").touch()
end = time.monotonic() + 60
while not (folder.parent / sys.argv[4] / "started").exists():
    assert time.monotonic() < end
    time.sleep(0.01)
"""
    (root / "data" / "wait.py").write_text(wait)
    pair = [
        Stage(a, ("data/wait.py", "--output_dir", str(root / "run" / a), "--other", b), root / "run" / a)
        for a, b in (("a", "b"), ("b", "a"))
    ]
    with ledger(root) as book:
        book.run(*pair)
    assert set(book.seconds) == {"a", "b"}


def test_a_failure_stops_the_run_and_what_was_finished_stays(root: Path):
    with ledger(root) as book:
        book.run(stage(root, "first"))
        with pytest.raises(SystemExit, match="stage second failed with exit code 3; mend the cause above"):
            book.run(stage(root, "second", exit=3))
    with ledger(root) as book:
        assert book.finished(stage(root, "first"))
        assert not book.finished(stage(root, "second", exit=3))


def test_a_stage_that_made_nothing_takes_other_flags(root: Path):
    """It failed on a wrong flag; the right one is no change of anything."""
    with ledger(root) as book:
        book.run(stage(root, "first"))
        output = root / "run" / "second"
        with pytest.raises(SystemExit, match="stage second failed"):
            book.run(Stage("second", ("data/missing.py", "--output_dir", str(output)), output))
        book.run(stage(root, "second"))
    assert list(json.loads((root / "run" / "manifest.json").read_text())) == ["first", "second"]


def test_an_interrupted_job_says_how_to_go_on(root: Path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with ledger(root) as book, pytest.raises(SystemExit, match="interrupted in stage first; finished stages are kept, the same command"):
        book.run(stage(root, "first"))


def test_other_flags_are_refused_or_made_again_with_all_that_followed(root: Path):
    with ledger(root) as book:
        for name in ("first", "second", "third"):
            book.run(stage(root, name))
    changed = stage(root, "second", text="other")
    with ledger(root) as book, pytest.raises(ValueError) as refused:
        book.run(stage(root, "first"), changed)
    assert "stage second, made with other flags:\n  - --text: second then, other now\n" in str(refused.value)
    assert "removes what it and the 1 stages after it in" in str(refused.value)
    assert (root / "run" / "third" / "rows.parquet").exists()  # nothing was removed
    with ledger(root, redo_changed=True) as book:
        book.run(stage(root, "first"))
        book.run(changed)
        assert not (root / "run" / "third").exists()
        book.run(stage(root, "third"))
    assert [calls(root, name) for name in ("first", "second", "third")] == [1, 1, 1]  # calls of the removed folders went with them
    assert (root / "run" / "second" / "rows.parquet").read_text() == "other"
    assert list(json.loads((root / "run" / "manifest.json").read_text())) == ["first", "second", "third"]


def test_a_copied_run_never_removes_the_files_of_the_first(root: Path):
    with ledger(root) as book:
        book.run(stage(root, "first"))
    shutil.copytree(root / "run", root / "copy")
    copied = Ledger(root / "copy", root=root, environment=os.environ, redo_changed=True)
    with copied as book, pytest.raises(ValueError, match="which is not in this folder: the run was moved or copied"):
        book.run(stage(root, "first", text="other"))
    assert (root / "run" / "first" / "rows.parquet").read_text() == "first"


JOB = """
import os, sys
from pathlib import Path
from muffin.stages import Ledger, Stage
root, output = Path(sys.argv[1]), Path(sys.argv[1]) / "run" / "slow"
stage = Stage("slow", ("data/write.py", "--output_dir", str(output), "--text", "x", "--sleep", "3"), output)
with Ledger(root / "run", root=root, environment=os.environ) as book:
    book.run(stage)
"""


def test_a_stage_that_outlives_its_job_is_waited_for(root: Path):
    """The job is killed, its stage goes on alone; the next job begins when that has ended, and runs the stage again on its folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen([sys.executable, "-c", JOB, str(root)], env=environment)
    started, end = root / "run" / "slow" / "started", time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (root / "run" / "slow" / "rows.parquet").exists()
    with ledger(root):
        assert (root / "run" / "slow" / "rows.parquet").exists()  # the orphan was waited for
    assert calls(root, "slow") == 1


def test_processes_go_through_torchrun(tmp_path: Path):
    launched = Stage("many", ("train/dpo.py", "--seed", "1"), tmp_path, processes="8")
    assert launched.words == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "8", "train/dpo.py", "--seed", "1"]


def test_hashes_are_those_of_data_and_weights(tmp_path: Path):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    for name in ("a.safetensors", "inner/b.parquet", "inner/log.json"):
        (tmp_path / "model" / name).write_text(name)
    expected = {f"model/{name}": hashlib.sha256(name.encode()).hexdigest() for name in ("a.safetensors", "inner/b.parquet")}
    assert hashes_of(tmp_path / "model") == expected
    single = tmp_path / "result.json"
    single.write_text("{}")
    assert hashes_of(single) == {"result.json": hashlib.sha256(b"{}").hexdigest()}


def test_words_by_flag():
    words = ["train/dpo.py", "--seed", "1", "--names", "a", "b", "--seed", "2", "--quiet"]
    assert by_flag(words) == {"command": "train/dpo.py", "--seed": "2", "--names": "a b", "--quiet": ""}


def test_flags_of_a_recipe_are_checked_before_it_runs():
    recipe = ROOT / "data" / "build_pairs.py"
    check_flags(recipe, ["--max_pairs_per_prompt", "3"], "--pair_flags")
    with pytest.raises(ValueError, match=r"--pair_flags: data/build_pairs.py refuses --max_pear; see python .*build_pairs.py --help"):
        check_flags(recipe, ["--max_pear", "3"], "--pair_flags")
    with pytest.raises(ValueError, match="--pair_flags: --output_dir of data/build_pairs.py is given by the job; leave it out"):
        check_flags(recipe, ["--seed", "1", "--output_dir=x"], "--pair_flags", {"--output_dir"})
    with pytest.raises(ValueError, match="refuses argument --max_pairs_per_prompt.*: invalid int value: 'many'"):
        check_flags(recipe, ["--max_pairs_per_prompt", "many"], "--pair_flags")
