"""Supervised fine-tuning on chosen answers: the cold start of a policy, or the step before preference learning.

    Demonstration --DemonstrationCollator (workers)--> DemonstrationBatch --response_logps--> negative log-likelihoods (R,)

The loss of a step is the mean over its response tokens, on all processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from muffin.logps import response_logps
from muffin.losses import sft_loss
from muffin.muon import MuonAdamW, hidden_matrices
from muffin.packing import PackedBatch, map_tensors, pack
from muffin.pairs import Demonstration, DemonstrationDataset
from muffin.policies import PolicyAdapter
from muffin.policy_trainer import PolicyArguments, PolicyTrainer


@dataclass
class SFTArguments(PolicyArguments):
    """Options of supervised fine-tuning."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate; usually 1e-5 to 2e-5 (full), 1e-4 (LoRA)."})
    muon_learning_rate: float = field(
        default=0.0,
        metadata={"help": "Training from scratch: above 0, Muon trains hidden matrices at this rate, --learning_rate the rest."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.muon_learning_rate < 0:
            raise ValueError(f"--muon_learning_rate is {self.muon_learning_rate}, want 0 (off) or a positive rate such as 4e-3")
        if self.muon_learning_rate and self.lora_enable:
            raise ValueError("--muon_learning_rate is for training all weights; leave it out with --lora_enable True")


@dataclass(frozen=True)
class DemonstrationBatch:
    """R demonstrations: one response each, in `packed`."""

    packed: PackedBatch
    idx: tuple[int | str, ...]
    num_items: int

    def __len__(self) -> int:
        return len(self.idx)

    def to(self, device: torch.device | str) -> "DemonstrationBatch":
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "DemonstrationBatch":
        return map_tensors(self, lambda tensor: tensor.pin_memory())


class DemonstrationCollator:
    """list[Demonstration] -> DemonstrationBatch. Runs in DataLoader workers."""

    def __init__(self, adapter: PolicyAdapter) -> None:
        self.adapter = adapter

    def __call__(self, rows: Sequence[Demonstration]) -> DemonstrationBatch:
        encoded = []
        for row in rows:
            try:
                encoded.append(self.adapter.encode(row.image, row.question, (row.chosen,)))
            except ValueError as error:
                raise ValueError(f"idx {row.idx}: {error}") from error
        packed = pack(encoded, self.adapter)
        return DemonstrationBatch(packed, tuple(row.idx for row in rows), int(packed.lengths.sum()))


class SFTTrainer(PolicyTrainer):
    """Trainer of a policy on demonstrations."""

    def __init__(
        self,
        model: nn.Module,
        args: SFTArguments,
        adapter: PolicyAdapter,
        train_dataset: DemonstrationDataset,
        eval_dataset: DemonstrationDataset | None = None,
    ) -> None:
        super().__init__(
            model, args, adapter, data_collator=DemonstrationCollator(adapter), train_dataset=train_dataset, eval_dataset=eval_dataset
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if not self.args.muon_learning_rate:
            return super().create_optimizer(model)
        matrices, others = hidden_matrices(self.model)
        self.optimizer = MuonAdamW(
            matrices,
            others,
            muon_learning_rate=self.args.muon_learning_rate,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer

    def _row_losses(self, model: nn.Module, batch: DemonstrationBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.args.numerics.autocast(self.args.device.type):
            logps = response_logps(model, batch.packed)
        losses = sft_loss(logps.sums)
        return losses, {"loss": losses.detach(), "tokens": logps.lengths.to(losses.dtype)}

    def _summarize(self, sums: Mapping[str, float], rows: float) -> dict[str, float]:
        """loss: per response token; tokens: response tokens per row."""
        return {"loss": sums["loss"] / sums["tokens"], "tokens": sums["tokens"] / rows}
