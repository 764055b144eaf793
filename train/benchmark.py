"""How fast is a DPO step? muffin against RLAIF-V's computation and TRL's DPOTrainer: same weights, same pairs, one run, taking turns.

    python train/benchmark.py --output outputs/benchmark.json
    python train/benchmark.py --quick True          # the V = 2k cell alone, a full training step, in under two minutes

Variants
    muffin    pack + response_logps + dpo_loss: prompt and image once per pair, logits at response positions only
    rlaifv    RLAIF-V: chosen and rejected as one right-padded batch, every image twice, log_softmax over all positions;
              its scorer runs the responses one at a time
    trl       TRL's DPOTrainer as installed (extra `bench`), with its own collator: runs the reference model in every step
    trl_lean  TRL at its leanest, which no setting reaches: stored reference log-probs, logits at response positions only
TRL's defaults gradient_checkpointing and bf16 are off and the vision tower is frozen, for all. Batches are collated before the clock
starts; a training step is forward, backward, clipping and fused AdamW.

Cells are random LLaVA-shaped models with random pairs. v2k has a 7B model's share of lm_head in the cost (hidden 512, V = 2,000,
576 image tokens, responses of about 100 tokens); v32k has LLaVA's vocabulary; group2 and group4 are several pairs of one prompt, batch4
four prompts, claims 8 short responses of one prompt as in labelling. LLaVA-1.5-7B itself is
`--cells v32k --hidden_size 4096 --num_hidden_layers 32`.

Before timing, the losses of all variants must agree to 1e-4 in float32. Memory is the growth of resident memory (on CUDA of allocated
memory) over a step, the optimizer's state included, in a process of its own. FLOPs are counted from shapes (muffin.flops); the machine's
matrix-product rate is measured in every round. A ratio of times is the median over rounds of a variant's seconds by muffin's in the
same round.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Literal
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPVisionConfig, HfArgumentParser, LlamaConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from muffin.flops import Mode, forward_flops, packed_work, padded_work, step_flops
from muffin.logps import get_batch_logps, response_logps
from muffin.losses import dpo_loss
from muffin.packing import pack
from muffin.policies.llava15 import Llava15Policy, LlavaForConditionalGeneration

BETA = 0.1
LOSS_TOLERANCE = 1e-4
QUESTION_WORDS = 37  # with 576 image tokens and the template: a prompt of 616 tokens
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>", "USER:", "ASSISTANT:")
REFERENCE_SEED, POLICY_SEED = 0, 1


@dataclass(frozen=True)
class Cell:
    """Shapes to compare on: `prompts` images with one question each, `pairs` pairs of every prompt."""

    vocabulary: int
    prompts: int = 1
    pairs: int = 1
    response_scale: float = 1.0  # times --response_tokens
    modes: tuple[Mode, ...] = ("full", "lora", "score")
    variants: tuple[str, ...] = ("muffin", "rlaifv", "trl", "trl_lean")


CELLS = {
    "v2k": Cell(2000),
    "v2k_group2": Cell(2000, pairs=2, modes=("full", "score"), variants=("muffin", "rlaifv")),
    "v2k_group4": Cell(2000, pairs=4, modes=("full", "score"), variants=("muffin", "rlaifv")),
    "v2k_batch4": Cell(2000, prompts=4, modes=("full",), variants=("muffin", "rlaifv")),
    "v2k_claims": Cell(2000, pairs=4, response_scale=0.06, modes=("score",), variants=("muffin", "rlaifv")),
    "v32k": Cell(32000),
}


@dataclass
class BenchmarkOptions:
    output: str | None = field(default=None, metadata={"help": "JSON file for the results: a list, one row per cell, mode and variant."})
    quick: bool = field(default=False, metadata={"help": "The v2k cell alone, a full training step, 2 rounds: under two minutes."})
    cells: list[str] = field(default_factory=lambda: list(CELLS), metadata={"help": f"What to run, of: {', '.join(CELLS)}."})
    modes: list[str] = field(
        default_factory=lambda: ["full", "lora", "score"],
        metadata={"help": "full and lora (rank 16) training steps, score (a forward); each cell runs those of them that it has."},
    )
    variants: list[str] = field(
        default_factory=lambda: ["muffin", "rlaifv", "trl", "trl_lean"],
        metadata={"help": "What to compare; muffin must be among them, and trl ones are left out when trl is not installed."},
    )
    repeats: int = field(default=5, metadata={"help": "Timed rounds after one warm-up round, 3 to 20; a round runs every variant once."})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "bfloat16 is float32 weights under autocast."})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where to run."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})
    hidden_size: int = field(default=512, metadata={"help": "Decoder width, a multiple of 128; MLP and vision tower follow it."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Decoder layers; the vision tower has three quarters as many."})
    image_size: int = field(default=336, metadata={"help": "Side of the images in pixels, a multiple of 14; 336 makes 576 image tokens."})
    response_tokens: int = field(default=100, metadata={"help": "Mean response length; lengths are spread evenly up to a fifth around it."})
    memory_only: bool = field(
        default=False,
        metadata={"help": "Print the growth of memory in MB over a step of one variant; the benchmark starts itself with this."},
    )

    def __post_init__(self) -> None:
        for flag, known in (("cells", CELLS), ("modes", CELLS["v2k"].modes), ("variants", CELLS["v2k"].variants)):
            unknown = [name for name in getattr(self, flag) if name not in known]
            if unknown:
                raise ValueError(f"--{flag} {' '.join(unknown)} is unknown; choose from {', '.join(known)}")
        if "muffin" not in self.variants and not self.memory_only:
            raise ValueError(f"--variants {' '.join(self.variants)} lacks muffin, which the others are compared with; add it")
        if self.hidden_size % 128 or self.image_size % 14 or self.repeats < 1:
            raise ValueError(
                f"--hidden_size {self.hidden_size} must be a multiple of 128, --image_size {self.image_size} a multiple of 14, "
                f"--repeats {self.repeats} at least 1"
            )


OPTIONS = (BenchmarkOptions,)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # TRL's use of its own defaults
    torch.set_num_threads(options.num_threads)
    if options.memory_only:
        print(memory_growth(options))
        return []
    if find_spec("trl") is None:
        print('without TRL, which is not installed: pip install -e ".[bench]"')
        options = replace(options, variants=[name for name in options.variants if not name.startswith("trl")])
    if options.quick:
        options = replace(options, cells=["v2k"], modes=["full"], repeats=2)
    results = []
    for cell in options.cells:
        for mode in options.modes:
            if mode in CELLS[cell].modes:
                rows = run_cell(options, cell, mode)
                print_rows(rows)
                results += rows
    if options.output is not None:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n")
    return results


# --- the problem: pairs and models, equal for every variant


def llava_config(options: BenchmarkOptions, vocabulary: int) -> LlavaConfig:
    """LLaVA-1.5's proportions at any width; at 4096 and 32 layers LLaVA-1.5-7B itself."""
    width, vision_width = options.hidden_size, min(options.hidden_size // 2, 1024)
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=min(width // 64, 32),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=max(1, options.num_hidden_layers * 3 // 4),
        num_attention_heads=vision_width // 64,
        image_size=options.image_size,
        patch_size=14,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=(options.image_size // 14) ** 2,
    )


def build_adapter(config: LlavaConfig) -> Llava15Policy:
    """LLaVA-1.5's adapter over a tokenizer of whole words: the special tokens, then t7, t8, ..."""
    words = [*SPECIAL_TOKENS, *(f"t{number}" for number in range(len(SPECIAL_TOKENS), config.text_config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))])
    side = config.vision_config.image_size
    return Llava15Policy(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            additional_special_tokens=["<image>"],
        ),
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        vision={"patch_size": 14, "image_size": side, "select_strategy": "default"},
        prompt_name="hf",
        image_aspect_ratio="crop",
        model_max_length=2048,
    )


