"""--bits 4 end to end on a tiny LLaVA: scored and trained in nf4, from ln 2, only the adapter moves; other log-probs are refused."""

import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import nn

from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint
from muffin.reference_gate import ForeignLogpsError
from muffin.trainer import DPOTrainer
from tests.tiny import write_parquet

LAYERS = 2  # of the tiny language model; each has q, k, v, o, gate, up and down projections
QLORA = ["--lora_enable", "True", "--bits", "4"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", 8)


@pytest.fixture(scope="module")
def score(load_recipe, tiny_llava_path, rows):
    def run(output_dir: Path, *flags: str) -> Path:
        given = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(rows), "--output_dir", str(output_dir)]
        load_recipe("eval/muffin_inference_logp.py").main([*given, "--num_workers", "0", *flags])
        return output_dir

    return run


@pytest.fixture(scope="module")
def scored(score, tmp_path_factory) -> Path:
    return score(tmp_path_factory.mktemp("scored") / "nf4", "--bits", "4")


@pytest.fixture(scope="module")
def train(load_recipe, tiny_llava_path, scored):
    def run(output_dir: Path, *flags: str):
        given = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(output_dir)]
        settings = ["--per_device_train_batch_size", "2", "--logging_steps", "1", "--disable_tqdm", "True", "--save_strategy", "no"]
        return load_recipe("train/dpo.py").main([*given, *settings, "--lora_r", "8", "--learning_rate", "1e-3", *flags])

    return run


def losses(state) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}


def test_only_the_language_models_linears_are_quantised(tiny_llava_path):
    checkpoint = resolve_checkpoint(tiny_llava_path)
    policy = load_policy(checkpoint, load_adapter(checkpoint, PolicyOptions()), dtype=torch.bfloat16, bits=4)
    assert policy.config.text_config.num_hidden_layers == LAYERS
    packed = [name for name, module in policy.named_modules() if isinstance(module, Linear4bit)]
    plain = [name for name, module in policy.named_modules() if type(module) is nn.Linear]
    assert len(packed) == 7 * LAYERS and all(name.startswith("model.language_model.layers.") for name in packed)
    assert "lm_head" in plain and sum("multi_modal_projector" in name for name in plain) == 2
    assert any("vision_tower" in name for name in plain)
    weight = policy.get_submodule(packed[0]).weight
    assert (weight.quant_type, weight.quant_state.nested, weight.dtype) == ("nf4", True, torch.uint8)
    assert policy.get_submodule(packed[0]).compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    "flags", [[], ["--optim", "paged_adamw_8bit", "--activation_checkpointing", "True"]], ids=["adamw", "paged_8bit_checkpointing"]
)
def test_starts_at_ln2_and_trains_the_adapter_alone(flags, train, tmp_path, monkeypatch):
    kept = {}
    build = DPOTrainer.__init__

    def remember(self, model, *args, **kwargs):
        kept["model"], kept["before"] = model, {name: value.detach().clone() for name, value in model.named_parameters()}
        build(self, model, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "__init__", remember)
    by_step = losses(train(tmp_path / "run", "--max_steps", "20", *QLORA, *flags))
    assert by_step[1] == pytest.approx(math.log(2), abs=5e-3)
    assert sum(by_step[step] for step in range(16, 21)) / 5 < 0.6

    after = dict(kept["model"].named_parameters())
    changed = {name for name, value in kept["before"].items() if not torch.equal(value, after[name])}
    adapter = {name for name in after if ".lora_" in name}
    assert changed == adapter and len(adapter) == 2 * 7 * LAYERS
    assert {after[name].dtype for name in adapter} == {torch.float32}
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * LAYERS and all(value.abs().max() > 0 for value in saved.values())


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_fine_tuning_learns_the_answers(optim, load_recipe, tiny_llava_path, rows, tmp_path):
    """train/sft.py: the mean loss of an epoch falls by half a nat, the optimizer's state has 8 bits, and the adapter is saved."""
    given = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(rows), "--output_dir", str(tmp_path / "run")]
    settings = ["--per_device_train_batch_size", "2", "--logging_steps", "1", "--disable_tqdm", "True", "--save_strategy", "epoch"]
    settings += ["--lora_r", "64", "--lora_dropout", "0", "--learning_rate", "1e-2", "--num_train_epochs", "3", "--optim", optim]
    by_step = losses(load_recipe("train/sft.py").main([*given, *settings, *QLORA]))
    assert len(by_step) == 12
    assert sum(by_step[step] for step in range(9, 13)) < sum(by_step[step] for step in range(1, 5)) - 4 * 0.5
    states = torch.load(tmp_path / "run" / "checkpoint-12" / "optimizer.pt", weights_only=False)["state"].values()
    assert any("uint8" in str(state) for state in states) == ("8bit" in optim)  # tensors with less than 4,096 numbers keep float32
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * LAYERS and all(value.abs().max() > 0 for value in saved.values())


