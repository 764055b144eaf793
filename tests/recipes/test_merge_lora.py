"""train/merge_lora.py: a merged checkpoint is what --merge_lora True writes, and what the adapter computes."""

from pathlib import Path

import pytest

from tests.scored import scored_rows, write_rows


@pytest.fixture(scope="module")
def run(load_recipe, tiny_llava_path, tiny_rows_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    scored = write_rows(folder / "scored", *scored_rows(tiny_llava_path, tiny_rows_path))
    flags = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(folder / "run")]
    flags += ["--dtype", "float32", "--lora_enable", "True", "--lora_r", "4", "--learning_rate", "1e-2", "--max_steps", "2"]
    load_recipe("train/dpo.py").main([*flags, "--save_steps", "1", "--merge_lora", "True", "--disable_tqdm", "True"])
    return folder / "run"


def merge(load_recipe, model: Path, output: Path) -> None:
    flags = ["--model_name_or_path", str(model), "--output_dir", str(output), "--dtype", "float32"]
    load_recipe("train/merge_lora.py").main(flags)


def test_an_adapter_and_its_checkpoints_are_merged(load_recipe, run: Path, tmp_path: Path):
    merge(load_recipe, run, tmp_path / "end")
    assert (tmp_path / "end" / "model.safetensors").read_bytes() == (run / "merged" / "model.safetensors").read_bytes()
    assert {file.name for file in (tmp_path / "end").iterdir()} == {file.name for file in (run / "merged").iterdir()}
    merge(load_recipe, run / "checkpoint-2", tmp_path / "last")
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == (run / "merged" / "model.safetensors").read_bytes()
    merge(load_recipe, run / "checkpoint-1", tmp_path / "first")
    assert (tmp_path / "first" / "model.safetensors").read_bytes() != (run / "merged" / "model.safetensors").read_bytes()


def test_a_full_model_is_refused(load_recipe, tiny_llava_path: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is a full model already; want a folder with adapter_config.json"):
        merge(load_recipe, tiny_llava_path, tmp_path)
