"""Merge a LoRA adapter, or one of its checkpoints, into its base: an ordinary model, for vLLM and for training further.

    python train/merge_lora.py --model_name_or_path runs/lora/checkpoint-1336 --output_dir runs/lora/merged-1336

The base is loaded in the precision it was trained on and the sum is saved in float32, as --merge_lora True of train/dpo.py does at a
run's end. An adapter that was trained with --bits 4 is merged into the full-precision base: a little different from what was trained.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from muffin.policies import Checkpoint, PolicyOptions, load_adapter, resolve_checkpoint
from muffin.provenance import resolve_numerics
from muffin.training_run import save_merged


@dataclass
class MergeOptions:
    model_name_or_path: str = field(metadata={"help": "Folder of a LoRA adapter, or a checkpoint-N of its training."})
    output_dir: str = field(metadata={"help": "Folder for the merged model."})
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "That of the training: what the base's weights are rounded to before the sum."}
    )


OPTIONS = (PolicyOptions, MergeOptions)


def main(argv: list[str] | None = None) -> None:
    policy_options, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    checkpoint = resolve_checkpoint(options.model_name_or_path)
    if checkpoint.lora is None:
        raise ValueError(
            f"--model_name_or_path {options.model_name_or_path} is a full model already; want a folder with adapter_config.json"
        )
    adapter = load_adapter(checkpoint, policy_options)
    numerics = resolve_numerics(dtype=options.dtype, bits=None, lora_enable=True)
    save_merged(Checkpoint(checkpoint.base), checkpoint.lora, adapter, dtype=numerics.load_dtype, output_dir=Path(options.output_dir))
    print(f"{options.model_name_or_path} merged into {checkpoint.base}: {options.output_dir}")


if __name__ == "__main__":
    main()