def test_the_reference_without_its_adapter_is_quantised_too(train, rows, tmp_path):
    """Losses as with log-probs that were scored with --bits 4, from rows that store none."""
    stored = losses(train(tmp_path / "stored", "--max_steps", "3", "--lora_dropout", "0", *QLORA))
    flags = ["--data_path", str(rows), "--reference", "adapter_disabled", "--max_steps", "3", "--lora_dropout", "0", *QLORA]
    assert losses(train(tmp_path / "without", *flags)) == pytest.approx(stored, abs=2e-2)


def test_a_resumed_run_equals_the_uninterrupted_one(train, tmp_path):
    flags = [*QLORA, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    whole = losses(train(tmp_path / "run", *flags))
    again = losses(train(tmp_path / "run", *flags, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")))
    assert [again[step] for step in (3, 4)] == [whole[step] for step in (3, 4)]


def test_gradients_are_those_of_the_dequantised_weights(tiny_llava_path):
    """A forward in eval mode first, as the reference gate does; then d(sum of logits)/d(embeddings) against plain linears."""
    checkpoint = resolve_checkpoint(tiny_llava_path)
    policy = load_policy(checkpoint, load_adapter(checkpoint, PolicyOptions()), dtype=torch.float32, bits=4).eval()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        policy(input_ids=ids)
    policy.train()

    def embedding_gradient() -> torch.Tensor:
        embeddings = policy.get_input_embeddings()(ids).detach().requires_grad_(True)
        policy(inputs_embeds=embeddings).logits.square().sum().backward()
        return embeddings.grad

    found = embedding_gradient()
    for name, module in list(policy.named_modules()):
        if isinstance(module, Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(dequantize_4bit(module.weight, module.weight.quant_state).float())
            policy.set_submodule(name, plain)
    expected = embedding_gradient()
    assert (found - expected).norm() < 0.05 * expected.norm()  # bfloat16 rounding inside the quantised linears


def test_log_probs_of_the_exact_weights_are_foreign(train, score, tmp_path):
    for dtype in ("float32", "bfloat16"):
        exact = score(tmp_path / dtype, "--dtype", dtype, "--lora_enable", "True")
        with pytest.raises(ForeignLogpsError, match=r"muffin_inference_logp\.py .*--lora_enable True --bits 4"):
            train(tmp_path / "run", "--data_path", str(exact), *QLORA)
    with pytest.raises(ForeignLogpsError, match="mended by --bits 4"):
        train(tmp_path / "run", "--lora_enable", "True")


def test_scoring_prints_the_training_command(score, train, tmp_path, capsys):
    score(tmp_path / "scored", "--bits", "4")
    assert "--lora_enable True --bits 4 --learning_rate 1e-5" in capsys.readouterr().out


def test_a_trained_adapter_is_a_policy_in_full_precision_only(train, score, tmp_path):
    train(tmp_path / "run", "--max_steps", "1", *QLORA)
    score(tmp_path / "next", "--model_name_or_path", str(tmp_path / "run"), "--dtype", "float32")
    with pytest.raises(ValueError, match="is a LoRA adapter, which --bits 4 would round"):
        score(tmp_path / "refused", "--model_name_or_path", str(tmp_path / "run"), "--bits", "4")
    assert not (tmp_path / "refused").exists()


def test_contradictions_are_refused(train, tmp_path):
    for flags, message in (
        (["--bits", "4"], "--bits 4 needs --lora_enable True"),
        (["--bits", "8", "--lora_enable", "True"], "--bits is 8, expected 4"),
        ([*QLORA, "--merge_lora", "True"], "--merge_lora True contradicts --bits 4"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", *flags)
