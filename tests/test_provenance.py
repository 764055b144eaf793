"""Reference ids and row keys: equal for the same policy and row, different after any mutation, and the difference is named."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch

from muffin import provenance
from muffin.pairs import REFERENCE_COLUMNS, PreferenceDataset, load_preferences
from muffin.policies import Checkpoint, PolicyOptions, load_adapter
from muffin.provenance import (
    Numerics,
    describe_reference,
    explain_difference,
    foreign_rows,
    hash_fields,
    hash_files,
    logps_key,
    read_reference,
    reference_id,
    resolve_numerics,
    weights_id,
)
from tests.tiny import tiny_llava

FP32 = Numerics("float32", None, None, "sdpa")


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """Files that are really read, in order."""
    files: list[Path] = []
    sha256 = provenance._sha256

    def count(file: Path) -> str:
        files.append(file)
        return sha256(file)

    monkeypatch.setattr(provenance, "_sha256", count)
    return files


@pytest.fixture
def describe(tiny_llava_path, tmp_path):
    """describe(checkpoint folder, numerics, **PolicyOptions) -> description; by default of the tiny model in float32."""

    def function(folder: Path = tiny_llava_path, numerics: Numerics = FP32, **options) -> dict:
        checkpoint = Checkpoint(folder)
        return describe_reference(checkpoint, load_adapter(checkpoint, PolicyOptions(**options)), numerics, tmp_path / "cache")

    return function


# --- numerics


@pytest.mark.parametrize(
    ("dtype", "bits", "lora_enable", "weights", "autocast"),
    [
        ("float32", None, False, "float32", None),
        ("float32", None, True, "float32", None),
        ("bfloat16", None, False, "float32", "bfloat16"),
        ("bfloat16", None, True, "bfloat16", "bfloat16"),
        ("bfloat16", 4, True, "nf4", "bfloat16"),
    ],
)
def test_numerics(dtype, bits, lora_enable, weights, autocast):
    numerics = resolve_numerics(dtype=dtype, bits=bits, lora_enable=lora_enable, device_type="cpu")
    assert numerics == Numerics(weights, autocast, bits, "sdpa")
    assert numerics.load_dtype == (torch.float32 if weights == "float32" else torch.bfloat16)


def test_auto_dtype_follows_the_processor(monkeypatch):
    for computes, autocast in ((True, "bfloat16"), (False, None)):
        monkeypatch.setattr(provenance, "_computes_bfloat16", lambda device_type, computes=computes: computes)
        assert resolve_numerics(dtype="auto", bits=None, lora_enable=False, device_type="cpu").autocast_dtype == autocast


def test_unknown_numerics_are_refused():
    with pytest.raises(ValueError, match="--dtype is 'fp8'"):
        resolve_numerics(dtype="fp8", bits=None, lora_enable=False)
    with pytest.raises(ValueError, match="--bits is 8"):
        resolve_numerics(dtype="float32", bits=8, lora_enable=False)


def test_autocast_is_what_the_numerics_say_whatever_stands_around():
    matrix = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), FP32.autocast("cpu"):
        assert (matrix @ matrix).dtype == torch.float32
    with Numerics("float32", "bfloat16", None, "sdpa").autocast("cpu"):
        assert (matrix @ matrix).dtype == torch.bfloat16


# --- hashes of files and weights


def test_hash_fields_do_not_join():
    assert hash_fields(["ab", "c"]) != hash_fields(["a", "bc"])
    assert hash_fields(["ab", ""]) != hash_fields(["ab"])
    assert hash_fields(["é"]) == hash_fields(["é".encode()])
    # sha256 of 8 length bytes (2) and b"ab", by hand: printf '\0\0\0\0\0\0\0\2ab' | sha256sum
    assert hash_fields(["ab"]) == "9caccc24b5d7e06c21c0277b6530d666"


def test_files_are_hashed_again_only_when_they_change(tmp_path, hashed):
    file, other, cache = tmp_path / "a", tmp_path / "b", tmp_path / "cache"
    file.write_bytes(b"")
    other.write_bytes(b"x")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
    assert hash_files([file], cache) == [empty]
    assert hash_files([other, file], cache)[1] == empty
    assert hashed == [file, other]
    file.write_bytes(b"x")
    assert hash_files([file], cache) == hash_files([other], cache)
    assert hashed == [file, other, file]


def test_a_broken_or_unusable_cache_is_no_obstacle(tmp_path, caplog):
    file = tmp_path / "a"
    file.write_bytes(b"x")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes.json").write_text('{"half a file')
    digest = hash_files([file], tmp_path / "cache")
    assert hash_files([file], file / "cache") == digest  # a folder below a file cannot be made
    assert "file hashes are not cached" in caplog.text


def test_unreadable_files_are_an_error_and_not_a_missing_cache(tmp_path):
    with pytest.raises(FileNotFoundError):
        hash_files([tmp_path / "gone"], tmp_path / "cache")


def test_weights_id_covers_weights_and_meaning_of_config(tiny_llava_path, tmp_path, hashed):
    folder, cache = shutil.copytree(tiny_llava_path, tmp_path / "model"), tmp_path / "cache"
    original = weights_id(Checkpoint(tiny_llava_path), cache)
    assert weights_id(Checkpoint(folder), cache) == original  # not the path
    config = json.loads((folder / "config.json").read_text())

    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "0.0", "dtype": "float16"}))
    assert weights_id(Checkpoint(folder), cache) == original
    (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -1}))
    assert weights_id(Checkpoint(folder), cache) != original
    (folder / "config.json").write_text(json.dumps(config))
    assert len(hashed) == 2

    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert weights_id(Checkpoint(folder), cache) != original
    assert len(hashed) == 3


def test_weights_id_covers_the_lora_adapter(tiny_llava_path, tmp_path):
    lora, cache = tmp_path / "lora", tmp_path / "cache"
    lora.mkdir()
    (lora / "adapter_model.safetensors").write_bytes(b"weights")
    config = {"lora_alpha": 16, "r": 64, "base_model_name_or_path": "here", "inference_mode": True}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    adapted = weights_id(Checkpoint(tiny_llava_path, lora), cache)
    assert adapted != weights_id(Checkpoint(tiny_llava_path), cache)
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "there"}))
    assert weights_id(Checkpoint(tiny_llava_path, lora), cache) == adapted
    (lora / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 32}))
    assert weights_id(Checkpoint(tiny_llava_path, lora), cache) != adapted


def test_weights_of_sharded_checkpoints_are_those_in_the_index(tiny_llava_path, tmp_path):
    folder = shutil.copytree(tiny_llava_path, tmp_path / "model")
    for name in ("model-1.safetensors", "model-2.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / name)
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = weights_id(Checkpoint(folder), tmp_path / "cache")
    (folder / "model.safetensors").unlink()  # not in the index
    assert weights_id(Checkpoint(folder), tmp_path / "cache") == sharded
    (folder / "model-2.safetensors").write_bytes(b"")
    assert weights_id(Checkpoint(folder), tmp_path / "cache") != sharded


def test_a_checkpoint_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no weights \(\*.safetensors or pytorch_model\*.bin\)"):
        weights_id(Checkpoint(tmp_path), tmp_path / "cache")


# --- the reference id and what it tells apart


def test_reference_id_is_a_function_of_the_policy(describe, tiny_llava_path, tmp_path):
    description = describe()
    stored = json.loads(json.dumps(description))
    assert explain_difference(stored, describe()) == []
    assert reference_id(stored) == reference_id(description) == reference_id(describe())
    moved = describe(shutil.copytree(tiny_llava_path, tmp_path / "elsewhere"))
    assert reference_id(moved) == reference_id(description)
    assert moved["environment"] != description["environment"]


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({"image_aspect_ratio": "crop"}, ["image_aspect_ratio: ", "with pad", "has crop", "--image_aspect_ratio pad"]),
        ({"prompt_name": "vicuna_v1"}, ["prompt_name: ", "with llava_v1", "has vicuna_v1", "--prompt_name llava_v1"]),
        ({"model_max_length": 1024}, ["model_max_length: ", "with 2048", "has 1024", "--model_max_length 2048"]),
        ({"numerics": Numerics("float32", "bfloat16", None, "sdpa")}, ["autocast_dtype: ", "with None", "has bfloat16", "--dtype float32"]),
    ],
)
def test_other_options_are_named_with_their_flag(describe, now, named):
    stored, current = describe(), describe(**now)
    assert reference_id(stored) != reference_id(current)
    (line,) = explain_difference(stored, current)
    assert all(part in line for part in named), line


@pytest.mark.parametrize(
    ("stored", "flags"),
    [
        (Numerics("float32", "bfloat16", None, "sdpa"), "--dtype bfloat16 --lora_enable False"),
        (Numerics("bfloat16", "bfloat16", None, "sdpa"), "--dtype bfloat16 --lora_enable True"),
        (Numerics("nf4", "bfloat16", 4, "sdpa"), "--bits 4"),
        (Numerics("float32", None, None, "sdpa"), "--dtype float32"),
    ],
)
def test_flags_lead_to_the_stored_numerics(describe, stored, flags):
    current = describe()
    lines = explain_difference(current | {"numerics": asdict(stored)}, current | {"numerics": asdict(Numerics("fp8", "fp8", 8, "sdpa"))})
    assert len(lines) == sum(ours != theirs for ours, theirs in zip(asdict(stored).values(), ("fp8", "fp8", 8, "sdpa"), strict=True))
    assert all(line.endswith(flags) for line in lines)


def test_another_model_is_named(describe, tiny_llava_path, tmp_path):
    folder = tiny_llava(tmp_path / "other", seed=1, sentencepiece_model=tiny_llava_path / "tokenizer.model")
    (line,) = explain_difference(describe(), describe(folder))
    assert line.startswith("weights: ") and str(tiny_llava_path) in line and str(folder) in line and "--model_name_or_path" in line


def test_another_tokenizer_is_named(describe, tiny_llava_path, tmp_path):
    folder = shutil.copytree(tiny_llava_path, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (line,) = explain_difference(describe(), describe(folder))
    assert line.startswith("tokenizer: ") and "--model_name_or_path" in line


def test_the_probe_sees_what_no_setting_names(describe, tiny_llava_path, tmp_path):
    folder = shutil.copytree(tiny_llava_path, tmp_path / "other")
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (folder / "processor_config.json").write_text(json.dumps(processor))
    stored, current = describe(), describe(folder)
    assert reference_id(stored) != reference_id(current)
    stored["environment"]["pillow"] = "1.0"
    (line,) = explain_difference(stored, current)
    assert line.startswith("probe") and "pillow 1.0 -> " in line


def test_the_tokenizers_call_state_is_no_difference(tiny_llava_path, tmp_path):
    checkpoint = Checkpoint(tiny_llava_path)
    adapter = load_adapter(checkpoint, PolicyOptions())
    before = describe_reference(checkpoint, adapter, FP32, tmp_path)
    adapter.tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=3)
    assert reference_id(describe_reference(checkpoint, adapter, FP32, tmp_path)) == reference_id(before)


def test_the_reference_is_read_beside_the_data(tmp_path):
    assert read_reference(tmp_path) is None
    (tmp_path / "muffin_reference.json").write_text('{"reference": {"weights": "w"}}')
    assert read_reference(tmp_path) == read_reference(tmp_path / "shard.parquet") == {"weights": "w"}


# --- keys of rows


def test_key_changes_with_every_part():
    row = {"reference_id": "r", "image_bytes": b"image", "question": "q", "chosen": "a", "rejected": "b"}
    changes = [{}, {"reference_id": "s"}, {"image_bytes": b"imagf"}, {"question": "p"}, {"chosen": "a "}, {"chosen": "b", "rejected": "a"}]
    changes += [{"question": "qa", "chosen": ""}]  # the same characters, cut elsewhere
    assert len({logps_key(**row | change) for change in changes}) == len(changes)


def with_keys(dataset: PreferenceDataset, reference: str) -> datasets.Dataset:
    pairs = [dataset[position] for position in range(len(dataset))]
    keys = [logps_key(reference, pair.image_bytes, pair.question, pair.chosen, pair.rejected) for pair in pairs]
    table = dataset.table.add_column("logps_key", keys)
    for name in REFERENCE_COLUMNS:
        table = table.add_column(name, [[-1.0] if "token" in name else -1.0] * len(table))
    return table


def test_foreign_rows(tiny_rows_path):
    table = with_keys(load_preferences(tiny_rows_path), "reference")

    def foreign(table: datasets.Dataset, reference: str = "reference") -> list[int]:
        return foreign_rows(PreferenceDataset(table), reference)

    everything = list(range(24))
    assert foreign(table) == []
    assert foreign(table.select([3, 17, 4])) == []
    assert foreign(table.shuffle(seed=0)) == []
    assert foreign(datasets.concatenate_datasets([table.select(range(5)), table])) == []
    assert foreign(table, "another reference") == everything
    assert foreign(table.remove_columns("logps_key")) == everything

    swapped = table.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    assert foreign(swapped) == everything
    answers = table["chosen"][:]
    edited = [*answers[:5], answers[5] + ".", *answers[6:]]
    assert foreign(table.remove_columns("chosen").add_column("chosen", edited)) == [5]
    permuted = table.remove_columns("logps_key").add_column("logps_key", table["logps_key"][1:] + table["logps_key"][:1])
    assert foreign(permuted) == everything
    broken = table.remove_columns("chosen").add_column("chosen", [None, *answers[1:]])
    assert foreign(broken) == [0]
