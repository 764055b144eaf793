"""README keeps its word: its commands exist and parse, its main job runs, its tables are those of the files that commands wrote."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from tests.conftest import ROOT
from tests.test_conventions import flag_findings, recipe_commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBERS = ROOT / "docs" / "numbers"


def command_lines(text: str) -> list[str]:
    """The lines of indented blocks, continued ones joined, without comments; and what stands in backticks."""
    blocks = re.sub(r"\\\n\s*", " ", text)
    indented = [line.strip() for line in blocks.splitlines() if line.startswith("    ")]
    quoted = [quote.strip("`") for quote in re.findall(r"`[^`\n]+`", text)]
    return [re.sub(r"\s+#.*", "", line) for line in (*indented, *quoted) if re.match(r"(python|torchrun|scripts/|jupyter|make) ?", line)]


def findings(text: str, load_recipe) -> Iterator[str]:
    for line in command_lines(text):
        for recipe, words in recipe_commands(line):
            if not (ROOT / recipe).is_file():
                yield f"{recipe} does not exist"
            elif not any(word == "..." for word in words):
                yield from flag_findings(recipe, HfArgumentParser(load_recipe(recipe).OPTIONS), words)
        for file in re.findall(r"(?:scripts|eval)/[\w/]+\.(?:sh|ipynb)", line):
            if not (ROOT / file).is_file():
                yield f"{file} does not exist"
        if (target := re.match(r"make (\w+)$", line)) and not re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
            yield f"make {target[1]}: no such target"


def test_commands_exist_and_their_flags_parse(load_recipe):
    assert len(command_lines(README)) > 20
    assert list(findings(README, load_recipe)) == []


def test_the_check_finds_what_is_wrong(load_recipe):
    text = "    python train/dpo.py --dpo_betta 1\n    scripts/gone.sh A \\\n        B\n`make sense` and `python eval/gone.py --x 1`\n"
    assert sorted(findings(text, load_recipe)) == [
        "eval/gone.py does not exist",
        "make sense: no such target",
        "passes --dpo_betta, which train/dpo.py does not have",
        "scripts/gone.sh does not exist",
    ]


def test_files_that_are_linked_exist():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) > 3
    assert [target for target in targets if not (ROOT / target).exists()] == []
    named = re.findall(r"`((?:muffin|policies|eval|tests|train|data)/[\w/]+\.py)`", README)
    assert [name for name in named if not ((ROOT / name).is_file() or (ROOT / "muffin" / name).is_file())] == []


# --- numbers


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the table whose head is the line `heading`."""
    lines = README.splitlines()
    start = lines.index(heading) + 2
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def interval(found: dict, metric: str) -> str:
    low, high = found[f"{metric}_interval"]
    return f"{found[metric]:.1f} [{low:.1f}, {high:.1f}]"


def test_two_rounds():
    found = json.loads((NUMBERS / "two_rounds.json").read_text())
    decodings = {"CHAIRs, greedy": ("greedy", "chair_s"), "recall": ("greedy", "recall")}
    decodings |= {"wrong claims": ("greedy", "claim_error"), "wrong claims, T = 1": ("t1", "claim_error")}
    table = rows_below("| | before | after round 1 | after round 2 |")
    assert {row[0] for row in table} == set(decodings)
    for name, *cells in table:
        decoding, metric = decodings[name]
        assert cells == [interval(found[moment][decoding], metric) for moment in ("before", "after-1", "after")]


def test_seeds():
    found = json.loads((NUMBERS / "seeds.json").read_text())
    columns = [("greedy", "chair_s"), ("t1", "chair_s"), ("greedy", "chair_i"), ("greedy", "recall"), ("greedy", "claim_error")]
    for seed, *cells in rows_below("| seed | CHAIRs, greedy | CHAIRs, T = 1 | CHAIRi | recall | wrong claims | labeler accuracy / fpr |"):
        run = found[f"demo-{seed}"]
        expected = [f"{run['before'][decoding][metric]:.1f} -> {interval(run['after'][decoding], metric)}" for decoding, metric in columns]
        assert cells == [*expected, f"{run['labeler']['accuracy']:.1f} / {run['labeler']['fpr']:.1f}"]


def test_plan_against_measurements():
    errors = [cell["error"] for cells in json.loads((NUMBERS / "plan.json").read_text()).values() for cell in cells]
    assert "they are 1 to 12 % low" in " ".join(README.split())
    assert round(100 * -max(errors)) == 1 and round(100 * -min(errors)) == 12


def test_best_of_n():
    found = json.loads((NUMBERS / "demo_benchmarks.json").read_text())
    before, after = (found[name]["best_of_n"]["chair_s"] for name in ("before", "after"))
    text = " ".join(README.split())
    assert f"{before['random'][-1]:.1f} at random -> {before['reward_mean'][-1]:.1f} by the mean reward" in text
    assert f"{after['random'][-1]:.1f} -> {after['reward_mean'][-1]:.1f}, where" in text
    assert f"log-prob gives {after['policy_mean_logp'][-1]:.1f}" in text


def test_number_of_checks_per_family():
    kit = (ROOT / "tests" / "policies" / "test_conformance.py").read_text()
    assert f"{len(re.findall('^def test_', kit, re.MULTILINE))} checks each" in README


# --- the main job


@pytest.fixture
def shell(tmp_path: Path):
    """Runs a script as README shows it; `torchrun` starts one process here, since there is no GPU to count."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "torchrun").write_text('#!/usr/bin/env bash\nshift 3\nexec python "$@"\n')
    (folder / "torchrun").chmod(0o755)
    python = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*words: str | Path) -> str:
        finished = subprocess.run([str(word) for word in words], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr[-3000:]
        return finished.stdout

    return run


def test_the_main_job_runs(shell, load_recipe, tiny_llava_path, tiny_rows_path, tmp_path: Path):
    """The four commands on a tiny policy, with the flags that a CPU needs; LoRA, as README shows it."""
    tiny = ["--dtype", "float32", "--num_workers", "0"]
    scored, run = tmp_path / "scored", tmp_path / "lora"
    said = shell("scripts/score_reference.sh", tiny_llava_path, tiny_rows_path, scored, "--lora_enable", "True", *tiny)
    assert "24 rows" in said
    training = ["--tf32", "False", "--dtype", "float32", "--max_steps", "2", "--report_to", "none", "--dataloader_num_workers", "0"]
    shell("scripts/train/llava15_7b_lora.sh", tiny_llava_path, scored, run, "--merge_lora", "True", *training, "--logging_steps", "1")
    losses = [entry["loss"] for entry in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    world = tmp_path / "world"
    flags = f"--output_dir {world} --world small --train_images 2 --prompt_images 2 --choice_images 2 --heldout_images 3 --vision_steps 1"
    load_recipe("data/make_shapeworld.py").main(flags.split())
    for model, output in ((tiny_llava_path, "base"), (run / "merged", "after")):
        shell("scripts/evaluate.sh", model, world, tmp_path / output, "--benchmarks", "shapeworld", "--nproc_per_node", "", *tiny)
    said = shell("python", "eval/run_benchmarks.py", "--compare", tmp_path / "base", tmp_path / "after")
    assert "shapeworld_chair" in said and "second - first" in said