@dataclass(frozen=True)
class Row:
    image: Image.Image
    question: str
    chosen: str
    rejected: str


def make_rows(options: BenchmarkOptions, cell: Cell) -> list[Row]:
    """Random pairs, those of a prompt next to each other."""
    rng = Random(0)
    side, mean = options.image_size, options.response_tokens * cell.response_scale

    def text(words: int) -> str:
        return " ".join(f"t{rng.randrange(len(SPECIAL_TOKENS), cell.vocabulary)}" for _ in range(words))

    def answer() -> str:  # its terminator is a token too
        return text(round(mean * rng.uniform(0.8, 1.2)) - 1)

    rows = []
    for _ in range(cell.prompts):
        image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        question = text(QUESTION_WORDS)
        rows += [Row(image, question, answer(), answer()) for _ in range(cell.pairs)]
    return rows


class Problem:
    """Encoded pairs of a cell, the policy to train or to score with, and the reference it started from."""

    def __init__(self, options: BenchmarkOptions, cell: Cell, mode: Mode) -> None:
        self.options, self.mode = options, mode
        self.config = llava_config(options, cell.vocabulary)
        self.adapter = build_adapter(self.config)
        self.rows = make_rows(options, cell)
        self.encoded = [self.adapter.encode(row.image, row.question, [row.chosen, row.rejected]) for row in self.rows]
        self.lora = LoraConfig(r=16, lora_alpha=16, target_modules=self.adapter.spec.lora_targets)

    def base(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        with torch.device(self.options.device):
            model = LlavaForConditionalGeneration(self.config)
        model.model.vision_tower.requires_grad_(False)
        return model

    def reference(self) -> nn.Module:
        return self.base(REFERENCE_SEED)

    def policy_base(self) -> nn.Module:
        """The policy without its adapter. Full: other weights than the reference's, or every loss would be ln 2."""
        return self.base(REFERENCE_SEED if self.mode == "lora" else POLICY_SEED)

    def policy(self) -> nn.Module:
        model = self.policy_base()
        return randomize_adapter(get_peft_model(model, self.lora)) if self.mode == "lora" else model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.dtype == "bfloat16")

    def plain_sequences(self) -> list[dict[str, Tensor]]:
        """Model inputs and labels of every response on its own (batch size 1), chosen of each pair first."""
        sequences = []
        for item in self.encoded:
            for response in item.response_ids:
                labels = torch.cat([torch.full_like(item.prompt_ids, -100), response])
                ids = torch.cat([item.prompt_ids, response])
                sequences.append({"input_ids": ids[None], "labels": labels[None], "pixel_values": item.vision["pixel_values"]})
        return [to_device(sequence, self.options.device) for sequence in sequences]


