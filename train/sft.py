"""Supervised fine-tuning of a policy on the chosen answers of a data set: a cold start, or the step before preference learning.

    python train/sft.py --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path rows.parquet --output_dir runs/sft --num_train_epochs 1

Rows need an image, a question and chosen; rejected answers are not looked at. Several GPUs: the same command behind
`torchrun --nproc_per_node 8`. Killed: add --resume_from_checkpoint last. With --lora_enable True an adapter is trained.

Output: the model (LoRA: the adapter) with tokenizer and image processor, checkpoint-*/, options.json (every resolved option) and
trainer_state.json (all logged metrics).
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, TrainerState

from muffin.pairs import load_demonstrations, parse_column_map
from muffin.policies import PolicyOptions, load_adapter, resolve_checkpoint
from muffin.sft import SFTArguments, SFTTrainer
from muffin.training_run import LoraOptions, ModelOptions, build_policy, check_options, checkpoint_to_resume, save_merged, save_options


@dataclass
class DataOptions:
    data_path: str = field(metadata={"help": "Demonstrations: Parquet or JSON-lines file, folder of Parquet files, or hub id."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Demonstrations for eval_*; see --eval_strategy and --eval_steps."})
    column_map: str = field(default="", metadata={"help": "Own column names: question=prompt,chosen=answer."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})
    max_rows: int | None = field(default=None, metadata={"help": "Train on the first rows only."})


OPTIONS = (ModelOptions, PolicyOptions, DataOptions, LoraOptions, SFTArguments)


def main(argv: list[str] | None = None) -> TrainerState:
    model_options, policy_options, data, lora_options, args = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(
        args=argv, look_for_args_file=False
    )
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.ERROR, format="%(name)s: %(message)s")
    resume = checkpoint_to_resume(args)
    checkpoint = resolve_checkpoint(model_options.model_name_or_path)
    check_options(model_options, lora_options, args, checkpoint)
    adapter = load_adapter(checkpoint, policy_options)
    columns = {"column_map": parse_column_map(data.column_map), "image_root": data.image_root}
    train_dataset = load_demonstrations(data.data_path, max_rows=data.max_rows, **columns)
    eval_dataset = load_demonstrations(data.eval_data_path, **columns) if data.eval_data_path else None
    save_options(args, model_options, policy_options, data, lora_options)

    policy = build_policy(checkpoint, adapter, model_options, lora_options, args)
    trainer = SFTTrainer(policy, args, adapter, train_dataset, eval_dataset)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if eval_dataset is not None:
        trainer.evaluate()
    trainer.save_state()
    if lora_options.merge_lora and args.should_save:
        output_dir = Path(args.output_dir)
        save_merged(checkpoint, output_dir, adapter, dtype=args.numerics.load_dtype, output_dir=output_dir / "merged")
    return trainer.state


if __name__ == "__main__":
    main()
