"""Is the memory that --plan predicts the memory that training takes? Random LLaVA-shaped policies train on a CPU, a process per cell.

    python train/check_plan.py --output outputs/plan.json

A cell is a width, a number of layers, full or LoRA training, with or without activation checkpointing. Measured is the growth of resident
memory from before the policy is built to the peak of three real steps: forward of a packed batch of pairs, DPO loss, backward, clipping,
fused AdamW. Predicted is `muffin.planner.memory_per_gpu` of the rehearsed step, from the config alone. An error beyond 15 % in any cell
ends the check with an error. Needs Linux. What libraries keep for themselves, some 20 MB for any policy, is measured but not predicted,
so the smallest cells come out too low.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, HfArgumentParser, LlamaConfig, LlavaConfig

from muffin.attention import packed_attention
from muffin.logps import response_logps
from muffin.losses import dpo_loss
from muffin.packing import PackedBatch, pack
from muffin.planner import count_weights, memory_per_gpu
from muffin.policies import EncodedResponses
from muffin.policies.llava15 import Llava15Policy, LlavaForConditionalGeneration
from muffin.policy_trainer import add_lora, freeze
from muffin.provenance import Numerics, resolve_numerics
from muffin.rehearsal import rehearse

IMAGE_TOKEN = 3
QUESTION_TOKENS = 40
STEPS = 3
TOLERANCE = 0.15


@dataclass
class CheckOptions:
    output: str | None = field(default=None, metadata={"help": "JSON file for the results: a list, one row per cell."})
    widths: list[int] = field(default_factory=lambda: [256, 512], metadata={"help": "Decoder widths, multiples of 128."})
    layers: list[int] = field(default_factory=lambda: [8], metadata={"help": "Numbers of decoder layers."})
    vocabulary: int = field(
        default=2000, metadata={"help": "Rows of the embedding and of lm_head; at 2000 their share is about that of a 7B model."}
    )
    pairs: int = field(default=1, metadata={"help": "Pairs in the batch, each on an image of its own, usually 1 to 4."})
    response_tokens: int = field(default=100, metadata={"help": "Tokens of a response."})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "As --dtype of training."})
    measure: str | None = field(
        default=None, metadata={"help": "Print the peak of one cell, such as 256x4-full, in bytes; the check starts itself with this."}
    )

    def __post_init__(self) -> None:
        for width in self.widths:
            if width < 128 or width % 128:
                raise ValueError(f"--widths has {width}, want multiples of 128")
        for name, least in (("pairs", 1), ("response_tokens", 2), ("vocabulary", IMAGE_TOKEN + 2)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, want {least} or more")
        if min(self.layers, default=0) < 1:
            raise ValueError(f"--layers is {self.layers}, want one number or more, of 1 or more each")


OPTIONS = (CheckOptions,)


@dataclass(frozen=True)
class Cell:
    width: int
    layers: int
    lora: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        return f"{self.width}x{self.layers}-{'lora' if self.lora else 'full'}{'-checkpointing' if self.checkpointing else ''}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    cells = {
        cell.name: cell for cell in (Cell(*values) for values in product(options.widths, options.layers, (False, True), (False, True)))
    }
    if options.measure is not None:
        if options.measure not in cells:
            raise ValueError(f"--measure {options.measure} is no cell; choose from {', '.join(cells)}")
        print(measured_bytes(cells[options.measure], options))
        return []
    print(f"{'MB':26} {'predicted':>9} {'measured':>9} {'error':>7}")
    results = []
    for name, cell in cells.items():
        predicted, measured = predicted_bytes(cell, options), measured_in_process(name, options)
        error = predicted / measured - 1
        print(f"{name:26} {predicted / 1e6:9.0f} {measured / 1e6:9.0f} {error:+7.1%}", flush=True)
        results.append({"cell": name, "predicted": predicted, "measured": measured, "error": error})
    if options.output is not None:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n")
    wrong = [row["cell"] for row in results if abs(row["error"]) > TOLERANCE]
    if wrong:
        raise RuntimeError(f"the prediction is off by more than {TOLERANCE:.0%} in {', '.join(wrong)}")
    return results


# --- the policy and its batch


def llava_config(width: int, layers: int, vocabulary: int) -> LlavaConfig:
    """LLaVA-1.5's proportions at a smaller width; 336 pixels, 576 image tokens."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    vision = CLIPVisionConfig(
        hidden_size=width // 2,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        image_size=336,
        patch_size=14,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=576)