def randomize_adapter(model: nn.Module) -> nn.Module:
    """Give LoRA weights reproducible values other than zero, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(POLICY_SEED)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def to_device(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def plain_logps(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(S,) summed log-probs from full logits, as RLAIF-V computes them."""
    logits = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], use_cache=False).logits
    sums, _ = get_batch_logps(logits, inputs["labels"])
    return sums


def reference_logps(problem: Problem) -> Tensor:
    """(2, P) log-probs of chosen and rejected that a scored data set would bring along."""
    with torch.no_grad():
        model = problem.reference()
        return torch.cat([plain_logps(model, sequence) for sequence in problem.plain_sequences()]).view(-1, 2).T


# --- variants


class Variant(ABC):
    """One way to compute the step of a problem. reference_logps: (2, P), chosen and rejected."""

    def __init__(self, problem: Problem, reference_logps: Tensor) -> None:
        self.problem = problem
        self.reference_logps = reference_logps
        self.model = self.build_model()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=5e-7, fused=True)

    def build_model(self) -> nn.Module:
        return self.problem.policy()

    @abstractmethod
    def logps(self) -> Tensor:
        """(2, P) log-probs of chosen and rejected, as a scorer computes them."""

    @abstractmethod
    def loss(self) -> Tensor:
        """The mean DPO loss, as a trainer computes it."""

    @abstractmethod
    def flops(self, config: LlavaConfig) -> int:
        """Analytic FLOPs of a step on these pairs for a model of this shape."""

    def backward(self) -> None:
        with self.problem.autocast():
            loss = self.loss()
        loss.backward()

    def step(self) -> None:
        """What is timed: a training step, or a scoring forward."""
        if self.problem.mode == "score":
            with torch.no_grad(), self.problem.autocast():
                self.logps()
            return
        self.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check_loss(self) -> float:
        """The loss by the code that is timed, in float32 whatever --dtype is."""
        with torch.no_grad():
            return float(mean_dpo_loss(self.logps(), self.reference_logps) if self.problem.mode == "score" else self.loss())


