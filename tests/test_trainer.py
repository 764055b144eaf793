"""DPOTrainer against loops over the plain form: gradients for any split of a step, metrics, evaluation; and what must stop a run."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from muffin.batches import ShuffledRows
from muffin.checkpoints import last_checkpoint
from muffin.losses import changed_segment_weights
from muffin.pairs import PreferenceDataset, load_preferences
from muffin.policies import Checkpoint, PolicyAdapter, PolicyOptions, encode_pair, load_adapter, load_policy
from muffin.policy_trainer import add_lora, freeze
from muffin.trainer import DPOArguments, DPOTrainer
from muffin.training_run import LoraOptions, ModelOptions, check_options
from tests.scored import plain_token_logps, scored_rows, write_rows
from tests.tiny import tiny_llava, write_parquet

ROWS = 12
BETA = 0.1


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    """The reference: not the policy, so that rewards are far from 0 and pairs weigh differently in the gradient."""
    return tiny_llava(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def rows_and_reference(other_model, tmp_path_factory):
    return scored_rows(other_model, write_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", ROWS))


@pytest.fixture(scope="module")
def reference(rows_and_reference) -> dict:
    return rows_and_reference[1]


@pytest.fixture(scope="module")
def dataset(rows_and_reference, tmp_path_factory) -> PreferenceDataset:
    return load_preferences(write_rows(tmp_path_factory.mktemp("scored"), *rows_and_reference))


@pytest.fixture(scope="module")
def adapter(tiny_llava_path) -> PolicyAdapter:
    return load_adapter(Checkpoint(tiny_llava_path), PolicyOptions())


@pytest.fixture
def model(tiny_llava_path, adapter) -> nn.Module:
    policy = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32)
    freeze(policy, adapter.spec.frozen_modules)
    return policy


def arguments(output_dir: Path, **given) -> DPOArguments:
    defaults = {
        "dtype": "float32",
        "accept_foreign_logps": True,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "reference_check_rows": 1,
    }
    return DPOArguments(output_dir=str(output_dir), **(defaults | given))


def trainer_of(model, args, adapter, dataset, reference, eval_dataset=None, callbacks=None) -> DPOTrainer:
    return DPOTrainer(model, args, adapter, dataset, eval_dataset, reference=reference, scoring_command="python SCORE", callbacks=callbacks)


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


# --- the loss is the mean over the step's pairs


@pytest.fixture(scope="module")
def plain_gradients(tiny_llava_path, adapter, dataset) -> list[dict[str, Tensor]]:
    """Of two steps at the same weights: the first 8 rows of the order, then the ragged rest of 4, one row at a time."""
    policy = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32)
    freeze(policy, adapter.spec.frozen_modules)
    order = list(ShuffledRows(ROWS, seed=42))
    steps = []
    for positions in (order[:8], order[8:]):
        policy.zero_grad()
        for position in positions:
            pair = dataset[position]
            chosen, rejected = (tokens.sum() for tokens in plain_token_logps(policy, adapter, pair))
            margin = BETA * ((chosen - pair.ref_win_logp) - (rejected - pair.ref_rej_logp))
            (torch.log1p(torch.exp(-margin)) / len(positions)).backward()
        steps.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    return steps


LAYOUTS = {
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "3x3 ragged batch": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "8x1": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "2x4 checkpointed": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "activation_checkpointing": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_the_split_of_a_step(layout, model, adapter, dataset, reference, plain_gradients, tmp_path):
    gradients = Gradients()
    args = arguments(tmp_path, learning_rate=0.0, num_train_epochs=1, **LAYOUTS[layout])
    trainer_of(model, args, adapter, dataset, reference, callbacks=[gradients]).train()
    assert len(gradients.steps) == 2
    if layout.startswith("3x3"):  # 9 and 3 pairs: another split of the rows, but the sum over the epoch is the same
        weights, expected_weights = (9, 3), (8, 4)
    else:
        weights = expected_weights = None
    for number, expected in enumerate(plain_gradients):
        actual = gradients.steps[number]
        if weights:
            actual = {name: sum(w * step[name] for w, step in zip(weights, gradients.steps, strict=True)) for name in actual}
            expected = {name: sum(w * s[name] for w, s in zip(expected_weights, plain_gradients, strict=True)) for name in expected}
        assert actual.keys() == expected.keys()
        scale = max(gradient.norm() for gradient in expected.values())
        assert max((actual[name] - expected[name]).norm() / scale for name in expected) < 1e-5


# --- metrics


@pytest.fixture(scope="module")
def plain_rows(tiny_llava_path, adapter, dataset) -> list[tuple]:
    """(pair, chosen ids, rejected ids, chosen token log-probs, rejected token log-probs) of every row, float64."""
    policy = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32).eval()
    rows = []
    for position in range(ROWS):
        pair = dataset[position]
        with torch.no_grad():
            tokens = [answer.double() for answer in plain_token_logps(policy, adapter, pair)]
        rows.append((pair, *encode_pair(adapter, pair).response_ids, *tokens))
    return rows


def mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


def test_logged_metrics_are_means_over_everything_since_the_last_log(model, adapter, dataset, reference, plain_rows, tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        logging_steps=2,
        logging_first_step=False,
    )
    trainer = trainer_of(model, args, adapter, dataset, reference)
    trainer.train()
    order = list(ShuffledRows(ROWS, seed=42))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry, positions in zip(logged, (order[:6], order[6:]), strict=True):
        rows = [plain_rows[position] for position in positions]
        chosen = [BETA * float(c.sum() - pair.ref_win_logp) for pair, _, _, c, _ in rows]
        rejected = [BETA * float(r.sum() - pair.ref_rej_logp) for pair, _, _, _, r in rows]
        margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
        assert entry["loss"] == pytest.approx(mean(math.log1p(math.exp(-m)) for m in margins), rel=1e-4)
        assert entry["rewards/chosen"] == pytest.approx(mean(chosen), rel=1e-4)
        assert entry["rewards/rejected"] == pytest.approx(mean(rejected), rel=1e-4)
        assert entry["rewards/margins"] == pytest.approx(mean(margins), abs=1e-4)
        assert entry["rewards/accuracies"] == pytest.approx(mean(m > 0 for m in margins))
        assert entry["rewards/gradient_weight"] == pytest.approx(mean(1 / (1 + math.exp(m)) for m in margins), rel=1e-4)
        assert entry["logps/chosen"] == pytest.approx(mean(c.sum() for _, _, _, c, _ in rows), rel=1e-5)
        assert entry["logps/rejected"] == pytest.approx(mean(r.sum() for _, _, _, _, r in rows), rel=1e-5)


def sums(row) -> tuple[float, float, float, float]:
    pair, _, _, chosen, rejected = row
    return float(chosen.sum()), float(rejected.sum()), pair.ref_win_logp, pair.ref_rej_logp


def averages(row) -> tuple[float, float, float, float]:
    pair, _, _, chosen, rejected = row
    return float(chosen.mean()), float(rejected.mean()), pair.ref_win_avg_logp, pair.ref_rej_avg_logp


def weighted(row) -> tuple[float, float, float, float]:
    pair, chosen_ids, rejected_ids, chosen, rejected = row
    chosen_weights, rejected_weights = (weights.double() for weights in changed_segment_weights(chosen_ids, rejected_ids, 4.0))
    stored = torch.tensor(pair.ref_win_per_token_logp).double(), torch.tensor(pair.ref_rej_per_token_logp).double()
    return tuple(
        float((w * x).sum())
        for w, x in ((chosen_weights, chosen), (rejected_weights, rejected), (chosen_weights, stored[0]), (rejected_weights, stored[1]))
    )


def dpo(chosen, rejected, reference_chosen, reference_rejected) -> float:
    return -float(F.logsigmoid(torch.tensor(BETA * ((chosen - reference_chosen) - (rejected - reference_rejected)))))


def smoothed(chosen, rejected, reference_chosen, reference_rejected) -> float:
    """Labels wrong with probability 0.2: 0.8 of the loss as labelled, 0.2 of the loss the other way round."""
    flipped = dpo(rejected, chosen, reference_rejected, reference_chosen)
    return 0.8 * dpo(chosen, rejected, reference_chosen, reference_rejected) + 0.2 * flipped


def ipo(chosen, rejected, reference_chosen, reference_rejected) -> float:
    return ((chosen - reference_chosen) - (rejected - reference_rejected) - 1 / (2 * BETA)) ** 2


def with_sft(chosen, rejected, reference_chosen, reference_rejected) -> float:
    return dpo(chosen, rejected, reference_chosen, reference_rejected) - 0.3 * chosen


LOSSES = {
    "plain": ({}, sums, dpo),
    "average": ({"dpo_use_average": True}, averages, dpo),
    "smoothed": ({"dpo_label_smoothing": 0.2}, sums, smoothed),
    "ipo on averages": ({"loss_type": "ipo", "dpo_use_average": True}, averages, ipo),
    "sft": ({"sft_weight": 0.3}, sums, with_sft),
    "token weighted": ({"dpo_token_weighted": True, "dpo_token_weight": 4.0}, weighted, dpo),
}


@pytest.mark.parametrize("case", LOSSES)
def test_evaluation_is_exact_over_ragged_batches(case, model, adapter, dataset, reference, plain_rows, tmp_path):
    options, numbers, loss = LOSSES[case]
    eleven = dataset.select(range(11))
    trainer = trainer_of(model, arguments(tmp_path, per_device_eval_batch_size=4, **options), adapter, dataset, reference, eleven)
    metrics = trainer.evaluate()
    expected = [numbers(row) for row in plain_rows[:11]]
    assert metrics["eval_loss"] == pytest.approx(mean(loss(*row) for row in expected), rel=1e-4)
    assert metrics["eval_rewards/chosen"] == pytest.approx(mean(BETA * (c - rc) for c, _, rc, _ in expected), rel=1e-4)
    assert metrics["eval_rewards/rejected"] == pytest.approx(mean(BETA * (r - rr) for _, r, _, rr in expected), rel=1e-4)
    assert metrics["eval_logps/chosen"] == pytest.approx(mean(row[3].sum() for row in plain_rows[:11]), rel=1e-5)  # sums in any case


def test_evaluation_during_training_and_best_checkpoint(model, adapter, dataset, reference, tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=1e-3,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,  # so that the best is not the last
    )
    trainer = trainer_of(model, args, adapter, dataset, reference, dataset.select(range(5)))
    trainer.train()
    margins = [entry["eval_rewards/margins"] for entry in trainer.state.log_history if "eval_rewards/margins" in entry]
    assert len(margins) == 3 and min(margins) < margins[2] - 1e-2
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(min(margins), rel=1e-5)  # the best model is the one at hand


# --- what is trained


def test_one_small_step_moves_the_weights_of_a_bfloat16_checkpoint(adapter, dataset, reference, tiny_llava_path, tmp_path):
    half = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    policy = load_policy(Checkpoint(tmp_path / "half"), adapter, dtype=torch.float32)
    freeze(policy, adapter.spec.frozen_modules)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    gradients = Gradients()
    args = arguments(tmp_path / "run", learning_rate=5e-7, lr_scheduler_type="constant", max_steps=1)
    trainer_of(policy, args, adapter, dataset, reference, callbacks=[gradients]).train()

    changed = total = rounded_away = 0
    for name, gradient in gradients.steps[0].items():
        moving = gradient != 0  # embeddings of tokens that the batch does not have get no gradient
        after = dict(policy.named_parameters())[name].detach()
        changed += int((after != before[name])[moving].sum())
        rounded_away += int((after.bfloat16() == before[name].bfloat16())[moving].sum())
        total += int(moving.sum())
    assert changed / total > 0.99
    assert rounded_away / total > 0.9  # what bfloat16 weights would have kept of this step: next to nothing
    frozen = [name for name in before if name.startswith("model.vision_tower.")]
    assert frozen and all(torch.equal(before[name], dict(policy.named_parameters())[name]) for name in frozen)


def test_lora_trains_float32_adapters_of_the_language_model_alone(tiny_llava_path, adapter):
    base = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.bfloat16)
    policy = add_lora(base, adapter.spec.lora_targets, r=4, alpha=8, dropout=0.0, base="hub/base")
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2  # two layers, seven linears, A and B
    assert all("language_model" in name and "lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for name, p in policy.named_parameters() if name not in trained} == {torch.bfloat16}
    assert policy.peft_config["default"].base_model_name_or_path == "hub/base"


def test_half_precision_weights_and_nothing_to_train_are_refused(tiny_llava_path, model, adapter, dataset, reference, tmp_path):
    half = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must be float32 .* such as "):
        trainer_of(half, arguments(tmp_path), adapter, dataset, reference)
    with pytest.raises(ValueError, match="nothing is trainable"):
        trainer_of(model.requires_grad_(False), arguments(tmp_path), adapter, dataset, reference)


def test_freezing_needs_a_name_that_exists(model):
    with pytest.raises(ValueError, match=r"no parameters below 'model\.vision'"):
        freeze(model, ("model.vision",))


# --- what stops a run


class Poison(TrainerCallback):
    """After `step` steps: a weight, or from then on a gradient, is not a number."""

    def __init__(self, step: int, gradient: bool) -> None:
        self.step = step
        self.gradient = gradient

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if state.global_step != self.step:
            return
        weight = model.lm_head.weight
        if self.gradient:
            weight.register_hook(lambda gradient: gradient * float("nan"))
        else:
            weight.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("gradient", "metric"), [(False, "loss is nan at step 3 for the row with idx "), (True, "grad_norm is nan at step 3;")]
)
def test_not_a_number_stops_the_run(gradient, metric, model, adapter, dataset, reference, tmp_path):
    args = arguments(tmp_path, max_steps=6, learning_rate=1e-4, save_strategy="steps", save_steps=1)
    trainer = trainer_of(model, args, adapter, dataset, reference, callbacks=[Poison(2, gradient)])
    with pytest.raises(FloatingPointError, match=metric):
        trainer.train()
    newest = last_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-2"
    if gradient:  # the weights of step 2 were poisoned before they were saved; a gradient leaves them whole
        restored = adapter.load_model(newest, dtype=torch.float32)
        assert all(parameter.isfinite().all() for parameter in restored.parameters())


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    "flags",
    [
        {"label_smoothing_factor": 0.1},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"use_liger_kernel": True},
        {"auto_find_batch_size": True},
        {"fp16": True},
        {"bf16": True},  # contradicts float32
        {"bf16_full_eval": True},
        {"torch_compile": True},
        {"include_num_input_tokens_seen": True},
        {"prediction_loss_only": True},
        {"fsdp": "full_shard"},
        {"fsdp": True, "lora_enable": True},
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"dpo_beta": 0.0},
        {"dpo_label_smoothing": 0.5},
        {"dpo_label_smoothing": 0.1, "loss_type": "ipo"},
        {"dpo_token_weight": 0.0},
        {"reference_check_rows": 0},
        {"group_by_prompt": True, "train_sampling_strategy": "sequential"},
    ],
    ids=lambda flags: ",".join(flags),
)
def test_options_that_cannot_work_are_refused_by_name(flags, tmp_path):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))}"):
        arguments(tmp_path, use_cpu=True, **flags)


def test_dtype_alone_decides_about_precision(tmp_path):
    half = arguments(tmp_path, dtype="bfloat16", bf16=True)
    assert half.numerics.autocast_dtype == "bfloat16" and half.mixed_precision == "no"  # no engine autocasts on top, or casts weights
    assert arguments(tmp_path, dtype="float32").numerics.autocast_dtype is None
    assert arguments(tmp_path, remove_unused_columns=True).remove_unused_columns is False


@pytest.fixture
def no_deepspeed_left():
    """transformers keeps the last DeepSpeed config in a global that from_pretrained looks at."""
    yield
    unset_hf_deepspeed_config()


def test_deepspeed_under_bfloat16_must_compute_as_scoring_does(no_deepspeed_left, tmp_path):
    with pytest.raises(ValueError, match="torch_autocast"):
        arguments(tmp_path, dtype="bfloat16", deepspeed={"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"})
    autocast = {"gradient_clipping": "auto", "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    stage3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    with pytest.raises(ValueError, match="is ZeRO-3, which loads the base"):
        arguments(tmp_path, dtype="bfloat16", lora_enable=True, deepspeed={"zero_optimization": stage3, **autocast})


def test_deepspeed_clips_gradients_as_the_flag_says(no_deepspeed_left, tmp_path):
    with pytest.raises(ValueError, match=r"clips gradients at 1.0 and not at --max_grad_norm 0.5"):
        arguments(tmp_path, dtype="float32", max_grad_norm=0.5, deepspeed={"zero_optimization": {"stage": 2}})


def test_deepspeed_computes_in_float32_when_asked_to(no_deepspeed_left, tmp_path):
    autocast = {"gradient_clipping": "auto", "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    with pytest.raises(ValueError, match='has "torch_autocast" on, which computes in half precision under --dtype float32'):
        arguments(tmp_path, dtype="float32", deepspeed={"zero_optimization": {"stage": 2}, **autocast})


def test_zero3_must_save_its_weights(no_deepspeed_left, tmp_path):
    with pytest.raises(ValueError, match="ZeRO-3, which saves no weights without"):
        arguments(tmp_path, dtype="float32", deepspeed={"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"})


def test_an_adapter_is_not_merged_under_zero3(tmp_path):
    """Every model that a process of ZeRO-3 loads is in shards; the message has the command that merges afterwards."""

    def check(stage: int) -> None:
        engine = {"zero_optimization": {"stage": stage}}
        args = SimpleNamespace(
            lora_enable=True, bits=None, dtype="float32", output_dir="run", deepspeed=engine
        )  # DPOArguments would start it
        check_options(ModelOptions("policy"), LoraOptions(merge_lora=True), args, Checkpoint(tmp_path))

    check(2)
    with pytest.raises(ValueError, match="cannot merge in a process of ZeRO-3.*python train/merge_lora.py"):
        check(3)
