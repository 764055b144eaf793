"""DPO on stored reference log-probs: transformers' Trainer with a packed batch, an exact mean over pairs, and the reference gate.

    PreferencePair --PairCollator (workers)--> PairBatch --response_logps--> per-token log-probs --reduction--> one number per response
        --loss--> losses (P,), rewards (P,) --preference_metrics--> logged means

Trainer keeps what it is good at: engines, checkpoints, resume, schedules, logging.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from muffin.attention import packed_attention
from muffin.batches import (
    PairBatch,
    PairCollator,
    Reduction,
    ShuffledPrompts,
    ShuffledRows,
    averaged,
    prompt_groups,
    summed,
    token_weighted,
)
from muffin.logps import response_logps
from muffin.losses import cdpo_loss, dpo_loss, ipo_loss, sft_loss
from muffin.metrics import preference_metrics
from muffin.pairs import PreferenceDataset
from muffin.policies import PolicyAdapter, save_adapter
from muffin.provenance import REFERENCE_FILE, Numerics, explain_difference, reference_id, resolve_numerics, write_atomically
from muffin.reference_gate import check_reference, spread_positions

logger = logging.getLogger(__name__)

# Options of TrainingArguments that cannot work here: the values they may have, and what to do instead.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), "it smooths token labels; for noisy preferences use --dpo_label_smoothing"),
    "train_sampling_strategy": (("random", "sequential"), "packed rows have no padding to save"),
    "use_liger_kernel": ((False,), "its fused loss replaces the logits that log-probs are read from"),
    "auto_find_batch_size": ((False,), "it changes the number of pairs in a step; set --per_device_train_batch_size"),
    "fp16": ((False,), "float16 is not supported; use --dtype bfloat16 or float32"),
    "fp16_full_eval": ((False,), "it casts the trained weights; evaluation runs in --dtype anyway"),
    "bf16_full_eval": ((False,), "it casts the trained weights; evaluation runs in --dtype anyway"),
    "torch_compile": ((False,), "packed rows have another length at every step, and attention is exchanged around them"),
    "include_num_input_tokens_seen": (("no", False), "it counts padded inputs, and packed batches have none"),
    "include_for_metrics": (([],), "metrics are means over pairs"),
    "batch_eval_metrics": ((False,), "metrics are means over pairs"),
    "eval_do_concat_batches": ((True,), "metrics are means over pairs"),
    "prediction_loss_only": ((False,), "eval_rewards/* come from the same forward as the loss"),
}


@dataclass
class DPOArguments(TrainingArguments):
    """transformers' TrainingArguments and what DPO adds. `--dtype` alone decides about precision."""

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate; usually 5e-7 (full) or 1e-5 (LoRA)."})
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto",
        metadata={
            "help": "Precision of the forward; trained weights are float32 in any case. auto: bfloat16 where the hardware computes in it."
        },
    )
    lora_enable: bool = field(default=False, metadata={"help": "Train a LoRA adapter on the language model instead of all weights."})
    dpo_beta: float = field(default=0.1, metadata={"help": "Strength of the pull towards the reference, usually 0.05 to 0.5."})
    loss_type: Literal["sigmoid", "ipo"] = field(default="sigmoid", metadata={"help": "DPO, or IPO (there beta is the paper's tau)."})
    dpo_label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of preferences assumed wrong, 0 to 0.5 (conservative DPO); needs --loss_type sigmoid."}
    )
    dpo_use_average: bool = field(default=False, metadata={"help": "Mean instead of sum of log-probs over a response's tokens."})
    dpo_token_weighted: bool = field(
        default=False, metadata={"help": "Weigh tokens where chosen and rejected differ by --dpo_token_weight (RLHF-V's dense DPO)."}
    )
    dpo_token_weight: float = field(
        default=3.0, metadata={"help": "Weight of changed tokens; unchanged ones count 1. RLHF-V's paper has 5."}
    )
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the chosen response's negative log-likelihood in the loss."})
    group_by_prompt: bool = field(
        default=False, metadata={"help": "Put pairs of one image and question into one batch, where they share their prompt's computation."}
    )
    reference_check_rows: int = field(default=8, metadata={"help": "Rows whose stored log-probs are recomputed before the first step."})
    accept_foreign_logps: bool = field(
        default=False, metadata={"help": "Train on stored log-probs that this policy did not make, such as those RLAIF-V publishes."}
    )

    def __post_init__(self) -> None:
        for name, (allowed, reason) in UNSUPPORTED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)} cannot be used, want {' or '.join(map(str, allowed))}: {reason}")
        if self.group_by_prompt and self.train_sampling_strategy != "random":
            raise ValueError("--group_by_prompt True orders the rows itself; leave --train_sampling_strategy random")
        if self.dpo_beta <= 0:
            raise ValueError(f"--dpo_beta is {self.dpo_beta}, want a positive number such as 0.1")
        if not 0 <= self.dpo_label_smoothing < 0.5:
            raise ValueError(f"--dpo_label_smoothing is {self.dpo_label_smoothing}, want 0 or more and less than 0.5")
        if self.dpo_label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"--dpo_label_smoothing {self.dpo_label_smoothing} has no meaning under --loss_type {self.loss_type}; want sigmoid"
            )
        if self.dpo_token_weight <= 0:
            raise ValueError(f"--dpo_token_weight is {self.dpo_token_weight}, want a positive number such as 3")
        if self.reference_check_rows < 1:
            raise ValueError(f"--reference_check_rows is {self.reference_check_rows}, want at least 1 (8 takes seconds)")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it transformers refuses bfloat16 on a machine that has nothing but a CPU
        if self.use_cpu and self.fsdp:
            raise ValueError("--fsdp needs a GPU: on a CPU transformers ignores it without a word and runs DDP")
        autocast = self.numerics.autocast_dtype
        if self.bf16 and autocast is None:
            raise ValueError(
                f"--bf16 True contradicts --dtype {self.dtype}, which is float32 here; --dtype alone decides, leave --bf16 out"
            )
        self.bf16 = False  # the forward runs in numerics.autocast, as scoring does; engines would cast the weights, which is something else
        self.remove_unused_columns = False  # True would empty rows that are no dicts
        self.logging_nan_inf_filter = False  # True hides what must stop the run
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process; launch with `torchrun --nproc_per_node {self.n_gpu} train/dpo.py ...` "
                "or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.deepspeed and autocast is not None:
            self._check_deepspeed()
        if self.deepspeed and self.use_cpu:  # transformers starts gloo without telling DeepSpeed, which would load ZeRO-3 for one process
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")
        checkpointing = dict(self.activation_checkpointing_kwargs or {})
        if checkpointing.get("use_reentrant"):
            raise ValueError(
                "--activation_checkpointing_kwargs use_reentrant true cannot be used: it loses the gradients of LoRA; leave it out"
            )
        self.activation_checkpointing_kwargs = {**checkpointing, "use_reentrant": False}

    def _check_deepspeed(self) -> None:
        """Raise ValueError for a configuration under which bfloat16 means something else than in scoring."""
        if not self.hf_deepspeed_config.is_true("torch_autocast.enabled"):
            raise ValueError(
                f'--deepspeed {self.deepspeed}: --dtype bfloat16 wants "torch_autocast": {{"enabled": true, "dtype": "bfloat16"}} and '
                'no "bf16" section; DeepSpeed turns any other autocast off, and its own bf16 mode computes other log-probs than scoring'
            )
        if self.lora_enable and self.hf_deepspeed_config.is_zero3():
            raise ValueError(
                f"--deepspeed {self.deepspeed} is ZeRO-3, which loads the base of --lora_enable True in float32, not in --dtype bfloat16; "
                "use ZeRO-2, or no --deepspeed"
            )

    @cached_property
    def numerics(self) -> Numerics:
        """What scoring with the same flags computes in; part of the reference id."""
        return resolve_numerics(dtype=self.dtype, bits=None, lora_enable=self.lora_enable, device_type="cpu" if self.use_cpu else None)


