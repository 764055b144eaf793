"""eval/muffin_inference_logp.py from its command line: what it writes, resumes, refuses and says."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from muffin import provenance
from muffin.pairs import load_preferences
from muffin.provenance import explain_difference, foreign_rows, read_reference
from tests.conftest import ROOT
from tests.plain_logps import assert_scored_like

RECIPE = "eval/muffin_inference_logp.py"


@pytest.fixture(autouse=True)
def hash_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "CACHE_DIR", tmp_path / "cache")


@pytest.fixture
def score(load_recipe, tiny_llava_path, tiny_rows_path, tmp_path):
    """score(**flags) runs the recipe on the tiny model and rows in float32 without workers, into tmp_path/out."""

    def function(**flags):
        flags = {
            "model_name_or_path": tiny_llava_path,
            "data_path": tiny_rows_path,
            "output_dir": tmp_path / "out",
            "dtype": "float32",
            "shard_rows": 10,
            "batch_tokens": 400,
            "num_workers": 0,
        } | flags
        return load_recipe(RECIPE).main([word for name, value in flags.items() for word in (f"--{name}", str(value))])

    return function


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def training_flags(printed: str) -> dict[str, str]:
    words = shlex.split(printed.split("next: python train/dpo.py ")[1])
    return dict(zip(words[0::2], words[1::2], strict=True))


def test_scored_files_are_ready_for_training(score, tmp_path, tiny_llava_path, tiny_rows_path, capsys):
    summary = score()
    out = tmp_path / "out"
    assert sorted(contents(out)) == [
        "bad_rows.json",
        "muffin_reference.json",
        *(f"shard-0000{number}-of-00003.parquet" for number in range(3)),
    ]
    manifest = json.loads((out / "muffin_reference.json").read_text())
    assert manifest["reference"]["numerics"]["autocast_dtype"] is None
    scored = load_preferences(out)
    assert foreign_rows(scored, manifest["reference_id"]) == []
    assert scored.table["idx"][:] == load_preferences(tiny_rows_path).table["idx"][:]
    assert_scored_like(AutoModelForImageTextToText.from_pretrained(tiny_llava_path, dtype=torch.float32).eval(), tiny_llava_path, out, 24)

    printed = capsys.readouterr().out
    assert printed.startswith(f"24 rows in {out}, 24 of them here at ")
    assert f"chosen {summary.chosen_average_logp:.3f}, rejected {summary.rejected_average_logp:.3f}\n" in printed
    assert training_flags(printed) == {
        "--model_name_or_path": str(tiny_llava_path),
        "--data_path": str(out),
        "--output_dir": "RUN",
        "--dtype": "float32",
        "--lora_enable": "False",
        "--learning_rate": "5e-7",
        "--model_max_length": "2048",
    }

    before = contents(out)
    assert score() == summary
    assert "none of them missing" in capsys.readouterr().out
    assert contents(out) == before


def test_numerics_follow_the_coming_training(score, tmp_path):
    references = {}
    for name, flags in {
        "fp32": {"dtype": "float32"},
        "full": {"dtype": "bfloat16"},
        "lora": {"dtype": "bfloat16", "lora_enable": "True"},
    }.items():
        score(output_dir=tmp_path / name, max_rows=6, **flags)
        references[name] = read_reference(tmp_path / name)
    assert [explain_difference(references["fp32"], references[name]) == [] for name in references] == [True, False, False]
    (line,) = explain_difference(references["full"], references["lora"])
    assert "--dtype bfloat16 --lora_enable False" in line
    exact = load_preferences(tmp_path / "fp32")
    for name in ("full", "lora"):
        rounded = load_preferences(tmp_path / name)
        for position in range(6):
            tokens = torch.tensor([data[position].ref_win_per_token_logp for data in (exact, rounded)])
            assert 0 < (tokens[0] - tokens[1]).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"batch_tokens": 500}, "--batch_tokens 400"),
        ({"shard_rows": 11}, "--shard_rows 10"),
        ({"max_rows": 12}, "leaving --max_rows out"),
        ({"prompt_name": "vicuna_v1"}, "--prompt_name llava_v1"),
        ({"image_aspect_ratio": "crop"}, "--image_aspect_ratio pad"),
        ({"dtype": "bfloat16"}, "--dtype float32"),
        ({"data_path": "other rows"}, "input file rows.parquet has other content"),
    ],
)
def test_another_run_is_refused_before_it_starts(score, tmp_path, tiny_rows_path, flags, named):
    score()
    (tmp_path / "out" / "shard-00001-of-00003.parquet").unlink()
    before = contents(tmp_path / "out")
    if "data_path" in flags:
        (tmp_path / "other").mkdir()
        flags = {"data_path": tmp_path / "other" / "rows.parquet"}
        load_preferences(tiny_rows_path).table.select(range(23)).to_parquet(flags["data_path"])
    with pytest.raises(ValueError, match=named):
        score(**flags)
    assert contents(tmp_path / "out") == before


def test_killed_ranks_are_resumed_to_the_same_bytes(score, tmp_path, tiny_llava_path, tiny_rows_path):
    score(output_dir=tmp_path / "undisturbed", shard_rows=1)
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / RECIPE)]
    command += ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(tiny_rows_path), "--output_dir", str(out)]
    command += ["--dtype", "float32", "--shard_rows", "1", "--batch_tokens", "400", "--num_workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "log", "wb") as log:
        ranks = [subprocess.Popen(command, env=environment | {"RANK": rank}, stdout=log, stderr=log) for rank in ("0", "1")]
        deadline = time.monotonic() + 120
        while not list(out.glob("shard-*")) and ranks[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        for rank in ranks:
            rank.kill()
            rank.wait()
    finished = list(out.glob("shard-*"))
    assert 0 < len(finished) < 24, (tmp_path / "log").read_text()
    score(shard_rows=1)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_bad_rows_stop_or_are_left_out(score, tmp_path, tiny_rows_path):
    table = load_preferences(tiny_rows_path).table
    rows = table.to_list()
    rows[4]["chosen"] = rows[4]["rejected"]
    rows[15]["image"]["bytes"] = rows[15]["image"]["bytes"][:50]
    data = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(data)

    with pytest.raises(ValueError, match=r"2 of 24 rows cannot be used(.|\n)*15 +15 +image does not decode(.|\n)*--bad_rows skip"):
        score(data_path=data)
    assert not list((tmp_path / "out").glob("shard-*"))
    assert score(data_path=data, bad_rows="skip").rows == 22
    report = json.loads((tmp_path / "out" / "bad_rows.json").read_text())
    assert [row["position"] for row in report["bad_rows"]] == [4, 15]
    assert load_preferences(tmp_path / "out").table["idx"][:] == [str(number) for number in range(24) if number not in (4, 15)]


def test_a_lora_folder_is_scored_with_its_adapter(score, tmp_path, tiny_llava_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_path, dtype=torch.float32)
    torch.manual_seed(0)
    lora = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|down_proj)", init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "lora")
    score(max_rows=6, output_dir=tmp_path / "base")
    score(max_rows=6, model_name_or_path=tmp_path / "lora")
    stock = AutoModelForImageTextToText.from_pretrained(tiny_llava_path, dtype=torch.float32)
    assert_scored_like(PeftModel.from_pretrained(stock, tmp_path / "lora").eval(), tiny_llava_path, tmp_path / "out", 6)
    (line,) = explain_difference(read_reference(tmp_path / "base"), read_reference(tmp_path / "out"))
    assert line.startswith("weights: ") and str(tmp_path / "lora") in line


def test_own_columns_and_image_files(score, tmp_path, tiny_rows_path, capsys):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    with open(data / "rows.jsonl", "w") as file:
        for row in load_preferences(tiny_rows_path).table.select(range(6)).to_list():
            image = f"images/{row['image_path']}"
            (data / image).write_bytes(row["image"]["bytes"])
            file.write(json.dumps({"image": image, "q": row["question"], "chosen": row["chosen"], "rejected": row["rejected"]}) + "\n")
    score(data_path=data / "rows.jsonl", column_map="question=q")
    flags = training_flags(capsys.readouterr().out)
    assert flags["--column_map"] == "question=q" and flags["--image_root"] == str(data)
    scored = load_preferences(flags["--data_path"], column_map={"question": "q"}, image_root=flags["--image_root"])
    assert foreign_rows(scored, json.loads((tmp_path / "out" / "muffin_reference.json").read_text())["reference_id"]) == []
    assert scored.table.column_names[:4] == ["image", "q", "chosen", "rejected"] and scored.table[0]["image"].startswith("images/")


def test_the_checkpoints_own_prompt_is_the_default(score, tmp_path, tiny_llava_path):
    folder = shutil.copytree(tiny_llava_path, tmp_path / "model")
    (folder / "muffin_policy.json").write_text('{"prompt_name": "vicuna_v1"}')
    score(model_name_or_path=folder, max_rows=3)
    assert read_reference(tmp_path / "out")["encoding"]["prompt_name"] == "vicuna_v1"


def test_impossible_options_are_refused(score, capsys):
    with pytest.raises(ValueError, match="--batch_tokens 0"):
        score(batch_tokens=0)
    with pytest.raises(SystemExit):
        score(dtype="float16")
    assert "argument --dtype: invalid choice: 'float16'" in capsys.readouterr().err