def mean_dpo_loss(logps: Tensor, reference_logps: Tensor) -> Tensor:
    losses, _, _ = dpo_loss(
        policy_chosen_logps=logps[0],
        policy_rejected_logps=logps[1],
        reference_chosen_logps=reference_logps[0],
        reference_rejected_logps=reference_logps[1],
        beta=BETA,
    )
    return losses.mean()


class Muffin(Variant):
    def __init__(self, problem: Problem, reference_logps: Tensor) -> None:
        super().__init__(problem, reference_logps)
        self.batch = pack(problem.encoded, problem.adapter).to(problem.options.device)

    def logps(self) -> Tensor:
        return response_logps(self.model, self.batch).sums.view(-1, 2).T

    def loss(self) -> Tensor:
        return mean_dpo_loss(self.logps(), self.reference_logps)

    def flops(self, config: LlavaConfig) -> int:
        return step_flops(config, packed_work(self.batch), self.problem.mode)


class RlaifV(Variant):
    def __init__(self, problem: Problem, reference_logps: Tensor) -> None:
        super().__init__(problem, reference_logps)
        self.sequences = problem.plain_sequences()
        ordered = self.sequences[0::2] + self.sequences[1::2]
        self.inputs = {
            name: nn.utils.rnn.pad_sequence([sequence[name][0] for sequence in ordered], batch_first=True, padding_value=padding)
            for name, padding in (("input_ids", SPECIAL_TOKENS.index("<pad>")), ("labels", -100), ("pixel_values", 0))
        }

    def logps(self) -> Tensor:
        return torch.cat([plain_logps(self.model, sequence) for sequence in self.sequences]).view(-1, 2).T

    def loss(self) -> Tensor:
        return mean_dpo_loss(plain_logps(self.model, self.inputs).view(2, -1), self.reference_logps)

    def flops(self, config: LlavaConfig) -> int:
        batches = self.sequences if self.problem.mode == "score" else [self.inputs]
        shapes = [batch["input_ids"].shape for batch in batches]
        return sum(step_flops(config, padded_work(count, length, count * length), self.problem.mode) for count, length in shapes)


class Trl(Variant):
    def build_model(self) -> nn.Module:
        from trl import DPOConfig, DPOTrainer

        problem, adapter = self.problem, self.problem.adapter
        processor = LlavaProcessor(
            image_processor=adapter.image_processor,
            tokenizer=adapter.tokenizer,
            patch_size=adapter.vision["patch_size"],
            vision_feature_select_strategy=adapter.vision["select_strategy"],
            num_additional_image_tokens=1,
        )
        self.trainer = DPOTrainer(
            model=problem.policy_base(),
            ref_model=None if problem.mode == "lora" else problem.reference(),  # LoRA: the policy with its adapter off
            args=DPOConfig(
                output_dir=tempfile.gettempdir(),  # nothing is written
                beta=BETA,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=problem.options.device == "cpu",
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"images": [], "prompt": "", "chosen": "", "rejected": ""}]),  # only its columns are read
            processing_class=processor,
            peft_config=problem.lora if problem.mode == "lora" else None,
        )
        self.trainer.compute_loss_context_manager = problem.autocast  # Trainer leaves this to accelerate's wrapping, in trainer.train()
        self.trainer.current_gradient_accumulation_steps = 1  # likewise
        examples = [
            {
                "images": [row.image],
                "prompt": f"<s>USER: <image>\n{row.question} ASSISTANT:",
                "chosen": f" {row.chosen}</s>",
                "rejected": f" {row.rejected}</s>",
            }
            for row in problem.rows
        ]
        self.inputs = to_device(self.trainer.data_collator(examples), problem.options.device)
        return randomize_adapter(self.trainer.model)

    def logps(self) -> Tensor:
        return torch.stack(self.trainer.compute_ref_log_probs(self.model, self.inputs))

    def loss(self) -> Tensor:
        return self.trainer.compute_loss(self.model, self.inputs)

    def backward(self) -> None:
        self.trainer.training_step(self.model, self.inputs)

    def head_rows(self) -> int:
        if self.problem.options.device == "cuda":
            return int(self.inputs["completion_mask"].sum())
        return self.inputs["input_ids"][:, 1:].numel()

    def flops(self, config: LlavaConfig) -> int:
        work = padded_work(*self.inputs["input_ids"].shape, self.head_rows())
        if self.problem.mode == "score":
            return step_flops(config, work, "score")
        logits_again = forward_flops(config, work).head  # its backward recomputes them
        return step_flops(config, work, self.problem.mode) + logits_again + self.reference_flops(step_flops(config, work, "score"))

    def reference_flops(self, forward: int) -> int:
        return forward