def build_policy(cell: Cell, options: CheckOptions, numerics: Numerics) -> nn.Module:
    """On the present default device."""
    torch.manual_seed(0)
    policy = LlavaForConditionalGeneration(llava_config(cell.width, cell.layers, options.vocabulary))
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(numerics.load_dtype)
    if cell.lora:
        policy = add_lora(policy, Llava15Policy.spec.lora_targets, r=16, alpha=16, dropout=0.05, base="random")
    else:
        freeze(policy, Llava15Policy.spec.frozen_modules)
    if cell.checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    return policy.train()


class Pixels:
    """What packing asks of an adapter."""

    spec = Llava15Policy.spec

    def cat_vision(self, vision: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([item["pixel_values"] for item in vision])}


def random_batch(options: CheckOptions) -> PackedBatch:
    """Pairs of random tokens on random images."""
    torch.manual_seed(1)

    def tokens(count: int) -> Tensor:
        return torch.randint(IMAGE_TOKEN + 1, options.vocabulary, (count,))

    encoded = []
    for number in range(options.pairs):
        prompt = torch.cat([torch.full((576,), IMAGE_TOKEN), tokens(QUESTION_TOKENS)])
        responses = (tokens(options.response_tokens), tokens(options.response_tokens))
        vision = {"pixel_values": torch.randn(1, 3, 336, 336)}
        encoded.append(EncodedResponses(prompt, responses, vision, str(number), torch.arange(len(prompt))))
    return pack(encoded, Pixels())


def check_numerics(cell: Cell, options: CheckOptions) -> Numerics:
    return resolve_numerics(dtype=options.dtype, bits=None, lora_enable=cell.lora, device_type="cpu")


# --- predicted and measured


def predicted_bytes(cell: Cell, options: CheckOptions) -> int:
    numerics = check_numerics(cell, options)
    with torch.device("meta"):
        policy = build_policy(cell, options, numerics)
    weights = count_weights(policy)
    step = rehearse(policy, random_batch(options), numerics, "cpu")
    return memory_per_gpu(weights, step, zero=0, processes=1, optim="adamw_torch_fused").total


def measured_in_process(name: str, options: CheckOptions) -> int:
    """`measured_bytes` of a cell in a fresh process."""
    words = ["--measure", name]
    for option, value in asdict(options).items():
        if option not in ("output", "measure"):
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    # glibc gives freed memory back at once, and oneDNN keeps no kernels compiled for shapes (20 MB in bfloat16 however large the policy
    # is), so that the peak is of tensors in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, __file__, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(process.stdout.splitlines()[-1])


def measured_bytes(cell: Cell, options: CheckOptions) -> int:
    """Growth of resident memory to the peak of real steps, after a step of a small policy has loaded every library."""
    numerics = check_numerics(cell, options)
    batch = random_batch(options)
    train(build_policy(Cell(128, 1, cell.lora, cell.checkpointing), options, numerics), batch, numerics)
    before = resident_bytes("VmRSS")
    policy = build_policy(cell, options, numerics)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, without that of building the policy
    train(policy, batch, numerics)
    return resident_bytes("VmHWM") - before


def train(policy: nn.Module, batch: PackedBatch, numerics: Numerics) -> None:
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    zeros = torch.zeros(len(batch.lengths) // 2)
    for _ in range(STEPS):
        with packed_attention(policy):
            with numerics.autocast("cpu"):
                logps = response_logps(policy, batch)
            chosen, rejected = logps.sums.view(-1, 2).unbind(dim=1)
            losses, _, _ = dpo_loss(chosen, rejected, zeros, zeros, beta=0.1)
            losses.mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
