"""What training recipes share: the options that name a policy, building it, and the files of a run."""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from peft import PeftModel
from torch import nn
from transformers import set_seed

from muffin.checkpoints import last_checkpoint
from muffin.policies import Checkpoint, PolicyAdapter, load_policy, save_adapter
from muffin.policy_trainer import PolicyArguments, add_lora, freeze

logger = logging.getLogger(__name__)


@dataclass
class ModelOptions:
    """The policy to train and what of it stays as it is."""

    model_name_or_path: str = field(metadata={"help": "Policy to start from (in DPO also the reference): folder or hub id."})
    freeze_vision_tower: bool = field(default=True, metadata={"help": "Leave the vision tower as it is; LoRA never touches it."})


@dataclass
class LoraOptions:
    """Shape of the LoRA adapter (arXiv:2106.09685); used with --lora_enable True."""

    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter, usually 8 to 128."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter, 0 to 0.1."})
    merge_lora: bool = field(
        default=False, metadata={"help": "Also save a full model, in float32, with the adapter merged in: OUTPUT/merged."}
    )


def check_options(model_options: ModelOptions, lora_options: LoraOptions, args: PolicyArguments, checkpoint: Checkpoint) -> None:
    """Raise ValueError for options that contradict each other or the checkpoint."""
    if args.lora_enable and not model_options.freeze_vision_tower:
        raise ValueError("--freeze_vision_tower False contradicts --lora_enable True, which trains an adapter on the language model alone")
    if lora_options.merge_lora and not args.lora_enable:
        raise ValueError("--merge_lora True needs --lora_enable True; full training saves a full model anyway")
    if lora_options.merge_lora and args.deepspeed and HfDeepSpeedConfig(args.deepspeed).is_zero3():
        raise ValueError(
            "--merge_lora True cannot merge in a process of ZeRO-3, which shards every model it loads; leave it out and merge afterwards: "
            f"python train/merge_lora.py --model_name_or_path {args.output_dir} --output_dir {args.output_dir}/merged --dtype {args.dtype}"
        )
    if lora_options.merge_lora and args.bits is not None:
        raise ValueError(
            f"--merge_lora True contradicts --bits {args.bits}: the adapter was trained on quantised weights, and the merged model would "
            "compute other log-probs than the trained one; leave it out and give --output_dir itself to later commands, which "
            "merge the adapter into the base in full precision"
        )
    if args.lora_enable and checkpoint.lora is not None:
        raise ValueError(
            f"--model_name_or_path {model_options.model_name_or_path} is itself a LoRA adapter; one on top would be loaded without it; "
            "give the merged/ folder that --merge_lora True saves beside it"
        )


def checkpoint_to_resume(args: PolicyArguments) -> str | None:
    """The folder to resume from. Raises ValueError when it does not exist, or when a new run would mix its checkpoints with another's."""
    newest = last_checkpoint(Path(args.output_dir))
    if args.resume_from_checkpoint in (None, "False", "false"):
        if newest is not None:
            raise ValueError(
                f"--output_dir {args.output_dir} already holds {newest.name}; continue that run with --resume_from_checkpoint last, "
                "or give an empty folder"
            )
        return None
    if args.resume_from_checkpoint in ("last", "True", "true"):
        if newest is None:
            logger.warning(
                "--resume_from_checkpoint %s: no complete checkpoint in %s yet, starting anew", args.resume_from_checkpoint, args.output_dir
            )
        return None if newest is None else str(newest)
    if not (Path(args.resume_from_checkpoint) / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {args.resume_from_checkpoint}: want a complete checkpoint-N folder, or last")
    return args.resume_from_checkpoint


def build_policy(
    checkpoint: Checkpoint, adapter: PolicyAdapter, model_options: ModelOptions, lora_options: LoraOptions, args: PolicyArguments
) -> nn.Module:
    """The policy with what is to be trained marked as such: a LoRA adapter, or all weights but frozen ones."""
    policy = load_policy(checkpoint, adapter, dtype=args.numerics.load_dtype, bits=args.bits)
    set_seed(args.seed)  # whatever loading drew (ZeRO-3 initialises first), so that every engine starts with one adapter
    return mark_trained(policy, adapter, model_options, lora_options, lora_enable=args.lora_enable)


def mark_trained(
    policy: nn.Module, adapter: PolicyAdapter, model_options: ModelOptions, lora_options: LoraOptions, *, lora_enable: bool
) -> nn.Module:
    """`policy` with a LoRA adapter, which alone is trained then, or with its vision tower frozen where that is asked for."""
    if lora_enable:
        name = model_options.model_name_or_path
        return add_lora(
            policy,
            adapter.spec.lora_targets,
            r=lora_options.lora_r,
            alpha=lora_options.lora_alpha,
            dropout=lora_options.lora_dropout,
            base=str(Path(name).resolve()) if Path(name).exists() else name,
        )
    if model_options.freeze_vision_tower:
        freeze(policy, adapter.spec.frozen_modules)
    return policy


def save_merged(base: Checkpoint, lora: Path, adapter: PolicyAdapter, *, dtype: torch.dtype, output_dir: Path) -> None:
    """Save base + LoRA adapter as one model: the base as it was trained on, in `dtype`, the sum in float32 so that nothing of the
    adapter is rounded off."""
    model = PeftModel.from_pretrained(load_policy(base, adapter, dtype=dtype).float(), lora)
    model.merge_and_unload(safe_merge=True).save_pretrained(output_dir)
    save_adapter(adapter, output_dir)


def save_options(args: PolicyArguments, *others: Any) -> None:
    """Write every resolved option of the run to options.json."""
    if args.should_save:
        options = {type(each).__name__: asdict(each) for each in others} | {type(args).__name__: args.to_dict()}
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / "options.json").write_text(json.dumps(options, indent=1, default=str) + "\n")
