"""Train a policy with DPO on preference data that stores its reference log-probs. Full fine-tuning, LoRA with
--lora_enable True, or QLoRA with --lora_enable True --bits 4.

    python train/dpo.py --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path scored/ --output_dir runs/dpo

Several GPUs: the same command behind `torchrun --nproc_per_node 8`. The data comes from eval/muffin_inference_logp.py run with the same
--model_name_or_path, --dtype, --lora_enable, --bits, --prompt_name, --image_aspect_ratio and --model_max_length; log-probs of any other
policy are refused. LoRA can do without stored ones (--reference adapter_disabled), for one more forward per step. Killed: add
--resume_from_checkpoint last.

Before that, on any machine and before scoring: --plan True --plan_processes 8 --gpu_memory_gb 80 prints whether it fits and how long it
takes, and ends (with --deepspeed behind torchrun, one process is enough).

Output: the model (LoRA: the adapter) with tokenizer and image processor, checkpoint-*/, options.json (every resolved option),
trainer_state.json (all logged metrics), muffin_reference.json (the reference policy); with --merge_lora True also merged/.
"""

import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from transformers import HfArgumentParser, TrainerState

from muffin.pairs import PreferenceDataset, load_preferences, parse_column_map
from muffin.planner import PlanOptions, plan_report
from muffin.policies import PolicyAdapter, PolicyOptions, load_adapter, resolve_checkpoint
from muffin.preflight import preflight
from muffin.provenance import describe_reference, foreign_rows, read_reference, reference_id
from muffin.reference_gate import refuse_foreign_rows
from muffin.trainer import DPOArguments, DPOTrainer
from muffin.training_run import LoraOptions, ModelOptions, build_policy, check_options, checkpoint_to_resume, save_merged, save_options

logger = logging.getLogger("train.dpo")


@dataclass
class DataOptions:
    data_path: str = field(metadata={"help": "Scored preference data: Parquet or JSON-lines file, folder of Parquet files, or hub id."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Scored data for eval_*; see --eval_strategy and --eval_steps."})
    column_map: str = field(default="", metadata={"help": "Own column names: question=prompt,chosen=good."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})
    max_rows: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    bad_rows: Literal["fail", "skip"] = field(default="fail", metadata={"help": "Stop at rows that cannot be used, or leave them out."})


OPTIONS = (ModelOptions, PolicyOptions, DataOptions, LoraOptions, PlanOptions, DPOArguments)


def main(argv: list[str] | None = None) -> TrainerState | None:
    model_options, policy_options, data_options, lora_options, plan_options, args = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(
        args=argv, look_for_args_file=False
    )
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.ERROR, format="%(name)s: %(message)s")
    checkpoint = resolve_checkpoint(model_options.model_name_or_path, weights=not args.plan)
    check_options(model_options, lora_options, args, checkpoint)
    if args.plan:
        dataset = open_rows(data_options.data_path, data_options, data_options.max_rows)
        report = plan_report(checkpoint, policy_options, dataset, model_options, lora_options, args, plan_options)
        if args.process_index == 0:
            print(report)
        return None
    resume = checkpoint_to_resume(args)
    adapter = load_adapter(checkpoint, policy_options)
    reference = describe_reference(checkpoint, adapter, args.numerics)

    def rows(path: str, name: str, max_rows: int | None) -> PreferenceDataset:
        command = scoring_command(path, model_options, policy_options, data_options, args)
        return load_rows(path, name, data_options, max_rows, args, adapter, reference, command)

    train_dataset = rows(data_options.data_path, "train", data_options.max_rows)
    eval_dataset = rows(data_options.eval_data_path, "eval", None) if data_options.eval_data_path else None
    save_options(args, model_options, policy_options, data_options, lora_options)

    trainer = DPOTrainer(
        build_policy(checkpoint, adapter, model_options, lora_options, args),
        args,
        adapter,
        train_dataset,
        eval_dataset,
        reference=reference,
        scoring_command=scoring_command(data_options.data_path, model_options, policy_options, data_options, args),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if eval_dataset is not None:
        trainer.evaluate()
    trainer.save_state()
    if lora_options.merge_lora and args.should_save:
        output_dir = Path(args.output_dir)
        save_merged(checkpoint, output_dir, adapter, dtype=args.numerics.load_dtype, output_dir=output_dir / "merged")
    return trainer.state


def open_rows(path: str, options: DataOptions, max_rows: int | None) -> PreferenceDataset:
    return load_preferences(path, column_map=parse_column_map(options.column_map), max_rows=max_rows, image_root=options.image_root)


def load_rows(
    path: str,
    name: str,
    options: DataOptions,
    max_rows: int | None,
    args: DPOArguments,
    adapter: PolicyAdapter,
    reference: dict[str, Any],
    command: str,
) -> PreferenceDataset:
    """Rows that are usable and store this policy's log-probs, where it reads them. Raises ValueError when some are not or do not."""
    dataset = open_rows(path, options, max_rows)
    if args.reference == "adapter_disabled":
        dataset, proven = dataset.without_reference(), []
    else:
        proven = rows_of_this_policy(dataset, path, args, reference, command)
    with args.main_process_first(local=False):  # one process checks, the others find its report
        return preflight(
            dataset,
            adapter,
            bad_rows=options.bad_rows,
            report_path=Path(args.output_dir) / f"bad_rows_{name}.json",
            num_workers=args.dataloader_num_workers,
            skip_positions=proven,
        )


def rows_of_this_policy(dataset: PreferenceDataset, path: str, args: DPOArguments, reference: dict[str, Any], command: str) -> list[int]:
    """Positions of the rows whose key proves their log-probs. Raises ValueError when some have none, unless those are accepted."""
    if not dataset.has_reference:
        raise ValueError(f"{path} stores no reference log-probs; score it first: {command}\nor, with LoRA: --reference adapter_disabled")
    foreign = [foreign_rows(dataset, reference_id(reference)) if args.process_index == 0 else []]
    broadcast_object_list(foreign)
    if args.accept_foreign_logps and foreign[0]:
        logger.warning(
            "--accept_foreign_logps True: %d of %d rows of %s prove nothing about their log-probs", len(foreign[0]), len(dataset), path
        )
    else:
        refuse_foreign_rows(dataset, foreign[0], stored=read_reference(path), current=reference, scoring_command=command)
    return sorted(set(range(len(dataset))) - set(foreign[0]))


def scoring_command(
    path: str, model_options: ModelOptions, policy_options: PolicyOptions, data_options: DataOptions, args: DPOArguments
) -> str:
    """The command that stores the log-probs this run needs."""
    words = ["python", "eval/muffin_inference_logp.py", "--model_name_or_path", model_options.model_name_or_path, "--data_path", path]
    words += ["--output_dir", "SCORED", "--dtype", args.dtype, "--lora_enable", str(args.lora_enable)]
    words += [] if args.bits is None else ["--bits", str(args.bits)]
    words += [] if args.attn_implementation == "auto" else ["--attn_implementation", args.attn_implementation]
    words += policy_options.flags()
    for name, value in (("column_map", data_options.column_map), ("image_root", data_options.image_root)):
        words += [f"--{name}", value] if value else []
    return shlex.join(words)


if __name__ == "__main__":
    main()
