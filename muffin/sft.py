"""Supervised fine-tuning on chosen answers: the cold start of a policy, or the step before preference learning.

    Demonstration --DemonstrationCollator (workers)--> DemonstrationBatch --response_logps--> negative log-likelihoods (R,)

The loss of a step is the mean over its response tokens, or over its answers' means (`--sft_use_average True`), on all processes.
"""

from collections.abc import Callable, Mapping, Sequence
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

    sft_use_average: bool = field(
        default=False,
        metadata={"help": "Each answer counts the same (the mean over its tokens), not each token: for a mix of long and short ones."},
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
        """With all tensors on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "DemonstrationBatch":
        """With all tensors in page-locked memory; DataLoader calls it."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


class DemonstrationCollator:
    """list[Demonstration] -> DemonstrationBatch. Runs in DataLoader workers."""

    def __init__(self, adapter: PolicyAdapter, *, items: Callable[[PackedBatch], int]) -> None:
        """items: what the loss of a step is a mean over, `count_tokens` or `count_answers`."""
        self.adapter = adapter
        self.items = items

    def __call__(self, rows: Sequence[Demonstration]) -> DemonstrationBatch:
        encoded = []
        for row in rows:
            try:
                encoded.append(self.adapter.encode(row.image, row.question, (row.chosen,)))
            except ValueError as error:
                raise ValueError(f"idx {row.idx}: {error}") from error
        packed = pack(encoded, self.adapter)
        return DemonstrationBatch(packed, tuple(row.idx for row in rows), self.items(packed))


def count_tokens(packed: PackedBatch) -> int:
    """Response tokens: what a mean over tokens divides by."""
    return int(packed.lengths.sum())


def count_answers(packed: PackedBatch) -> int:
    """Responses: what a mean over answers divides by."""
    return len(packed.lengths)


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
        collator = DemonstrationCollator(adapter, items=count_answers if args.sft_use_average else count_tokens)
        super().__init__(model, args, adapter, data_collator=collator, train_dataset=train_dataset, eval_dataset=eval_dataset)

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
        losses = sft_loss(logps.averages if self.args.sft_use_average else logps.sums)
        return losses, {"loss": losses.detach(), "tokens": logps.lengths.to(losses.dtype)}

    def _summarize(self, sums: Mapping[str, float], rows: float) -> dict[str, float]:
        """loss: per item; tokens: response tokens per row."""
        return {"loss": sums["loss"] / (rows if self.args.sft_use_average else sums["tokens"]), "tokens": sums["tokens"] / rows}
