"""Training that is killed at random and resumed: every logged value and the weights end as those of an undisturbed run."""

import json
import time
from pathlib import Path

import pytest

from muffin.checkpoints import last_checkpoint
from tests.chaos.kills import kill_until_done, wait_for
from tests.scored import scored_rows, write_rows

STEPS = 12
WHOLE_FILES = {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "muffin_policy.json"}
CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


def curve(output_dir: Path) -> list[dict]:
    """What the run logged at its steps; the closing line is about time."""
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if CLOCK.isdisjoint(entry)]


@pytest.fixture(scope="module")
def scored(tiny_llava_path, tiny_rows_path, tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("scored"), *scored_rows(tiny_llava_path, tiny_rows_path))


def test_curve_and_weights_equal_those_of_an_undisturbed_run(starter, chaos, rng, tiny_llava_path, scored, tmp_path):
    def start(output_dir: Path):
        flags = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(output_dir)]
        flags += ["--dtype", "float32", "--lora_enable", "True", "--lora_r", "8", "--learning_rate", "1e-3"]  # dropout draws at random
        flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", str(STEPS)]
        flags += ["--logging_steps", "1", "--save_steps", "1", "--save_total_limit", "2", "--disable_tqdm", "True"]
        return starter("train/dpo.py", [*flags, "--resume_from_checkpoint", "last"])

    begin = time.monotonic()
    assert wait_for(start(tmp_path / "whole")()) == 0
    life = time.monotonic() - begin
    whole = curve(tmp_path / "whole")
    assert [entry["step"] for entry in whole] == list(range(1, STEPS + 1))

    wanted, killed, runs = (10 if chaos else 3), 0, 0
    while killed < wanted:
        output_dir = tmp_path / f"killed-{runs}"
        killed += kill_until_done(start(output_dir), rng=rng, kills=wanted - killed, longest_life=life)
        runs += 1
        assert curve(output_dir) == whole
        weights = "adapter_model.safetensors"
        assert (output_dir / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
        checkpoints = sorted(output_dir.glob("checkpoint-*"))
        assert [folder.name for folder in checkpoints] == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
        for folder in checkpoints:
            assert {*WHOLE_FILES, weights} <= {file.name for file in folder.iterdir()}
        assert last_checkpoint(output_dir) == checkpoints[-1]
    print(f"{killed} kills over {runs} runs of {life:.1f} s each")
