"""DPO on stored reference log-probs, or with LoRA on those of the policy without its adapter.

PreferencePair --PairCollator (workers)--> PairBatch --response_logps--> per-token log-probs --reduction--> one number per response
    --loss--> losses (P,), rewards (P,) --preference_metrics--> logged means
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

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
from muffin.pair_log import PairLog
from muffin.pairs import PreferenceDataset, PreferencePair
from muffin.policies import PolicyAdapter
from muffin.policy_trainer import PolicyArguments, PolicyTrainer
from muffin.provenance import REFERENCE_FILE, explain_difference, reference_id, write_atomically
from muffin.reference_gate import check_reference, spread_positions

LOGGED_PAIRS = 4


@dataclass
class DPOArguments(PolicyArguments):
    """Options of DPO."""

    plan: bool = field(
        default=False,
        metadata={"help": "Print whether training fits and how long it takes, and end: no weights are read, no file written."},
    )
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate; usually 5e-7 (full) or 1e-5 (LoRA)."})
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
    reference: Literal["stored", "adapter_disabled"] = field(
        default="stored",
        metadata={
            "help": "Where reference log-probs come from: the rows, or with LoRA one more forward per step, without the adapter; the "
            "rows then need none."
        },
    )
    reference_check_rows: int = field(default=8, metadata={"help": "Rows whose stored log-probs are recomputed before the first step."})
    accept_foreign_logps: bool = field(
        default=False, metadata={"help": "Train on stored log-probs that this policy did not make, such as those RLAIF-V publishes."}
    )

    log_pairs_steps: int = field(
        default=100,
        metadata={"help": "Steps between two tables of four fixed pairs (held-out ones, if given) with their rewards; 0 for none."},
    )

    def __post_init__(self) -> None:
        if self.log_pairs_steps < 0:
            raise ValueError(f"--log_pairs_steps is {self.log_pairs_steps}, want a number of steps, or 0 for none")
        if self.label_smoothing_factor:
            raise ValueError(
                f"--label_smoothing_factor {self.label_smoothing_factor} smooths tokens; for noisy preferences: --dpo_label_smoothing"
            )
        super().__post_init__()
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
        if self.reference == "adapter_disabled" and not self.lora_enable:
            raise ValueError(
                "--reference adapter_disabled needs --lora_enable True: without an adapter to switch off, the reference is gone after one "
                "step; store its log-probs with eval/muffin_inference_logp.py"
            )
        if self.reference == "adapter_disabled" and self.accept_foreign_logps:
            raise ValueError("--accept_foreign_logps True means nothing with --reference adapter_disabled, which reads no stored log-probs")
        if self.reference_check_rows < 1:
            raise ValueError(f"--reference_check_rows is {self.reference_check_rows}, want at least 1 (8 takes seconds)")


def select_reduction(args: DPOArguments) -> Reduction:
    """How stored and recomputed log-probs per token become one number per response, by the flags."""
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


class _ReferenceGate(TrainerCallback):
    """Runs the reference gate before the first step; Trainer offers this moment to callbacks only."""

    def __init__(self, trainer: "DPOTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:  # after a resume the policy is no longer its reference
            self.trainer.check_reference()


class DPOTrainer(PolicyTrainer):
    """Trainer of a policy on PreferencePairs with stored reference log-probs.

    reference: description of the reference policy (muffin.provenance.describe_reference), saved with every checkpoint.
    scoring_command: what error messages tell the user to run.
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
        self.reference = reference
        self.scoring_command = scoring_command
        self.pair_loss = select_loss(args)
        super().__init__(
            model,
            args,
            adapter,
            data_collator=PairCollator(
                adapter,
                select_reduction(args),
                accept_foreign_logps=args.accept_foreign_logps,
                stored_reference=args.reference == "stored",
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        if args.reference == "stored":
            self.add_callback(_ReferenceGate(self))
        if args.log_pairs_steps:
            shown = train_dataset if eval_dataset is None else eval_dataset
            pairs = [shown[position] for position in spread_positions(len(shown), LOGGED_PAIRS)]
            self.add_callback(PairLog(pairs, self.rewards, steps=args.log_pairs_steps, others=self.callback_handler.callbacks))

    def _shuffled(self, dataset: PreferenceDataset) -> ShuffledRows:
        if self.args.group_by_prompt:
            return ShuffledPrompts(prompt_groups(dataset), self.args.per_device_train_batch_size, self.args.shuffle_seed)
        return super()._shuffled(dataset)

    def _row_losses(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        reference_chosen, reference_rejected = self._reference_logps(model, batch)
        with self.args.numerics.autocast(self.args.device.type):
            logps = response_logps(model, batch.packed)
        chosen, rejected = logps.weighted_sums(batch.token_weights).view(-1, 2).unbind(dim=1)
        losses, chosen_rewards, rejected_rewards = self.pair_loss(
            policy_chosen_logps=chosen,
            policy_rejected_logps=rejected,
            reference_chosen_logps=reference_chosen,
            reference_rejected_logps=reference_rejected,
        )
        losses = losses + self.args.sft_weight * sft_loss(chosen)
        chosen_sums, rejected_sums = logps.sums.detach().view(-1, 2).unbind(dim=1)
        return losses, {"loss": losses.detach()} | preference_metrics(
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            policy_chosen_logps=chosen_sums,
            policy_rejected_logps=rejected_sums,
        )

    def _reference_logps(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """(P,) of chosen and of rejected, as stored, or by the same model without its adapter."""
        if self.args.reference == "stored":
            return batch.reference_chosen_logps, batch.reference_rejected_logps
        adapted = next(module for module in model.modules() if isinstance(module, PeftModel))
        training = model.training
        model.eval()  # as scoring does: no dropout
        with torch.no_grad(), adapted.disable_adapter(), self.args.numerics.autocast(self.args.device.type):
            logps = response_logps(model, batch.packed)
        model.train(training)
        chosen, rejected = logps.weighted_sums(batch.token_weights).view(-1, 2).unbind(dim=1)
        return chosen, rejected

    @torch.no_grad()
    def rewards(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and of rejected (P,) under the policy as it is now, without dropout."""
        training = self.model_wrapped.training
        self.model_wrapped.eval()
        _, values = self._checked_losses(self.model_wrapped, self._prepare_inputs(self.data_collator(pairs)))
        self.model_wrapped.train(training)
        chosen, rejected = (values[:, self._metric_names.index(name)] for name in ("rewards/chosen", "rewards/rejected"))
        return chosen, rejected

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
            manifest = {"reference_id": reference_id(self.reference), "reference": self.reference}
            file = Path(output_dir or self.args.output_dir) / REFERENCE_FILE
            write_atomically(file, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