class TrlLean(Trl):
    def build_model(self) -> nn.Module:
        model = super().build_model()
        self.trainer.precompute_ref_logps = True  # DPOConfig refuses precompute_ref_log_probs for vision data
        self.inputs["ref_chosen_logps"], self.inputs["ref_rejected_logps"] = self.reference_logps
        return model

    def step(self) -> None:
        with self.response_rows_only():
            super().step()

    def check_loss(self) -> float:
        with self.response_rows_only():
            return super().check_loss()

    def response_rows_only(self):
        """Let the head score response positions only, as it does on CUDA; elsewhere TRL scores all."""
        return mock.patch("trl.trainer.utils._use_triton", return_value=True)

    def head_rows(self) -> int:
        return int(self.inputs["completion_mask"].sum())

    def reference_flops(self, forward: int) -> int:
        return 0


VARIANTS: dict[str, type[Variant]] = {"muffin": Muffin, "rlaifv": RlaifV, "trl": Trl, "trl_lean": TrlLean}


# --- measuring


def run_cell(options: BenchmarkOptions, cell: str, mode: Mode) -> list[dict[str, Any]]:
    """Result rows of the variants that are asked for and that the cell has."""
    names = [name for name in options.variants if name in CELLS[cell].variants]
    with ThreadPoolExecutor(max_workers=2 if options.device == "cpu" else 1) as processes:
        runs = [replace(options, cells=[cell], modes=[mode], variants=[name], memory_only=True) for name in names]
        peaks = dict(zip(names, processes.map(memory_growth_of_process, runs), strict=True))
    problem = Problem(options, CELLS[cell], mode)
    stored = reference_logps(problem)
    variants = {name: VARIANTS[name](problem, stored) for name in names}
    check_agreement({name: variant.check_loss() for name, variant in variants.items()})
    seconds, gemm_rate = time_rounds(variants, options)
    pairs = len(problem.rows)
    llava_7b = LlavaConfig()  # transformers' default sizes are LLaVA-1.5-7B's
    rows = []
    for name, variant in variants.items():
        flops = variant.flops(problem.config)
        rows.append(
            {
                "cell": cell,
                "mode": mode,
                "variant": name,
                "seconds_median": median(seconds[name]),
                "seconds_min": min(seconds[name]),
                "seconds_max": max(seconds[name]),
                "pairs_per_second": pairs / median(seconds[name]),
                "peak_mb": peaks[name],
                "ratio_to_muffin": median(theirs / ours for theirs, ours in zip(seconds[name], seconds["muffin"], strict=True)),
                "gflop_per_pair": flops / pairs / 1e9,
                "share_of_gemm_rate": flops / median(seconds[name]) / gemm_rate,
                "gemm_gflop_per_second": gemm_rate / 1e9,
                "llava_7b_tflop_per_pair": variant.flops(llava_7b) / pairs / 1e12,
            }
        )
    return rows


def check_agreement(losses: dict[str, float]) -> None:
    """Raise RuntimeError unless all variants compute muffin's loss: a faster wrong answer is no result."""
    wrong = {name: loss for name, loss in losses.items() if not abs(loss - losses["muffin"]) <= LOSS_TOLERANCE}
    if wrong:
        found = ", ".join(f"{name} {loss:.6f}" for name, loss in wrong.items())
        raise RuntimeError(f"losses differ by more than {LOSS_TOLERANCE} from muffin's {losses['muffin']:.6f}: {found}; nothing was timed")