def select_reduction(args: DPOArguments) -> Reduction:
    if args.dpo_token_weighted:
        return partial(token_weighted, weight=args.dpo_token_weight, average=args.dpo_use_average)
    return averaged if args.dpo_use_average else summed


def select_loss(args: DPOArguments) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The loss of `--loss_type` as a function of the four named log-probs."""
    if args.loss_type == "ipo":
        return partial(ipo_loss, beta=args.dpo_beta)
    if args.dpo_label_smoothing:
        return partial(cdpo_loss, beta=args.dpo_beta, label_smoothing=args.dpo_label_smoothing)
    return partial(dpo_loss, beta=args.dpo_beta)


# --- what is trained


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze the parameters whose names begin with a prefix. Raises ValueError for a prefix that no parameter has."""
    for prefix in prefixes:
        parameters = [parameter for name, parameter in model.named_parameters() if name.startswith(f"{prefix}.")]
        if not parameters:
            raise ValueError(f"{type(model).__name__} has no parameters below {prefix!r}, which should be frozen")
        for parameter in parameters:
            parameter.requires_grad_(False)


def add_lora(model: nn.Module, targets: str, *, r: int, alpha: int, dropout: float, base: str) -> PeftModel:
    """LoRA on the linear layers whose names match the regular expression `targets`; everything else is frozen.

    base: what the saved adapter names as its base model. Draws the adapter's start from torch's global generator.
    """
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none")
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    peft_model.peft_config["default"].base_model_name_or_path = base
    return peft_model


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint in `output_dir`; one that was cut off while it was written has no trainer_state.json."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), reverse=True):
        if (folder / "trainer_state.json").is_file():
            return folder
        logger.warning("%s is incomplete (no trainer_state.json) and passed over", folder)
    return None


