"""Policies: one adapter file per model family, chosen by the checkpoint's own config."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from muffin.policies.base import (
    EncodedResponses,
    PolicyAdapter,
    PolicyOptions,
    PolicySpec,
    checkpoint_folder,
    encode_pair,
    generation_inputs,
)
from muffin.policies.llava15 import Llava15Policy
from muffin.policies.minicpmv import MiniCPMVPolicy
from muffin.policies.minicpmv2 import MiniCPMV2Policy
from muffin.policies.qwen_vl import Qwen3VLPolicy, Qwen25VLPolicy

__all__ = [
    "ADAPTERS",
    "Checkpoint",
    "EncodedResponses",
    "PolicyAdapter",
    "PolicyOptions",
    "PolicySpec",
    "encode_pair",
    "generation_inputs",
    "load_adapter",
    "load_policy",
    "refuse_quantized_lora",
    "resolve_checkpoint",
    "save_adapter",
]

ADAPTERS: dict[str, type[PolicyAdapter]] = {
    "llava": Llava15Policy,
    "llava_llama": Llava15Policy,
    "minicpmv": MiniCPMV2Policy,
    "minicpmv4_6": MiniCPMVPolicy,
    "qwen2_5_vl": Qwen25VLPolicy,
    "qwen3_vl": Qwen3VLPolicy,
}

# What a policy was trained with, beside its weights: defaults for the next run on this checkpoint.
POLICY_FILE = "muffin_policy.json"


@dataclass(frozen=True)
class Checkpoint:
    """A policy's files: the folder of the full model, and of the LoRA adapter on top of it if there is one."""

    base: Path
    lora: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder that was named: the LoRA adapter's, else the model's."""
        return self.lora or self.base


def resolve_checkpoint(name_or_path: str | Path, *, weights: bool = True) -> Checkpoint:
    """Folder(s) of a local path or a hub id (downloaded once to the hub cache). A LoRA folder leads to its base model.

    weights: False downloads config and tokenizer alone.

    Raises ValueError when neither config.json nor adapter_config.json is there.
    """
    folder = checkpoint_folder(name_or_path, weights=weights)
    if (folder / "adapter_config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return Checkpoint(base=resolve_checkpoint(base, weights=weights).base, lora=folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds neither config.json (a model) nor adapter_config.json (a LoRA adapter)")
    return Checkpoint(base=folder)


def load_adapter(checkpoint: Checkpoint, options: PolicyOptions) -> PolicyAdapter:
    """The adapter that the checkpoint's config calls for (`options.policy`, a key of ADAPTERS, overrides it), with the prompt
    and image options the checkpoint was saved with unless `options` says otherwise.

    Raises ValueError listing what is supported when the model type is not.
    """
    supported = ", ".join(sorted(ADAPTERS))
    if options.policy is not None and options.policy not in ADAPTERS:
        raise ValueError(f"--policy {options.policy} is unknown; choose from {supported}")
    config = json.loads((checkpoint.base / "config.json").read_text())
    model_type = options.policy or config.get("model_type")
    if model_type not in ADAPTERS:
        own_code = " Python code that a checkpoint brings along (auto_map) is never run (trust_remote_code is off): it could do anything."
        raise ValueError(
            f"{checkpoint.base} has model_type {model_type!r}; supported: {supported}. A model with the architecture of one of them "
            f"is loaded by --policy with its name.{own_code if 'auto_map' in config else ''}"
        )
    saved: dict[str, str] = {}
    for folder in (checkpoint.base, checkpoint.folder):
        if (folder / POLICY_FILE).exists():
            saved = json.loads((folder / POLICY_FILE).read_text())
    given = {name: value for name, value in vars(options).items() if value is not None}
    return ADAPTERS[model_type].load(checkpoint.base, replace(options, **{**saved, **given}))


def load_policy(
    checkpoint: Checkpoint, adapter: PolicyAdapter, *, dtype: torch.dtype, bits: int | None = None, **from_pretrained: Any
) -> nn.Module:
    """The checkpoint's model in `dtype`; a LoRA adapter is merged into it, so that scoring and training start from one function.

    bits: 4 holds the language model's linears as nf4 (QLoRA, https://arxiv.org/abs/2305.14314); the rest, `quantization_skip` of the
    family, stays in `dtype`. Raises ValueError for a LoRA adapter on quantised weights, which cannot be merged without loss.
    """
    refuse_quantized_lora(checkpoint, bits)
    if bits is not None:
        from_pretrained["quantization_config"] = nf4(adapter.spec)
    model = adapter.load_model(checkpoint.base, dtype=dtype, **from_pretrained)
    if bits is not None:
        _keep_differentiable(model)
    if checkpoint.lora is None:
        return model
    return PeftModel.from_pretrained(model, checkpoint.lora).merge_and_unload(safe_merge=True).requires_grad_(True)  # peft froze it


def nf4(spec: PolicySpec) -> BitsAndBytesConfig:
    """QLoRA's quantisation. Naming any module to skip drops bitsandbytes' own list, so the family's names lm_head, too."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(spec.quantization_skip),
    )


def _keep_differentiable(model: nn.Module) -> None:
    """bitsandbytes 0.50 repacks weights on a CPU with AVX512-BF16 in their first forward in eval mode (the reference gate's), for a
    kernel without backward: training would then go on with gradients that lack every path through a quantised linear.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


def refuse_quantized_lora(checkpoint: Checkpoint, bits: int | None) -> None:
    """Raise ValueError for a LoRA adapter on quantised weights: merging it would round it to 4 bits."""
    if bits is not None and checkpoint.lora is not None:
        raise ValueError(
            f"{checkpoint.lora} is a LoRA adapter, which --bits {bits} would round with the weights it is merged into; leave --bits out "
            "(the adapter is then merged into its base in full precision), or give a full model"
        )


def save_adapter(adapter: PolicyAdapter, folder: Path) -> None:
    """Write tokenizer, image processor and the options that a later `load_adapter` should start from."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(folder)
    options = {name: value for name, value in adapter.settings().items() if name in vars(PolicyOptions()) and name != "model_max_length"}
    (folder / POLICY_FILE).write_text(json.dumps(options, indent=1) + "\n")
