"""What training a policy needs whatever the objective: packed batches, an exact mean over the step, numerics, and files that load again.

    rows --collator (workers)--> batch --_row_losses--> losses (R,), values (R, M) --> loss of the step, logged metrics

`muffin.trainer` (DPO) and `muffin.sft` say what a batch and its losses are; transformers' Trainer keeps what it is good at: engines,
checkpoints, resume, schedules, logging.
"""

import logging
import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from muffin.attention import Implementation, choose_kernel, packed_attention, set_kernel
from muffin.batches import ShuffledRows
from muffin.checkpoints import Preempted, StopSignals, checkpoint_name, checkpoints, partial_run, publish, remove, remove_leftovers, writing
from muffin.packing import PackedBatch
from muffin.policies import PolicyAdapter, save_adapter
from muffin.provenance import Numerics, resolve_numerics

logger = logging.getLogger(__name__)


@dataclass
class PolicyArguments(TrainingArguments):
    """transformers' TrainingArguments where `--dtype` alone decides about precision, and options that cannot work are refused."""

    # Options of TrainingArguments that cannot work here: the values they may have, and what to do instead.
    UNSUPPORTED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "label_smoothing_factor": ((0.0,), "the loss is not the model's own"),
        "train_sampling_strategy": (("random", "sequential"), "packed rows have no padding to save"),
        "use_liger_kernel": ((False,), "its fused loss replaces the logits that log-probs are read from"),
        "auto_find_batch_size": ((False,), "it changes the number of rows in a step; set --per_device_train_batch_size"),
        "fp16": ((False,), "float16 is not supported; use --dtype bfloat16 or float32"),
        "fp16_full_eval": ((False,), "it casts the trained weights; evaluation runs in --dtype anyway"),
        "bf16_full_eval": ((False,), "it casts the trained weights; evaluation runs in --dtype anyway"),
        "torch_compile": ((False,), "packed rows have another length at every step, and attention is exchanged around them"),
        "include_num_input_tokens_seen": (("no", False), "it counts padded inputs, and packed batches have none"),
        "include_for_metrics": (([],), "metrics are means over rows"),
        "batch_eval_metrics": ((False,), "metrics are means over rows"),
        "eval_do_concat_batches": ((True,), "metrics are means over rows"),
        "enable_jit_checkpoint": ((False,), "SIGTERM saves at the end of the step anyway, and on all processes at the same one"),
        "prediction_loss_only": ((False,), "eval metrics come from the same forward as the loss"),
    }

    plan = False  # DPO's arguments make it an option
    # What transformers can only take in on the hardware it asks for.
    GPU_FLAGS: ClassVar[tuple[str, ...]] = ("deepspeed", "fsdp", "fsdp_config", "tf32")

    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto",
        metadata={
            "help": "Precision of the forward; trained weights are float32 in any case. auto: bfloat16 where the hardware computes in it."
        },
    )
    lora_enable: bool = field(default=False, metadata={"help": "Train a LoRA adapter on the language model instead of all weights."})
    bits: int | None = field(
        default=None,
        metadata={"help": "4: QLoRA, the language model's weights in nf4 and the forward in bfloat16; needs --lora_enable True."},
    )
    attn_implementation: Implementation = field(
        default="auto", metadata={"help": "Kernel of attention: auto takes flash-attn or torch's own where they can run, else sdpa."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of metrics, usually 1 to 50."})
    logging_first_step: bool = field(default=True, metadata={"help": "Also log the first step, whose DPO loss is ln 2."})

    def __post_init__(self) -> None:
        for name, (allowed, reason) in self.UNSUPPORTED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)} cannot be used, want {' or '.join(map(str, allowed))}: {reason}")
        if self.output_dir in (None, "", "trainer_output"):  # transformers' default, which nobody means
            raise ValueError("--output_dir is missing; name a folder for the run")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it transformers refuses bfloat16 on a machine that has nothing but a CPU
        if self.lora_enable and self.fsdp:  # transformers 5.23: peft's wrap policy, which accelerate's FSDP2 cannot read
            raise ValueError(
                "--fsdp contradicts --lora_enable True: transformers would gather the whole model at once, and refuses LLaVA; "
                "leave --fsdp out, or use --deepspeed scripts/train/zero2.json"
            )
        planned = self.plan and self.use_cpu  # a run on GPUs is planned on a machine without one
        if self.use_cpu and self.fsdp and not planned:
            raise ValueError("--fsdp needs a GPU: on a CPU transformers ignores it without a word and runs DDP")
        if self.bits is not None and not self.lora_enable:
            raise ValueError(f"--bits {self.bits} needs --lora_enable True: quantised weights cannot be trained, an adapter on them can")
        if planned:
            self._plan_for_gpus()
            return
        autocast = self.numerics.autocast_dtype
        if self.bf16 and autocast is None:
            raise ValueError(
                f"--bf16 True contradicts --dtype {self.dtype}, which is float32 here; --dtype alone decides, leave --bf16 out"
            )
        self.bf16 = False  # the forward runs in numerics.autocast, as scoring does; engines would cast the weights, which is something else
        self.remove_unused_columns = False  # True would empty rows that are no dicts
        self.logging_nan_inf_filter = False  # True hides what must stop the run
        super().__post_init__()
        self._refuse_reentrant_checkpointing()
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process; launch with `torchrun --nproc_per_node {self.n_gpu}` "
                "or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.deepspeed:
            self._check_deepspeed()
        if self.deepspeed and self.use_cpu:  # transformers starts gloo without telling DeepSpeed, which would load ZeRO-3 for one process
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")

    def _plan_for_gpus(self) -> None:
        """Keep what only GPUs understand as it was given; nothing of it runs."""
        given = {name: getattr(self, name) for name in self.GPU_FLAGS}
        self.deepspeed = self.fsdp = self.fsdp_config = self.tf32 = None
        self.bf16 = False
        super().__post_init__()
        vars(self).update(given)
        self._refuse_reentrant_checkpointing()

    def _refuse_reentrant_checkpointing(self) -> None:
        checkpointing = dict(self.activation_checkpointing_kwargs or {})
        if checkpointing.get("use_reentrant"):
            raise ValueError(
                "--activation_checkpointing_kwargs use_reentrant true cannot be used: it loses the gradients of LoRA; leave it out"
            )
        self.activation_checkpointing_kwargs = {**checkpointing, "use_reentrant": False}

    def _check_deepspeed(self) -> None:
        """Raise ValueError for a configuration that clips unasked, saves no weights, or computes other log-probs than scoring."""
        if "gradient_clipping" not in self.hf_deepspeed_config.config and self.max_grad_norm != 1.0:
            raise ValueError(
                f'--deepspeed {self.deepspeed} has no "gradient_clipping", so that accelerate clips gradients at 1.0 and not at '
                f'--max_grad_norm {self.max_grad_norm}; write "gradient_clipping": "auto"'
            )
        gathers = self.hf_deepspeed_config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save")
        if self.hf_deepspeed_config.is_zero3() and not gathers:
            raise ValueError(
                f'--deepspeed {self.deepspeed} is ZeRO-3, which saves no weights without "zero_optimization": '
                '{"stage3_gather_16bit_weights_on_model_save": true}; add it, or use scripts/train/zero3.json'
            )
        autocast = self.hf_deepspeed_config.is_true("torch_autocast.enabled")
        if self.numerics.autocast_dtype is None:
            if autocast:
                raise ValueError(
                    f'--deepspeed {self.deepspeed} has "torch_autocast" on, which computes in half precision under --dtype {self.dtype}, '
                    "float32 here; remove that section, or give --dtype bfloat16"
                )
            return
        if not autocast:
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
        return resolve_numerics(
            dtype=self.dtype,
            bits=self.bits,
            lora_enable=self.lora_enable,
            device_type="cpu" if self.use_cpu else None,
            attn_implementation=self.attn_implementation,
        )

    @property
    def shuffle_seed(self) -> int:
        """What the order of the rows depends on: --data_seed, else --seed."""
        return self.seed if self.data_seed is None else self.data_seed