class _Hooks(TrainerCallback):
    """Moments of a run that Trainer offers to callbacks only."""

    def __init__(self, trainer: "DPOTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:  # after a resume the policy is no longer its reference
            self.trainer.check_reference()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """accelerate tells the sampler its epoch, too, but does not reach it after a resume on several processes."""
        if isinstance(self.trainer.train_sampler, ShuffledRows):
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))


class DPOTrainer(transformers.Trainer):
    """Trainer of a policy on PreferencePairs with stored reference log-probs.

    reference: description of the reference policy (muffin.provenance.describe_reference), saved with every checkpoint.
    scoring_command: what error messages tell the user to run.
    Raises ValueError when a trainable weight is not float32 (DeepSpeed keeps float32 masters of its own), or nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DPOArguments,
        adapter: PolicyAdapter,
        train_dataset: PreferenceDataset,
        eval_dataset: PreferenceDataset | None = None,
        *,
        reference: dict[str, Any],
        scoring_command: str,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        halves = [name for name, parameter in trainable.items() if parameter.dtype != torch.float32 and not args.deepspeed]
        if not trainable or halves:
            found = f"{len(halves)} of {len(trainable)} are not, such as {halves[0]}" if halves else "nothing is trainable"
            raise ValueError(f"trainable weights must be float32 (AdamW at 5e-7 leaves 99 % of bfloat16 weights where they are): {found}")
        if args.ddp_find_unused_parameters is None:  # a trained CLIP tower has layers behind the one whose features are used
            args.ddp_find_unused_parameters = any(name.startswith(adapter.spec.frozen_modules) for name in trainable)
        self.adapter = adapter
        self.reference = reference
        self.scoring_command = scoring_command
        self.pair_loss = select_loss(args)
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())
        self.train_sampler: torch.utils.data.Sampler[int] | None = None
        self._metric_names: tuple[str, ...] = ()
        self._metric_sums: Tensor | None = None  # (M + 1,) since the last log: sums of metrics, then the number of pairs
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(adapter, select_reduction(args), accept_foreign_logps=args.accept_foreign_logps),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._mean_metrics,
            callbacks=callbacks,
        )
        self.add_callback(_Hooks(self))
        self.model_accepts_loss_kwargs = False  # the model computes no loss
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step

    # --- batches

    def _get_train_sampler(self, train_dataset: PreferenceDataset | None = None) -> torch.utils.data.Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.train_sampling_strategy == "sequential":
            self.train_sampler = torch.utils.data.SequentialSampler(dataset)
        elif self.args.group_by_prompt:
            self.train_sampler = ShuffledPrompts(prompt_groups(dataset), self.args.per_device_train_batch_size, seed)
        else:
            self.train_sampler = ShuffledRows(len(dataset), seed)
        return self.train_sampler

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list[PairBatch], Tensor]:
        """The micro-batches of an optimizer step, and its number of pairs over all micro-batches and processes."""
        batches = list(islice(epoch_iterator, num_batches))
        pairs = torch.tensor(sum(map(len, batches)), device=device)
        return batches, self.accelerator.reduce(pairs, "sum")

    def _prepare_inputs(self, inputs: PairBatch) -> PairBatch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: PairBatch) -> int:
        return 6 * inputs.packed.num_tokens * self.parameter_count

    # --- steps

    def training_step(self, model: nn.Module, inputs: PairBatch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        # backward recomputes attention under gradient checkpointing, so it must find the packed one, too
        with packed_attention(model) if inputs.packed.layout is not None else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: PairBatch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This process's share of the mean over the step's pairs; engines average it over processes, hence the factor.

        With return_outputs also (P, M) values per pair, columns as in `_metric_names`.
        """
        losses, values = self._pair_losses(model, inputs)
        if model.training:
            sums = torch.cat([values.double().sum(dim=0), values.new_tensor([len(inputs)], dtype=torch.float64)])
            self._metric_sums = sums if self._metric_sums is None else self._metric_sums + sums
        pairs = len(inputs) * self.accelerator.num_processes if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() * self.accelerator.num_processes / pairs
        return (loss, values) if return_outputs else loss

    def _pair_losses(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Losses (P,) and detached values (P, M) of loss and metrics. Raises FloatingPointError when one is not finite."""
        with self.args.numerics.autocast(self.args.device.type):
            logps = response_logps(model, batch.packed)
        chosen, rejected = logps.weighted_sums(batch.token_weights).view(-1, 2).unbind(dim=1)
        losses, chosen_rewards, rejected_rewards = self.pair_loss(
            policy_chosen_logps=chosen,
            policy_rejected_logps=rejected,
            reference_chosen_logps=batch.reference_chosen_logps,
            reference_rejected_logps=batch.reference_rejected_logps,
        )
        losses = losses + self.args.sft_weight * sft_loss(chosen)
        chosen_sums, rejected_sums = logps.sums.detach().view(-1, 2).unbind(dim=1)
        metrics = {"loss": losses.detach()} | preference_metrics(
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            policy_chosen_logps=chosen_sums,
            policy_rejected_logps=rejected_sums,
        )
        self._metric_names = tuple(metrics)
        values = torch.stack(list(metrics.values()), dim=1)
        if not values.isfinite().all():
            row, column = (~values.isfinite()).nonzero()[0].tolist()
            self._stop(self._metric_names[column], float(values[row, column]), f" for the row with idx {batch.idx[row]}")
        return losses, values

    def _stop(self, metric: str, value: float, where: str = "") -> None:
        raise FloatingPointError(
            f"{metric} is {value} at step {self.state.global_step + 1}{where}; the run stops before anything more is saved. "
            f"The last checkpoint in {self.args.output_dir} is intact; continue from it with a lower --learning_rate or --max_grad_norm"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            self._stop("grad_norm", float(norm))
        return norm

    def prediction_step(
        self, model: nn.Module, inputs: PairBatch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """(P, M) values per pair as "logits"; the evaluation loop gathers them exactly, and wants "labels" before it computes metrics."""
        with torch.no_grad():
            _, values = self._pair_losses(model, self._prepare_inputs(inputs))
        return None, values, values[:, 0]

    def _mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return dict(zip(self._metric_names, prediction.predictions.mean(axis=0, dtype=np.float64).tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of all metrics over every micro-batch and process since the last log."""
        if "loss" in logs and self._metric_sums is not None:
            *sums, pairs = self.accelerator.reduce(self._metric_sums, "sum").tolist()
            means = {name: total / pairs for name, total in zip(self._metric_names, sums, strict=True)}
            logs = {**logs, **{name: mean for name, mean in means.items() if name != "loss"}}
            self._metric_sums = None
        super().log(logs, start_time)

    # --- reference

    def check_reference(self) -> None:
        """The gate, through the wrapped model; every process scores the same rows. Raises as `muffin.reference_gate.check_reference`."""
        positions = spread_positions(len(self.train_dataset), self.args.reference_check_rows)
        check_reference(
            self.model_wrapped,
            self.adapter,
            [self.train_dataset[position] for position in positions],
            numerics=self.args.numerics,
            beta=self.args.dpo_beta,
            device=self.args.device,
            scoring_command=self.scoring_command,
            accept_foreign_logps=self.args.accept_foreign_logps,
        )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Raises ValueError when the checkpoint to resume from was trained against another reference."""
        if resume_from_checkpoint is not None:
            file = Path(resume_from_checkpoint) / REFERENCE_FILE
            if not file.is_file():
                raise ValueError(f"{resume_from_checkpoint} is no checkpoint of this trainer: it holds no {REFERENCE_FILE}")
            stored = json.loads(file.read_text())["reference"]
            if reference_id(stored) != reference_id(self.reference):
                differences = "\n".join(f"  - {line}" for line in explain_difference(stored, self.reference))
                raise ValueError(f"{resume_from_checkpoint} was trained against another reference policy than this run's:\n{differences}")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # --- files

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_adapter(self.adapter, folder)
            manifest = {"reference_id": reference_id(self.reference), "reference": self.reference}
            write_atomically(folder / REFERENCE_FILE, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Full models are read by their adapter: files use the hub's names, and Trainer loads those it cannot match as nothing at all."""
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.model.load_state_dict(self.adapter.load_model(Path(resume_from_checkpoint), dtype=torch.float32).state_dict())

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
