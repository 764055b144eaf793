"""The benchmark on a micro model: what it writes, that wrong variants are caught, and that variants cost what they are said to."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaConfig

from muffin.flops import Work, step_flops

# 4 image tokens, 2 decoder layers of width 128, responses of 7 to 11 tokens.
MICRO = "--hidden_size 128 --num_hidden_layers 2 --image_size 28 --response_tokens 9 --repeats 2".split()
KEYS = {"cell", "mode", "variant", "seconds_median", "seconds_min", "seconds_max", "pairs_per_second", "peak_mb", "ratio_to_muffin"}
ALL_VARIANTS = ["muffin", "rlaifv", "trl", "trl_lean"]


@pytest.fixture
def recipe(load_recipe):
    return load_recipe("train/benchmark.py")


@pytest.fixture
def quick_memory(recipe, monkeypatch):
    """Memory without a process for every variant."""
    monkeypatch.setattr(recipe, "memory_growth_of_process", lambda options: {"muffin": 50.0}.get(options.variants[0], 100.0))


def problem(recipe, cell="v2k", mode="full", **options):
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "image_size": 28, "response_tokens": 9}
    return recipe.Problem(recipe.BenchmarkOptions(**sizes, **options), recipe.CELLS[cell], mode)


def test_results(recipe, quick_memory, tmp_path, capsys):
    output = tmp_path / "new" / "benchmark.json"
    flags = ["--cells", "v2k", "v2k_group2", "--variants", "muffin", "rlaifv", "--output", str(output)]
    rows = recipe.main([*MICRO, *flags])
    assert json.loads(output.read_text()) == rows
    keys = [(row["cell"], row["mode"], row["variant"]) for row in rows]
    runs = [("v2k", "full"), ("v2k", "lora"), ("v2k", "score"), ("v2k_group2", "full"), ("v2k_group2", "score")]
    assert keys == [(*run, variant) for run in runs for variant in ("muffin", "rlaifv")]
    for row in rows:
        assert set(row) >= KEYS
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        pairs = {"v2k": 1, "v2k_group2": 2}[row["cell"]]
        assert row["pairs_per_second"] == pytest.approx(pairs / row["seconds_median"])
        assert row["peak_mb"] == {"muffin": 50.0, "rlaifv": 100.0}[row["variant"]]
        flops_per_second = row["gflop_per_pair"] * row["pairs_per_second"]
        assert row["share_of_gemm_rate"] == pytest.approx(flops_per_second / row["gemm_gflop_per_second"])
    assert [row["ratio_to_muffin"] for row in rows if row["variant"] == "muffin"] == [1.0] * 5
    printed = capsys.readouterr().out
    assert printed.count("rlaifv") == 5 and "v2k_group2 score" in printed


@pytest.mark.parametrize("mode", ["full", "lora", "score"])
@pytest.mark.parametrize("cell", ["v2k", "v2k_batch4"])
def test_variants_agree_on_a_loss_that_tells_them_apart(recipe, mode, cell):
    pytest.importorskip("trl")
    pairs = problem(recipe, cell, mode)
    stored = recipe.reference_logps(pairs)
    variants = {name: recipe.VARIANTS[name](pairs, stored) for name in ALL_VARIANTS}
    losses = {name: variant.check_loss() for name, variant in variants.items()}
    recipe.check_agreement(losses)
    assert abs(losses["muffin"] - math.log(2)) > 10 * recipe.LOSS_TOLERANCE  # the loss of a policy that is still its reference
    for variant in variants.values():
        before = [parameter.detach().clone() for parameter in variant.model.parameters()]
        variant.step()
        changed = [not torch.equal(old, new) for old, new in zip(before, variant.model.parameters(), strict=True)]
        trained = [parameter.requires_grad for parameter in variant.model.parameters()]
        assert not any(change and not train for change, train in zip(changed, trained, strict=True))
        assert any(changed) == (mode != "score")


def test_steps_of_all_variants_move_the_weights_alike(recipe):
    """Not the loss alone: after a step the policies are still the same."""
    pytest.importorskip("trl")
    pairs = problem(recipe)
    stored = recipe.reference_logps(pairs)
    gradients = {}
    for name in ALL_VARIANTS:
        variant = recipe.VARIANTS[name](pairs, stored)
        variant.backward()
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in variant.trained if parameter.grad is not None])
    for name in ALL_VARIANTS[1:]:
        error = (gradients[name] - gradients["muffin"]).norm() / gradients["muffin"].norm()
        assert error < 1e-4, name


def test_a_wrong_variant_stops_the_benchmark_before_timing(recipe, quick_memory, monkeypatch, tmp_path):
    class Broken(recipe.RlaifV):
        def loss(self):
            return super().loss() + 2e-4

        def step(self):
            raise AssertionError("timed although it is wrong")

    monkeypatch.setitem(recipe.VARIANTS, "rlaifv", Broken)
    output = tmp_path / "benchmark.json"
    flags = ["--cells", "v2k", "--modes", "full", "--variants", "muffin", "rlaifv", "--output", str(output)]
    with pytest.raises(RuntimeError, match="differ by more than 0.0001 from muffin's .*: rlaifv"):
        recipe.main([*MICRO, *flags])
    assert not output.exists()


def test_agreement_refuses_nan_and_takes_rounding(recipe):
    recipe.check_agreement({"muffin": 0.7, "rlaifv": 0.70005})
    with pytest.raises(RuntimeError, match="rlaifv nan"):
        recipe.check_agreement({"muffin": 0.7, "rlaifv": float("nan")})


def test_rounds_take_turns_and_leave_out_the_warm_up(recipe, monkeypatch):
    order = []

    class Timed:
        def __init__(self, name):
            self.name = name

        def step(self):
            order.append(self.name)
            ticks[0] += {"a": 2.0, "b": 3.0}[self.name] + 10 * (len(order) <= 2)

    ticks = [0.0]
    monkeypatch.setattr(recipe, "clock", lambda device: ticks[0])
    monkeypatch.setattr(recipe, "gemm_flops_per_second", lambda options: 1.0)
    seconds, rate = recipe.time_rounds({"a": Timed("a"), "b": Timed("b")}, recipe.BenchmarkOptions(repeats=3))
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [2.0] * 3, "b": [3.0] * 3}
    assert rate == 1.0


def test_flops_of_every_variant(recipe):
    """From the pair's own lengths: a prompt of 44 tokens (4 of the image), answers of c and r tokens."""
    pytest.importorskip("trl")
    pairs = problem(recipe)
    c, r = (len(response) for response in pairs.encoded[0].response_ids)
    assert len(pairs.encoded[0].prompt_ids) == 44 and c != r
    length = 44 + max(c, r)
    model = LlavaConfig()
    count = {name: recipe.VARIANTS[name](pairs, recipe.reference_logps(pairs)).flops(model) for name in ALL_VARIANTS}

    prefix = 44 * 45 // 2
    branches = (c - 1) * 44 + c * (c - 1) // 2 + (r - 1) * 44 + r * (r - 1) // 2
    assert count["muffin"] == step_flops(model, Work(1, 44 + c - 1 + r - 1, prefix + branches, c + r - 1), "full")
    attended = 2 * length * (length + 1) // 2
    plain = Work(2, 2 * length, attended, 2 * length)
    assert count["rlaifv"] == step_flops(model, plain, "full")
    head_row = 2 * 4096 * 32000
    # TRL scores all but the last position, recomputes the logits in backward and runs the reference model
    scored = Work(2, 2 * length, attended, 2 * (length - 1))
    assert count["trl"] == step_flops(model, scored, "full") + 2 * (length - 1) * head_row + step_flops(model, scored, "score")
    lean = Work(2, 2 * length, attended, c + r)
    assert count["trl_lean"] == step_flops(model, lean, "full") + (c + r) * head_row


