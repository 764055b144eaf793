"""train/dpo.py --plan True: a plan from config and data alone, without weights, log-probs or a file written; train/check_plan.py."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.policies.tiny_families import FAMILIES
from tests.scored import scored_rows, write_rows
from tests.tiny import write_parquet

ROWS = 13
SETTINGS = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3", "--num_train_epochs", "2", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def without_weights(tiny_llava_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config") / "llava"
    return shutil.copytree(tiny_llava_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", ROWS)


@pytest.fixture
def plan(load_recipe, without_weights, rows, tmp_path, capsys):
    """`plan(*flags)` gives the lines that are printed."""

    def run(*flags: str) -> list[str]:
        given = ["--model_name_or_path", str(without_weights), "--data_path", str(rows), "--output_dir", str(tmp_path / "run")]
        assert load_recipe("train/dpo.py").main([*given, *SETTINGS, "--plan", "True", *flags]) is None
        return capsys.readouterr().out.splitlines()

    return run


def line(lines: list[str], start: str) -> str:
    (found,) = [each for each in lines if each.startswith(start)]
    return found


def test_a_plan_needs_no_weights_and_writes_nothing(plan, without_weights, tmp_path):
    before = sorted(without_weights.rglob("*"))
    lines = plan("--gpu_memory_gb", "24", "--plan_processes", "2")
    assert not (tmp_path / "run").exists() and sorted(without_weights.rglob("*")) == before
    # the decoder: embedding and head 2 x 2064 x 64, 2 layers of q o 2 x 4096, k v 2 x 2048, MLP 3 x 8192, norms 2 x 64, a last norm of 64;
    # the projector: 64 x 64 + 64, twice
    trained = 2 * 2064 * 64 + 2 * (2 * 4096 + 2 * 2048 + 3 * 8192 + 2 * 64) + 64 + 2 * (64 * 64 + 64)
    assert line(lines, "parameters").endswith(f"of which trained {trained:,}")
    assert line(lines, "optimizer").split()[1] == f"{8 * trained / 1e9:.3g}"
    table = [each for each in lines if re.match(r"(full|LoRA|QLoRA) +[023] ", each)]
    assert [each.split()[:2] for each in table] == [[method, zero] for method in ("full", "LoRA", "QLoRA") for zero in "023"]
    assert [each for each in table if "<- these flags" in each] == [line(table, "full      0")]
    assert line(table, "full      0").endswith("without") and "does not fit" not in "".join(table)
    assert [each.split()[:2] for each in table if "refused" in each] == [["LoRA", "3"], ["QLoRA", "3"]]
    assert f"over all {ROWS} rows" in line(lines, "tokens of a row")
    # 13 rows are 4 batches of 2 x 2, 2 steps an epoch
    assert line(lines, "steps").split()[1] == "4"


def test_flags_choose_the_row_and_memory_the_verdict(plan):
    lines = plan("--lora_enable", "True", "--bits", "4", "--activation_checkpointing", "True", "--gpu_memory_gb", "0.00001")
    marked = line(lines, "QLoRA     0")
    assert marked.endswith("<- these flags, with") and marked.count("does not fit") == 2
    assert lines[0] == "QLoRA training, weights in nf4, forward in bfloat16"
    lines = plan("--dtype", "float32", "--lora_enable", "True")
    assert [each.split()[:2] for each in lines if "refused" in each] == [["QLoRA", "3"]]  # a float32 base may be sharded


@pytest.mark.parametrize(
    "flags, marked",
    [
        (["--tf32", "True", "--deepspeed", "scripts/train/zero2.json"], "full      2"),
        (["--deepspeed", "scripts/train/zero3.json"], "full      3"),
        (["--fsdp", "True", "--fsdp_config", "scripts/train/fsdp2.json"], "full      3"),
        (["--lora_enable", "True", "--deepspeed", "scripts/train/zero3.json"], "LoRA      3 refused"),
    ],
)
def test_flags_for_gpus_are_planned_without_one(flags, marked, plan):
    flags = [str(ROOT / flag) if flag.startswith("scripts/") else flag for flag in flags]
    lines = plan("--use_cpu", "True", "--dtype", "bfloat16", *flags)
    assert "<- these flags" in line(lines, marked)


def test_checkpointing_every_other_layer_keeps_more(plan):
    def step_gb(*flags: str) -> float:
        return float(line(plan("--activation_checkpointing", "True", *flags), "full      2").split()[9])

    assert step_gb("--activation_checkpointing_kwargs", '{"every_n_layers": 2}') > step_gb()


def test_every_family_has_a_time(plan, rows, tmp_path):
    """Qwen2.5-VL, whose FLOPs no formula gives, by the rehearsed step; a reference by another forward takes longer."""
    folder = FAMILIES["qwen25vl"].build(tmp_path / "qwen")

    def teraflops(*flags: str) -> float:
        return float(line(plan("--model_name_or_path", str(folder), "--lora_enable", "True", *flags), "time").split()[1])

    # with frozen weights: forward, and backward to the inputs; the vision tower forward only
    assert 1.3 < teraflops("--reference", "adapter_disabled") / teraflops() <= 1.6


def test_the_step_count_is_the_runs(plan, load_recipe, tiny_llava_path, rows, tmp_path):
    scored = write_rows(tmp_path / "scored", *scored_rows(tiny_llava_path, rows))
    given = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(tmp_path / "trained")]
    state = load_recipe("train/dpo.py").main([*given, *SETTINGS, "--dtype", "float32", "--save_strategy", "no"])
    assert line(plan("--plan_processes", "1"), "steps").split()[1] == str(state.max_steps) == str(state.global_step)


def test_what_cannot_be_planned_is_an_error(plan):
    with pytest.raises(ValueError, match="--plan does not know how much memory --optim adafactor takes"):
        plan("--optim", "adafactor")
    with pytest.raises(ValueError, match="--plan_processes is 0"):
        plan("--plan_processes", "0")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_check_plan_measures_a_cell(load_recipe):
    """One small cell: libraries' own memory weighs more in it than in the default ones, where the error stays below 10 %."""
    recipe = load_recipe("train/check_plan.py")
    options = recipe.CheckOptions(widths=[256], layers=[8], vocabulary=2000)
    cell = recipe.Cell(256, 8, lora=False, checkpointing=False)
    predicted = recipe.predicted_bytes(cell, options)
    assert recipe.measured_in_process(cell.name, options) == pytest.approx(predicted, rel=recipe.TOLERANCE)
    with pytest.raises(ValueError, match="256x9-full is no cell"):
        recipe.main(["--measure", "256x9-full"])
    with pytest.raises(ValueError, match="--layers is"):
        recipe.main(["--layers", "0"])
