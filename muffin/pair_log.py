"""Some fixed pairs and their rewards during training: what the policy makes of them, for reading rather than for averaging.

pairs, steps --PairLog (a callback of the Trainer)--> OUTPUT/pairs.jsonl, a line per pair and logged step; tensorboard, wandb

{"step": 50, "idx": "7", "reward_chosen": 0.31, "reward_rejected": -0.2, "margin": 0.51, "question": ..., "chosen": ..., "rejected": ...}
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from muffin.pairs import PreferencePair
from muffin.provenance import write_atomically

FILE = "pairs.jsonl"
COLUMNS = ("step", "idx", "reward_chosen", "reward_rejected", "margin", "question", "chosen", "rejected")

Rewards = Callable[[Sequence[PreferencePair]], tuple[Tensor, Tensor]]  # (P,) of chosen and of rejected, in beta * nats


class PairLog(TrainerCallback):
    """Logs the rewards of `pairs` every `steps` optimizer steps and after the last one.

    rewards: called on every process, since sharded engines need all of them; the first process writes. others: the callbacks that may
    have a tensorboard or wandb run open. After a resume, lines of steps that are trained again are written again.
    """

    def __init__(self, pairs: Sequence[PreferencePair], rewards: Rewards, *, steps: int, others: Sequence[TrainerCallback]) -> None:
        self.pairs, self.rewards, self.steps, self.others = pairs, rewards, steps, others

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        file = Path(args.output_dir) / FILE
        if state.is_world_process_zero and file.exists():
            kept = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= state.global_step]
            write_atomically(file, "".join(f"{line}\n" for line in kept).encode())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps and state.global_step != state.max_steps:
            return
        rows = table(self.pairs, *self.rewards(self.pairs), step=state.global_step)
        if not state.is_world_process_zero:
            return
        with open(Path(args.output_dir) / FILE, "a") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for callback in self.others:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("pairs", markdown(rows), state.global_step)
            elif isinstance(callback, WandbCallback) and callback._initialized:
                shown = callback._wandb.Table(columns=list(COLUMNS), data=[[row[name] for name in COLUMNS] for row in rows])
                callback._wandb.log({"pairs": shown}, step=state.global_step)


def table(pairs: Sequence[PreferencePair], chosen: Tensor, rejected: Tensor, *, step: int) -> list[dict[str, Any]]:
    """One row per pair under COLUMNS. chosen, rejected: (P,) rewards."""
    values = zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)
    return [
        dict(zip(COLUMNS, (step, pair.idx, won, lost, won - lost, pair.question, pair.chosen, pair.rejected), strict=True))
        for pair, won, lost in values
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """As a table that tensorboard renders; what would end a cell or a row, or be markup, is escaped."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [f"{value:+.3f}" if isinstance(value, float) else escape(str(value)) for value in (row[name] for name in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text as one cell of a Markdown table."""
    for mark, shown in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("\\", "\\\\"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("*", "\\*"),
        ("_", "\\_"),
    ):
        text = text.replace(mark, shown)
    return " ".join(text.split())