def memory_options(recipe):
    return problem(recipe, memory_only=True, cells=["v2k_group2"], modes=["score"], variants=["rlaifv"]).options


def test_memory_process_gets_every_option(recipe, monkeypatch, capsys):
    options = replace(memory_options(recipe), dtype="bfloat16", num_threads=1)
    started, measured = [], []

    def run(command, env, check, stdout, text):
        assert env["MALLOC_MMAP_THRESHOLD_"] and check and text
        started.append(command[:2])
        recipe.main(command[2:])
        return SimpleNamespace(stdout="a library's line\n" + capsys.readouterr().out)

    def memory_growth(options):
        measured.append(options)
        return 12.5

    monkeypatch.setattr(recipe.subprocess, "run", run)
    monkeypatch.setattr(recipe, "memory_growth", memory_growth)
    monkeypatch.setattr(recipe.sys, "platform", "linux")
    assert recipe.memory_growth_of_process(options) == 12.5
    assert started == [[sys.executable, recipe.__file__]] and measured == [options]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_growth_is_of_the_step(recipe, monkeypatch):
    """A step that allocates 64 MB more must show, also when it gives them back."""
    options = memory_options(recipe)
    plain = recipe.memory_growth(options)

    class Wasteful(recipe.RlaifV):
        def logps(self):
            torch.ones(16_000_000)
            return super().logps()

    monkeypatch.setitem(recipe.VARIANTS, "rlaifv", Wasteful)
    assert 50 < recipe.memory_growth(options) - plain < 80


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_measured_in_a_process_of_its_own(recipe):
    assert 0 < recipe.memory_growth_of_process(memory_options(recipe)) < 200


def test_bfloat16_runs_under_autocast(recipe):
    pairs = problem(recipe, dtype="bfloat16")
    stored = recipe.reference_logps(pairs)
    variant = recipe.VARIANTS["muffin"](pairs, stored)
    seen = []
    variant.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    variant.check_loss()
    variant.step()
    assert seen == [torch.float32, torch.bfloat16]
    assert all(parameter.dtype == torch.float32 for parameter in variant.model.parameters())


def test_quick_is_one_cell(recipe, monkeypatch):
    runs = []
    monkeypatch.setattr(recipe, "run_cell", lambda options, cell, mode: runs.append((cell, mode, options.repeats)) or [])
    monkeypatch.setattr(recipe, "print_rows", lambda rows: None)
    recipe.main(["--quick", "True"])
    assert runs == [("v2k", "full", 2)]


def test_without_trl(recipe, quick_memory, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    rows = recipe.main([*MICRO, "--cells", "v2k", "--modes", "score"])
    assert [row["variant"] for row in rows] == ["muffin", "rlaifv"]
    assert "trl" in capsys.readouterr().out.lower()


def test_7b_cell_is_llava_7b(recipe):
    config = recipe.llava_config(recipe.BenchmarkOptions(hidden_size=4096, num_hidden_layers=32), 32000)
    llava = LlavaConfig()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(config.text_config, name) == getattr(llava.text_config, name), name
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
        assert getattr(config.vision_config, name) == getattr(llava.vision_config, name), name


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--cells", "v3k"], "--cells v3k is unknown"),
        (["--variants", "rlaifv"], "--variants rlaifv lacks muffin"),
        (["--hidden_size", "100"], "--hidden_size 100 must be a multiple of 128"),
    ],
)
def test_bad_options(recipe, flags, message):
    with pytest.raises(ValueError, match=message):
        recipe.main(flags)