def time_rounds(variants: dict[str, Variant], options: BenchmarkOptions) -> tuple[dict[str, list[float]], float]:
    """Seconds per step of every variant in every round, and the matrix-product rate in FLOP/s over the same time (median)."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    rates = []
    names = list(variants)
    for number in range(options.repeats + 1):
        rates.append(gemm_flops_per_second(options))
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = clock(options.device)
            variants[name].step()
            seconds[name].append(clock(options.device) - start)
    return {name: taken[1:] for name, taken in seconds.items()}, median(rates)  # the first round was the warm-up


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def gemm_flops_per_second(options: BenchmarkOptions) -> float:
    """Rate of the product that dominates the step: 768 rows through the first MLP matrix."""
    rows, inner, columns = 768, options.hidden_size, options.hidden_size * 43 // 16
    dtype = getattr(torch, options.dtype)
    left, right = torch.randn(rows, inner, device=options.device).to(dtype), torch.randn(inner, columns, device=options.device).to(dtype)
    left @ right
    start, count = clock(options.device), 0
    while clock(options.device) - start < 0.2:
        left @ right
        count += 1
    return 2 * rows * inner * columns * count / (clock(options.device) - start)


def memory_growth_of_process(options: BenchmarkOptions) -> float | None:
    """`memory_growth` in a fresh process; None where the operating system does not tell."""
    if options.device == "cpu" and sys.platform != "linux":
        return None
    words = []
    for name, value in asdict(replace(options, quick=False, output=None)).items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072"
    }  # glibc gives freed memory back at once, so the peak is of what is in use
    process = subprocess.run([sys.executable, __file__, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(process.stdout.splitlines()[-1])


def memory_growth(options: BenchmarkOptions) -> float:
    """MB by which memory peaks over a step above its level before training: activations, gradients, optimizer state."""
    problem = Problem(options, CELLS[options.cells[0]], options.modes[0])
    variant = VARIANTS[options.variants[0]](problem, torch.zeros(2, len(problem.rows), device=options.device))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak; getrusage's would start at the parent process's
        before = resident_bytes("VmRSS")
    if variant.problem.mode != "score":  # the optimizer's state, as it is from the second step on
        for parameter in variant.trained:
            parameter.grad = torch.zeros_like(parameter)
        variant.optimizer.step()
        variant.optimizer.zero_grad()
    variant.step()
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else resident_bytes("VmHWM")
    return (peak - before) / 1e6


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# --- output


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table of one cell and mode; each x is the multiple of muffin's value to its left."""
    ours = next(row for row in rows if row["variant"] == "muffin")
    print(f"\n{ours['cell']} {ours['mode']}: matrix products at {ours['gemm_gflop_per_second']:.0f} GFLOP/s, x: multiple of muffin's")
    print(
        f"{'variant':8} {'seconds [min - max]':>27} {'x':>5} {'pairs/s':>8} {'MB':>6} {'x':>5} "
        f"{'GFLOP/pair':>11} {'x':>5} {'of GEMM':>8} {'7B: TFLOP/pair':>15} {'x':>5}"
    )
    for row in rows:
        spread = f"[{row['seconds_min']:.3f} - {row['seconds_max']:.3f}]"
        memory = f"{'-':>6} {'-':>5}" if row["peak_mb"] is None else f"{row['peak_mb']:6.0f} {row['peak_mb'] / ours['peak_mb']:5.2f}"
        flops, flops_7b = row["gflop_per_pair"], row["llava_7b_tflop_per_pair"]
        print(
            f"{row['variant']:8} {row['seconds_median']:9.3f} {spread:>17} {row['ratio_to_muffin']:5.2f} {row['pairs_per_second']:8.2f} "
            f"{memory} {flops:11.1f} {flops / ours['gflop_per_pair']:5.2f} {row['share_of_gemm_rate']:8.0%} "
            f"{flops_7b:15.1f} {flops_7b / ours['llava_7b_tflop_per_pair']:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
