"""Log-probs of another policy, other rows or another mask are refused, by key or by the gate, with a message that names what differs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muffin.pairs import PreferencePair, load_preferences
from muffin.policies import Checkpoint, PolicyAdapter, PolicyOptions, load_adapter, load_policy
from muffin.provenance import Numerics, describe_reference, foreign_rows, read_reference, reference_id
from muffin.reference_gate import (
    ForeignLogpsError,
    check_reference,
    gate_tolerance,
    refuse_foreign_rows,
    spread_positions,
)
from tests.scored import FP32, scored_rows, six_values, write_rows
from tests.tiny import tiny_llava, write_parquet

ROWS = 9


@pytest.fixture(scope="module")
def rows_and_reference(tiny_llava_path, tmp_path_factory):
    return scored_rows(tiny_llava_path, write_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", ROWS))


@pytest.fixture(scope="module")
def scored(rows_and_reference, tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("scored"), *rows_and_reference)


@pytest.fixture(scope="module")
def adapter(tiny_llava_path) -> PolicyAdapter:
    return load_adapter(Checkpoint(tiny_llava_path), PolicyOptions())


@pytest.fixture(scope="module")
def model(tiny_llava_path, adapter):
    return load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32)


def refuse(folder: Path, current: dict) -> None:
    dataset = load_preferences(folder)
    foreign = foreign_rows(dataset, reference_id(current))
    refuse_foreign_rows(dataset, foreign, stored=read_reference(folder), current=current, scoring_command="python SCORE")


def describe(model_path: Path, numerics: Numerics = FP32, **options) -> dict:
    checkpoint = Checkpoint(model_path)
    return describe_reference(checkpoint, load_adapter(checkpoint, PolicyOptions(**options)), numerics)


def test_own_rows_pass_in_any_order_and_number(rows_and_reference, scored, tiny_llava_path, tmp_path):
    rows, reference = rows_and_reference
    refuse(scored, describe(tiny_llava_path))
    refuse(write_rows(tmp_path / "shuffled", [rows[5], rows[0], rows[5], rows[3]], reference), reference)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt_name": "vicuna_v1"}, "prompt_name: stored log-probs were made with llava_v1, this run has vicuna_v1"),
        ({"image_aspect_ratio": "crop"}, "image_aspect_ratio: stored log-probs were made with pad, this run has crop"),
        ({"model_max_length": 512}, "model_max_length: stored log-probs were made with 2048, this run has 512"),
        (
            {"numerics": replace(FP32, autocast_dtype="bfloat16")},
            "autocast_dtype: stored log-probs were made with None, this run has bfloat16",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_named(scored, tiny_llava_path, options, named):
    with pytest.raises(ForeignLogpsError, match=f"{ROWS} of {ROWS} rows") as error:
        refuse(scored, describe(tiny_llava_path, **options))
    assert named in str(error.value) and "python SCORE" in str(error.value)


def test_another_model_is_named(scored, tmp_path):
    other = tiny_llava(tmp_path / "other", seed=1)
    with pytest.raises(ForeignLogpsError, match=rf"weights: .*--model_name_or_path .*{other}"):
        refuse(scored, describe(other))


def test_another_tokenizer_is_named(scored, tiny_llava_path, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_llava_path.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"fuse_unk": true', '"fuse_unk": false'))
    with pytest.raises(ForeignLogpsError, match="tokenizer: stored log-probs were made with"):
        refuse(scored, describe(other))


def test_changed_rows_are_listed(rows_and_reference, tmp_path):
    rows, reference = rows_and_reference
    rows = [dict(row) for row in rows]
    rows[2]["chosen"] += "!"
    with pytest.raises(ForeignLogpsError, match=r"1 of 9 rows .*: 2 \(idx 2\)\n.*the rows changed after they were scored"):
        refuse(write_rows(tmp_path / "edited", rows, reference), reference)
    swapped = [dict(row) | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    with pytest.raises(ForeignLogpsError, match="9 of 9 rows"):
        refuse(write_rows(tmp_path / "swapped", swapped, reference), reference)


def test_rows_without_keys_and_unreadable_rows(rows_and_reference, tmp_path):
    rows, reference = rows_and_reference
    plain = [{name: value for name, value in row.items() if name != "logps_key"} for row in rows]
    folder = write_rows(tmp_path / "plain", plain, reference)
    (folder / "muffin_reference.json").unlink()
    with pytest.raises(ForeignLogpsError, match=r"no key of this policy(.|\n)*--accept_foreign_logps True"):
        refuse(folder, reference)
    unreadable = [dict(row) for row in rows]
    unreadable[4]["chosen"] = ""
    refuse(write_rows(tmp_path / "unreadable", unreadable, reference), reference)  # the pre-flight names that row


# --- the gate proper: values that keys do not cover


def gate(model, adapter, pairs, accept_foreign_logps=False):
    return check_reference(
        model,
        adapter,
        pairs,
        numerics=FP32,
        beta=0.1,
        device=torch.device("cpu"),
        scoring_command="python SCORE",
        accept_foreign_logps=accept_foreign_logps,
    )


@pytest.fixture(scope="module")
def pairs(scored) -> list[PreferencePair]:
    dataset = load_preferences(scored)
    return [dataset[position] for position in range(6)]


def stores(pair: PreferencePair, chosen: list[float], rejected: list[float]) -> PreferencePair:
    return replace(pair, reference=replace(pair.reference, **six_values(torch.tensor(chosen), torch.tensor(rejected))))


def test_gate_passes_plain_log_probs(model, adapter, pairs):
    model.train()
    report = gate(model, adapter, pairs)
    assert report.rows == 6 and report.mean_difference < 2e-6 and abs(report.loss_minus_ln2) < 1e-5
    assert model.training  # as it was


def early(tokens: list[float]) -> list[float]:
    return [-9.0, *tokens[:-1]]


def late(tokens: list[float]) -> list[float]:
    return [*tokens[1:], -9.0]


MUTATIONS = {
    "swapped columns": (
        lambda pairs: [stores(p, p.ref_rej_per_token_logp, p.ref_win_per_token_logp) for p in pairs],
        "stored columns of chosen and rejected are swapped",
    ),
    "permuted values": (
        lambda pairs: [replace(p, reference=pairs[(n + 1) % len(pairs)].reference) for n, p in enumerate(pairs)],
        "idx 0 holds those of idx 1, idx 1 holds those of idx 2",
    ),
    "mask begins early": (
        lambda pairs: [stores(p, early(p.ref_win_per_token_logp), early(p.ref_rej_per_token_logp)) for p in pairs],
        "shifted by one: it begins a token too early",
    ),
    "mask begins late": (
        lambda pairs: [stores(p, late(p.ref_win_per_token_logp), late(p.ref_rej_per_token_logp)) for p in pairs],
        "shifted by one: it begins a token too late",
    ),
    "only the sums are off": (
        lambda pairs: [replace(p, reference=replace(p.reference, ref_win_logp=p.ref_win_logp * 1.0005)) for p in pairs],
        "made by another model, prompt",
    ),
    "not a number": (
        lambda pairs: [replace(p, reference=replace(p.reference, ref_win_logp=float("nan"))) for p in pairs],
        "differ by nan nats",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_gate_refuses(model, adapter, pairs, mutation):
    mutate, named = MUTATIONS[mutation]
    with pytest.raises(ForeignLogpsError) as error:
        gate(model, adapter, mutate(pairs))
    assert named in str(error.value) and "python SCORE" in str(error.value)
    table = [line.split() for line in str(error.value).splitlines() if line.startswith("4 ")]
    assert len(table) == 1 and float(table[0][2]) == pytest.approx(pairs[4].ref_win_logp, abs=1e-3)  # recomputed, whatever is stored


def test_gate_compares_sums_where_there_are_no_lists(model, adapter, pairs):
    def padded(pair: PreferencePair) -> PreferencePair:
        return replace(pair, reference=replace(pair.reference, ref_win_per_token_logp=None, ref_rej_per_token_logp=None))

    assert gate(model, adapter, [padded(pair) for pair in pairs]).mean_difference < 2e-6
    swapped = [padded(pair) for pair in MUTATIONS["swapped columns"][0](pairs)]
    with pytest.raises(ForeignLogpsError, match="are swapped"):
        gate(model, adapter, swapped)
    assert gate(model, adapter, swapped, accept_foreign_logps=True).mean_difference > 1e-2


def test_gate_refuses_a_blind_policy(tiny_llava_path, adapter, pairs):
    blind = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32)
    torch.nn.init.zeros_(blind.model.multi_modal_projector.linear_2.weight)
    with pytest.raises(ValueError, match="does not look at its images") as error:
        gate(blind, adapter, pairs, accept_foreign_logps=True)
    assert not isinstance(error.value, ForeignLogpsError)


def test_tolerances_and_positions():
    assert gate_tolerance(FP32) == 1e-5 and gate_tolerance(replace(FP32, autocast_dtype="bfloat16")) == 2e-3
    assert spread_positions(100, 4) == [0, 25, 50, 75] and spread_positions(3, 8) == [0, 1, 2]
