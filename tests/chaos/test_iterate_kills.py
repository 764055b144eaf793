"""Two rounds on own data, killed at random, alone or with the stage that runs: data and weights of every stage end as undisturbed ones."""

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from muffin import stages
from tests.chaos.kills import FORK, Process, command, forked, kill_until_done, wait_for
from tests.tiny import write_parquet

FLAGS = ["--labeler_name_or_path", "self", "--iterations", "2", "--dtype", "float32", "--lora_enable", "True", "--learning_rate", "1e-3"]
FLAGS += ["--num_train_epochs", "1", "--checkpoints_per_epoch", "1", "--choice_images", "2", "--heldout_images", "2"]
FLAGS += ["--generation_flags", "--num_answers 6 --temperature 1 --max_new_tokens 24 --num_workers 0 --shard_rows 3"]
FLAGS += ["--labeling_flags", "--num_workers 0", "--scoring_flags", "--num_workers 0 --shard_rows 5"]
FLAGS += ["--evaluation_flags", "--max_new_tokens 24 --num_workers 0", "--rescored_pairs", "5", "--report", "False"]
FLAGS += ["--training_flags", "--per_device_train_batch_size 4 --disable_tqdm True --logging_steps 1 --lora_r 4"]


@dataclass
class Job:
    """A command in a session of its own, whose stages live on when it alone is killed."""

    process: Process
    rng: random.Random

    @property
    def pid(self) -> int:
        return self.process.pid

    def status(self) -> int | None:
        return self.process.status()

    def kill(self) -> None:
        alone = self.rng.random() < 0.5 or os.getpgid(self.pid) != self.pid  # no session yet
        os.kill(self.pid, signal.SIGKILL) if alone else os.killpg(self.pid, signal.SIGKILL)


class ForkedStage:
    """In place of a stage's process: a fork of the job, which holds the job's lock as a started process does."""

    def __init__(self, main, flags: list[str]) -> None:
        self._process = FORK.Process(target=main, args=(flags,))
        self._process.start()

    def wait(self) -> int:
        self._process.join()
        return self.returncode

    @property
    def returncode(self) -> int:
        return self._process.exitcode

    def terminate(self) -> None:
        if self._process.is_alive():
            self._process.terminate()


@pytest.fixture
def start(chaos, load_recipe, rng, monkeypatch, tmp_path):
    """`start(flags)` gives the function that starts the job once; without --chaos it and its stages are forks of this process."""
    if chaos:
        return lambda flags: lambda: Job(command(["train/iterate.py", *flags], tmp_path / "log.txt", own_session=True), rng)

    def launch(stage, root, environment, lock):
        recipe, *words = stage.words
        return ForkedStage(load_recipe(recipe).main, words)

    monkeypatch.setattr(stages, "launch", launch)
    for recipe in (*iterate_recipes(load_recipe), "data/select_prompts.py", "eval/rejected_claims.py", "train/merge_lora.py"):
        load_recipe(recipe)  # once, instead of in every fork
    main = load_recipe("train/iterate.py").main
    return lambda flags: lambda: Job(forked(lambda: (os.setsid(), main(flags))), rng)


def iterate_recipes(load_recipe) -> set[str]:
    return set(load_recipe("train/iterate.py").FLAGS.values())


def hashes(run: Path) -> dict[str, dict[str, str]]:
    return {name: stage["sha256"] for name, stage in json.loads((run / "manifest.json").read_text()).items()}


def test_files_equal_those_of_an_undisturbed_run(start, chaos, rng, tiny_llava_path, tmp_path):
    data = write_parquet(tmp_path / "rows.parquet", 36)  # three rows on each of 12 images

    def job(output_dir: Path):
        flags = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(data), "--output_dir", str(output_dir)]
        return start([*flags, *FLAGS])

    begin = time.monotonic()
    assert wait_for(job(tmp_path / "whole")()) == 0
    life = time.monotonic() - begin
    whole = hashes(tmp_path / "whole")
    assert {"prompts", "round-1/answers", "round-2/merged", "evaluation-2/rejected", "round-2/rescored"} <= set(whole)
    assert all(whole[name] for name in whole)  # every stage made something

    wanted, killed, runs = (10 if chaos else 3), 0, 0
    while killed < wanted:
        output_dir = tmp_path / f"killed-{runs}"
        killed += kill_until_done(job(output_dir), rng=rng, kills=wanted - killed, longest_life=life / 3)
        runs += 1
        found = hashes(output_dir)
        assert list(found) == list(whole)
        for name in whole:
            assert found[name] == whole[name], name
        assert results(output_dir) == results(tmp_path / "whole")
    print(f"{killed} kills over {runs} runs of {life:.1f} s each")


def results(run: Path) -> dict:
    """Without what is about time and place."""
    found = json.loads((run / "results.json").read_text())
    del found["seconds"], found["policy"]
    return found
