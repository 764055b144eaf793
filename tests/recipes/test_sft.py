"""train/sft.py: its loss against full logits, what it trains, resume, and files that load again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from muffin.logps import get_batch_logps
from muffin.pairs import load_demonstrations
from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint

STEP = ["--per_device_train_batch_size", "4", "--dtype", "float32", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"]


@pytest.fixture
def sft(load_recipe, tiny_llava_path: Path, tiny_rows_path: Path, tmp_path: Path):
    """Run the recipe; returns the losses it logged."""

    def run(*flags: str, output: str = "run") -> list[float]:
        argv = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(tiny_rows_path), "--output_dir", str(tmp_path / output)]
        state = load_recipe("train/sft.py").main([*argv, *STEP, *flags])
        return [entry["loss"] for entry in state.log_history if "loss" in entry]

    return run


def plain_values(model_path: Path, rows_path: Path, positions: range) -> list[torch.Tensor]:
    """Per-token log-probs of the chosen answers, from full logits, one row at a time."""
    checkpoint = resolve_checkpoint(model_path)
    adapter = load_adapter(checkpoint, PolicyOptions())
    model = load_policy(checkpoint, adapter, dtype=torch.float32).eval()
    rows, values = load_demonstrations(rows_path), []
    for position in positions:
        row = rows[position]
        encoded = adapter.encode(row.image, row.question, (row.chosen,))
        ids = torch.cat([encoded.prompt_ids, encoded.response_ids[0]])[None]
        labels = ids.clone()
        labels[:, : len(encoded.prompt_ids)] = -100
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **encoded.vision).logits
        values.append(get_batch_logps(logits, labels, return_per_token_logp=True)[0, len(encoded.prompt_ids) - 1 :])
    return values


@pytest.mark.parametrize("average", [False, True])
def test_first_loss_is_the_plain_one(sft, tiny_llava_path: Path, tiny_rows_path: Path, average: bool):
    """Over two micro-batches of unequal token counts: per token, or per answer with --sft_use_average True."""
    flags = ["--train_sampling_strategy", "sequential", "--gradient_accumulation_steps", "2", "--max_steps", "1"]
    (loss,) = sft(*flags, "--sft_use_average", str(average))
    values = plain_values(tiny_llava_path, tiny_rows_path, range(8))
    expected = -(torch.stack([row.mean() for row in values]).mean() if average else torch.cat(values).mean())
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_muon_learns_and_the_result_loads(sft, tmp_path: Path, tiny_llava_path: Path):
    losses = sft("--muon_learning_rate", "4e-3", "--learning_rate", "3e-3", "--max_steps", "8", "--freeze_vision_tower", "False")
    assert losses[-1] < losses[0] - 0.5
    checkpoint = resolve_checkpoint(tmp_path / "run")
    adapter = load_adapter(checkpoint, PolicyOptions())
    trained = load_policy(checkpoint, adapter, dtype=torch.float32).state_dict()
    start = load_policy(resolve_checkpoint(tiny_llava_path), adapter, dtype=torch.float32).state_dict()
    moved = {name for name in trained if not torch.equal(trained[name], start[name])}
    assert any("vision_tower" in name for name in moved) and "lm_head.weight" in moved
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert options["SFTArguments"]["muon_learning_rate"] == 4e-3


def test_resume_goes_on_as_if_nothing_had_happened(sft, tmp_path: Path):
    """Optimizer state of both kinds, data order and schedule survive."""
    flags = ["--muon_learning_rate", "4e-3", "--learning_rate", "3e-3", "--max_steps", "6"]
    whole = sft(*flags, "--save_strategy", "steps", "--save_steps", "3")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")  # as if killed between steps 3 and 6
    assert sft(*flags, "--resume_from_checkpoint", "last") == whole


def test_lora_trains_the_adapter_alone(sft, tmp_path: Path):
    losses = sft("--lora_enable", "True", "--lora_r", "8", "--learning_rate", "1e-2", "--max_steps", "6", "--merge_lora", "True")
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--muon_learning_rate", "-1"], "--muon_learning_rate is -1.0"),
        (["--muon_learning_rate", "1e-3", "--lora_enable", "True"], "leave it out with --lora_enable"),
        (["--use_liger_kernel", "True"], "--use_liger_kernel True cannot be used"),
    ],
)
def test_contradictions_are_refused(sft, flags: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        sft(*flags, "--max_steps", "1")