class RowBatch(Protocol):
    """Rows ready for the model. No mapping: Trainer must find no key to act on.

    num_items: what the loss of a step is a mean over (pairs, or response tokens); idx: the rows' own names, for messages.
    """

    packed: PackedBatch
    idx: tuple[int | str, ...]
    num_items: int

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> "RowBatch":
        """With all tensors on `device`."""
        ...


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


class _EpochOfSampler(TrainerCallback):
    """Tells the sampler its epoch; accelerate does, too, but does not reach it after a resume on several processes."""

    def __init__(self, trainer: "PolicyTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if isinstance(self.trainer.train_sampler, ShuffledRows):
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))


class _StopWhenAsked(TrainerCallback):
    """Saves and stops at the end of a step in which any process was asked to stop; all processes agree on the step."""

    def __init__(self, trainer: "PolicyTrainer") -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        accelerator, signals = self.trainer.accelerator, self.trainer.stop_signals
        received = torch.tensor([signals.received or 0], device=args.device)
        numbers = accelerator.gather(received) if accelerator.num_processes > 1 else received
        signals.received = int(numbers.max()) or None
        if signals.received is not None:
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class PolicyTrainer(transformers.Trainer, ABC):
    """Trainer of a policy on packed batches. Subclasses define `_row_losses`, and `_summarize` where a metric is no mean over rows.

    Raises ValueError when a trainable weight is not float32 (DeepSpeed keeps float32 masters of its own), or nothing is trainable.
    """

    def __init__(self, model: nn.Module, args: PolicyArguments, adapter: PolicyAdapter, **trainer_arguments: Any) -> None:
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        halves = [name for name, parameter in trainable.items() if parameter.dtype != torch.float32 and not args.deepspeed]
        if not trainable or halves:
            found = f"{len(halves)} of {len(trainable)} are not, such as {halves[0]}" if halves else "nothing is trainable"
            raise ValueError(f"trainable weights must be float32 (AdamW at 5e-7 leaves 99 % of bfloat16 weights where they are): {found}")
        if args.ddp_find_unused_parameters is None:  # a trained CLIP tower has layers behind the one whose features are used
            args.ddp_find_unused_parameters = any(name.startswith(adapter.spec.frozen_modules) for name in trainable)
        computed = torch.float32 if args.numerics.autocast_dtype is None else torch.bfloat16
        logger.info("attention runs on %s: %s", *astuple(choose_kernel(args.device.type, computed, args.attn_implementation)))
        set_kernel(model, args.numerics.attention)
        self.adapter = adapter
        self.stop_signals = StopSignals()
        self._checkpoint_run: Path | None = None  # stands in for output_dir while a checkpoint is written
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())
        self.train_sampler: torch.utils.data.Sampler[int] | None = None
        self._metric_names: tuple[str, ...] = ()
        self._metric_sums: Tensor | None = None  # (M + 1,) since the last log: sums of values over rows, then the number of rows
        super().__init__(model=model, args=args, compute_metrics=self._evaluation_metrics, **trainer_arguments)
        self.add_callback(_EpochOfSampler(self))
        self.add_callback(_StopWhenAsked(self))
        self.model_accepts_loss_kwargs = False  # the model computes no loss
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole step

    @abstractmethod
    def _row_losses(self, model: nn.Module, batch: RowBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (R,), whose sum over the step is divided by its items, and detached values (R,) by metric name."""

    def _summarize(self, sums: Mapping[str, float], rows: float) -> dict[str, float]:
        """Metrics from sums of values over rows."""
        return {name: total / rows for name, total in sums.items()}

    # --- batches

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "sequential":
            self.train_sampler = torch.utils.data.SequentialSampler(dataset)
        else:
            self.train_sampler = self._shuffled(dataset)
        return self.train_sampler

    def _shuffled(self, dataset) -> torch.utils.data.Sampler[int]:
        return ShuffledRows(len(dataset), self.args.shuffle_seed)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list[RowBatch], Tensor]:
        """The micro-batches of an optimizer step, and its number of items over all micro-batches and processes."""
        batches = list(islice(epoch_iterator, num_batches))
        items = torch.tensor(sum(batch.num_items for batch in batches), device=device)
        return batches, self.accelerator.reduce(items, "sum")

    def _prepare_inputs(self, inputs: RowBatch) -> RowBatch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: RowBatch) -> int:
        return 6 * inputs.packed.num_tokens * self.parameter_count

    # --- steps

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer.train. Raises Preempted, which ends the process, when a signal asked the run to stop before its last step."""
        with self.stop_signals.caught():
            output = super().train(*args, **kwargs)
        if self.stop_signals.received is not None and self.state.global_step < self.state.max_steps:
            logger.warning(
                "%s at step %d of %d: saved as %s; go on by the same command with --resume_from_checkpoint last",
                signal.Signals(self.stop_signals.received).name,
                self.state.global_step,
                self.state.max_steps,
                Path(self.args.output_dir) / checkpoint_name(self.state.global_step),
            )
            raise Preempted(self.stop_signals.received)
        return output

    def training_step(self, model: nn.Module, inputs: RowBatch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        # backward recomputes attention under gradient checkpointing, so it must find the packed one, too
        with packed_attention(model) if inputs.packed.layout is not None else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: RowBatch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This process's share of the mean over the step's items; engines average it over processes, hence the factor.

        With return_outputs also (R, M) values per row, columns as in `_metric_names`.
        """
        losses, values = self._checked_losses(model, inputs)
        if model.training:
            sums = torch.cat([values.double().sum(dim=0), values.new_tensor([len(inputs)], dtype=torch.float64)])
            self._metric_sums = sums if self._metric_sums is None else self._metric_sums + sums
        items = inputs.num_items * self.accelerator.num_processes if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() * self.accelerator.num_processes / items
        return (loss, values) if return_outputs else loss

    def _checked_losses(self, model: nn.Module, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """Losses (R,) and values (R, M). Raises FloatingPointError when a value is not finite."""
        losses, metrics = self._row_losses(model, batch)
        self._metric_names = tuple(metrics)
        values = torch.stack(list(metrics.values()), dim=1)
        if not values.isfinite().all():
            row, column = (~values.isfinite()).nonzero()[0].tolist()
            self._stop(self._metric_names[column], float(values[row, column]), f" for the row with idx {batch.idx[row]}")
        return losses, values

    def _stop(self, metric: str, value: float, where: str = "") -> None:
        raise FloatingPointError(
            f"{metric} is {value} at step {self.state.global_step + 1}{where}; the run stops before anything more is saved. "
            f"The last checkpoint in {self.args.output_dir} is intact: continue from it with a lower --max_grad_norm, "
            "or begin anew with a lower --learning_rate (a resumed run keeps its schedule)"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            self._stop("grad_norm", float(norm))
        return norm

    def prediction_step(
        self, model: nn.Module, inputs: RowBatch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """(R, M) values per row as "logits"; the evaluation loop gathers them exactly, and wants "labels" before it computes metrics."""
        with torch.no_grad():
            _, values = self._checked_losses(model, self._prepare_inputs(inputs))
        return None, values, values[:, 0]

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        sums = prediction.predictions.sum(axis=0, dtype=np.float64).tolist()
        return self._summarize(dict(zip(self._metric_names, sums, strict=True)), len(prediction.predictions))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics over every micro-batch and process since the last log."""
        if "loss" in logs and self._metric_sums is not None:
            *sums, rows = self.accelerator.reduce(self._metric_sums, "sum").tolist()
            metrics = self._summarize(dict(zip(self._metric_names, sums, strict=True)), rows)
            logs = {**logs, **{name: value for name, value in metrics.items() if name != "loss"}}
            self._metric_sums = None
        super().log(logs, start_time)

    # --- files

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written elsewhere and renamed, so that a kill at any moment leaves whole checkpoints only.

        Raises OSError when it cannot be written; nothing of it is left then.
        """
        output_dir = Path(self.args.output_dir)
        name, partial = checkpoint_name(self.state.global_step), partial_run(output_dir)
        if self.args.should_save:
            remove_leftovers(output_dir)
        self.accelerator.wait_for_everyone()
        with writing(partial):
            self._checkpoint_run = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoint_run = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._name_best(output_dir)
                self.state.save_to_json(str(partial / name / "trainer_state.json"))
                publish(partial / name, output_dir / name)
                partial.rmdir()
        self.accelerator.wait_for_everyone()  # nobody goes on, and perhaps resumes, before the name is there
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(output_dir / name))
        if self.args.should_save and self.args.save_total_limit:
            self._rotate(output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._checkpoint_run is None else str(self._checkpoint_run)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called while the folder still has its temporary name; `_save_checkpoint` does it after that."""

    def _name_best(self, output_dir: Path) -> None:
        """The best checkpoint by its final path; Trainer looks for it where it writes."""
        step = self.state.best_global_step
        if step and (step == self.state.global_step or (output_dir / checkpoint_name(step)).exists()):
            self.state.best_model_checkpoint = str(output_dir / checkpoint_name(step))

    def _rotate(self, output_dir: Path) -> None:
        """Delete the oldest checkpoints beyond --save_total_limit, never the one just written or the best."""
        kept = {checkpoint_name(self.state.global_step), Path(self.state.best_model_checkpoint or "").name}
        folders = sorted(checkpoints(output_dir), key=lambda folder: folder.stat().st_mtime_ns)
        surplus = len(folders) - self.args.save_total_limit
        remove([folder for folder in folders if folder.name not in kept][: max(surplus, 0)])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            save_adapter(self.adapter, Path(output_dir or self.args.output_dir))

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
