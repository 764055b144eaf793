"""The table of pairs that training logs: its lines by hand, against the logged means, and after a resume."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import WandbCallback

from muffin.pair_log import COLUMNS, PairLog, escape, markdown, table
from muffin.pairs import load_preferences
from tests.scored import scored_rows, write_rows
from tests.tiny import write_parquet


@pytest.fixture(scope="module")
def scored(tiny_llava_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    return write_rows(folder / "scored", *scored_rows(tiny_llava_path, write_parquet(folder / "rows.parquet", 4)))


def train(load_recipe, tiny_llava_path, scored: Path, output: Path, *flags: str):
    fixed = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(output)]
    fixed += ["--dtype", "float32", "--learning_rate", "3e-4", "--per_device_train_batch_size", "4", "--disable_tqdm", "True"]
    return load_recipe("train/dpo.py").main([*fixed, "--logging_steps", "1", "--save_steps", "2", *flags])


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "pairs.jsonl").read_text().splitlines()]


def test_rewards_are_those_of_the_metrics_and_a_resume_repeats_none(load_recipe, tiny_llava_path, scored, tmp_path):
    """Four rows in one batch: the means over the logged pairs are the metrics of the next step, which starts from the same weights."""
    flags = ["--max_steps", "5", "--log_pairs_steps", "2", "--report_to", "tensorboard"]
    state = train(load_recipe, tiny_llava_path, scored, tmp_path, *flags)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2] * 4 + [4] * 4 + [5] * 4  # every second, and the last
    metrics = {entry["step"]: entry for entry in state.log_history if "loss" in entry}
    for step in (2, 4):
        logged = [line for line in found if line["step"] == step]
        for side in ("chosen", "rejected"):
            assert sum(line[f"reward_{side}"] for line in logged) / 4 == pytest.approx(metrics[step + 1][f"rewards/{side}"], abs=1e-5)
    first, pair = found[0], load_preferences(scored)[0]
    assert (first["question"], first["chosen"], first["rejected"], first["idx"]) == (pair.question, pair.chosen, pair.rejected, pair.idx)
    assert first["margin"] == first["reward_chosen"] - first["reward_rejected"] != 0

    events = [file.parent for file in tmp_path.rglob("events.out.tfevents.*")]
    accumulator = EventAccumulator(str(events[0]))
    accumulator.Reload()
    assert "pairs/text_summary" in accumulator.Tags()["tensors"]

    train(load_recipe, tiny_llava_path, scored, tmp_path, *flags, "--resume_from_checkpoint", str(tmp_path / "checkpoint-4"))
    assert lines(tmp_path) == found


def test_no_table_when_it_is_off(load_recipe, tiny_llava_path, scored, tmp_path):
    train(load_recipe, tiny_llava_path, scored, tmp_path, "--max_steps", "1", "--log_pairs_steps", "0")
    assert not (tmp_path / "pairs.jsonl").exists()
    with pytest.raises(ValueError, match="--log_pairs_steps is -1"):
        train(load_recipe, tiny_llava_path, scored, tmp_path, "--log_pairs_steps", "-1")


PAIR = SimpleNamespace(idx=7, question="What | is\nit?", chosen="<b>A</b> *dog*", rejected="A `cat`")


def test_a_row_by_hand_and_its_markdown():
    (row,) = table([PAIR], torch.tensor([0.5]), torch.tensor([-0.25]), step=3)
    assert [row[name] for name in COLUMNS] == [3, 7, 0.5, -0.25, 0.75, PAIR.question, PAIR.chosen, PAIR.rejected]
    assert markdown([row]).splitlines()[2] == (
        "| 3 | 7 | +0.500 | -0.250 | +0.750 | What \\| is it? | &lt;b&gt;A&lt;/b&gt; \\*dog\\* | A \\`cat\\` |"
    )
    assert escape("a_b\\|&") == "a\\_b\\\\\\|&amp;"


def test_wandb_gets_a_table(tmp_path, monkeypatch):
    """Through a stand-in with wandb's interface."""
    sent = []
    wandb = WandbCallback.__new__(WandbCallback)
    wandb._initialized = True
    wandb._wandb = SimpleNamespace(Table=lambda columns, data: (columns, data), log=lambda values, step: sent.append((values, step)))
    log = PairLog([PAIR], lambda pairs: (torch.tensor([1.0]), torch.tensor([0.0])), steps=2, others=[wandb])
    args = SimpleNamespace(output_dir=str(tmp_path))
    for step in (1, 2):
        log.on_step_end(args, SimpleNamespace(global_step=step, max_steps=9, is_world_process_zero=True), None)
    expected = (list(COLUMNS), [[2, 7, 1.0, 0.0, 1.0, PAIR.question, PAIR.chosen, PAIR.rejected]])
    assert sent == [({"pairs": expected}, 2)]
