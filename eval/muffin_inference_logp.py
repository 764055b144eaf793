"""Store reference log-probs with preference data: the log-probs of both answers under the policy as it is before training.

    python eval/muffin_inference_logp.py --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path rlaifv/ --output_dir scored/

Several GPUs: the same command behind `torchrun --nproc_per_node 8`. Processes take shards from a common queue, so more may join at any
time by running the command on the same --output_dir, and the result does not depend on their number. Killed: run the command again.

Output: shard-*.parquet (all columns as they were, ref_* columns, logps_key), muffin_reference.json (what the log-probs were made
with), bad_rows.json.
"""

import json
import logging
import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import HfArgumentParser

from muffin.attention import set_kernel
from muffin.pairs import PreferenceDataset, load_preferences, parse_column_map, resolve_columns
from muffin.policies import PolicyAdapter, PolicyOptions, load_adapter, load_policy, refuse_quantized_lora, resolve_checkpoint
from muffin.preflight import preflight
from muffin.provenance import describe_reference, reference_id, resolve_numerics
from muffin.scoring import (
    RowStream,
    Scorer,
    ScoringRun,
    ScoringSummary,
    begin,
    fingerprint,
    refuse_other_run,
    score_missing,
    summarize,
)
from muffin.shards import plan_shards


@dataclass
class ScoringOptions:
    model_name_or_path: str = field(metadata={"help": "Policy to score with: folder or hub id of a model, or folder of a LoRA adapter."})
    data_path: str = field(metadata={"help": "Preference data: Parquet or JSON-lines file, folder of Parquet files, or hub id."})
    output_dir: str = field(metadata={"help": "Folder for the scored shards; a run that was killed is resumed from it."})
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto",
        metadata={"help": "Precision that the policy will be trained in; auto is bfloat16 where the hardware computes in it."},
    )
    lora_enable: bool = field(
        default=False,
        metadata={
            "help": "How the policy will be trained, not how it is stored: under bfloat16, LoRA training keeps the base weights in "
            "bfloat16, full training keeps float32 weights under bfloat16 autocast, and each refuses log-probs made the other way."
        },
    )
    bits: int | None = field(
        default=None, metadata={"help": "4 for a policy to be trained with --bits 4 (QLoRA): other log-probs are foreign to it."}
    )
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa"] = field(
        default="auto", metadata={"help": "Kernel of attention, as in training: auto takes flash-attn or torch's own where they can run."}
    )
    batch_tokens: int = field(
        default=8192, metadata={"help": "Tokens of one forward, usually 2048 to 32768; a single longer row still runs."}
    )
    shard_rows: int = field(default=1000, metadata={"help": "Input rows of one output file, usually 100 to 5000: what a kill can cost."})
    bad_rows: Literal["fail", "skip"] = field(default="fail", metadata={"help": "Stop at rows that cannot be used, or leave them out."})
    column_map: str = field(default="", metadata={"help": "Own column names: question=prompt,chosen=good."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})
    max_rows: int | None = field(default=None, metadata={"help": "Score the first rows only."})
    num_workers: int = field(default=4, metadata={"help": "Processes that decode and encode, per process that scores; 2 to 16."})

    def __post_init__(self) -> None:
        if self.batch_tokens < 1 or self.shard_rows < 1 or self.num_workers < 0:
            raise ValueError(
                f"--batch_tokens {self.batch_tokens} and --shard_rows {self.shard_rows} must be at least 1, "
                f"--num_workers {self.num_workers} at least 0"
            )


OPTIONS = (PolicyOptions, ScoringOptions)


def main(argv: list[str] | None = None) -> ScoringSummary:
    policy_options, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    first = int(os.environ.get("RANK", 0)) == 0  # set by torchrun, as is LOCAL_RANK
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(name)s: %(message)s")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output_dir = Path(options.output_dir)

    checkpoint = resolve_checkpoint(options.model_name_or_path)
    refuse_quantized_lora(checkpoint, options.bits)
    adapter = load_adapter(checkpoint, policy_options)
    numerics = resolve_numerics(
        dtype=options.dtype,
        bits=options.bits,
        lora_enable=options.lora_enable,
        device_type=device.type,
        attn_implementation=options.attn_implementation,
    )
    dataset = load_preferences(
        options.data_path,
        column_map=parse_column_map(options.column_map),
        max_rows=options.max_rows,
        image_root=options.image_root,
    )
    rows = dataset.without_reference()

    reference = describe_reference(checkpoint, adapter, numerics)
    manifest = {
        "reference_id": reference_id(reference),
        "reference": reference,
        "settings": {name: getattr(options, name) for name in ("batch_tokens", "shard_rows", "max_rows", "column_map")},
        "input": fingerprint(options.data_path, dataset),
    }
    refuse_other_run(output_dir, manifest)
    left_out = check_rows(rows, adapter, options)
    begin(output_dir, manifest | {"left_out": left_out})

    run = ScoringRun(rows, dataset.table, output_dir, plan_shards(len(rows), options.shard_rows), frozenset(left_out), options.batch_tokens)
    scored, seconds = 0, 0.0
    if run.missing():
        model = load_policy(checkpoint, adapter, dtype=numerics.load_dtype, bits=numerics.bits).requires_grad_(False).to(device).eval()
        set_kernel(model, numerics.attention)
        stream = RowStream(rows, adapter, manifest["reference_id"], options.num_workers)
        start = time.perf_counter()
        with tqdm(total=len(rows), initial=run.finished_rows(), desc="scoring", unit="row", disable=not first) as progress:
            scored = score_missing(run, Scorer(model, adapter, numerics), stream, progress)
        seconds = time.perf_counter() - start
    summary = summarize(run)
    if first:
        rate = f"{scored} of them here at {scored / seconds:.1f} rows/s" if scored else "none of them missing"
        print(
            f"{summary.rows} rows in {output_dir}, {rate}; mean log-prob per token: "
            f"chosen {summary.chosen_average_logp:.3f}, rejected {summary.rejected_average_logp:.3f}\n"
            f"next: {training_command(options, policy_options, numerics.autocast_dtype or 'float32', dataset)}"
        )
    return summary


def check_rows(rows: PreferenceDataset, adapter: PolicyAdapter, options: ScoringOptions) -> list[int]:
    """Positions of the rows to leave out. One process checks, those that wait for it find its report."""
    output_dir = Path(options.output_dir)
    report, lock = output_dir / "bad_rows.json", output_dir / ".preflight.lock"
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        preflight(rows, adapter, bad_rows=options.bad_rows, report_path=report, num_workers=options.num_workers)
        lock.unlink(missing_ok=True)
        return [row["position"] for row in json.loads(report.read_text())["bad_rows"]]


def training_command(options: ScoringOptions, policy_options: PolicyOptions, dtype: str, dataset: PreferenceDataset) -> str:
    """The command that trains on the output with equal numerics and encoding."""
    words = ["python", "train/dpo.py", "--model_name_or_path", options.model_name_or_path, "--data_path", options.output_dir]
    lora_enable = options.lora_enable or options.bits is not None  # nothing else can be trained on quantised weights
    words += ["--output_dir", "RUN", "--dtype", dtype, "--lora_enable", str(lora_enable)]
    words += [] if options.bits is None else ["--bits", str(options.bits)]
    words += ["--learning_rate", "1e-5" if lora_enable else "5e-7"]
    words += [] if options.attn_implementation == "auto" else ["--attn_implementation", options.attn_implementation]
    words += policy_options.flags()
    if options.column_map:
        words += ["--column_map", options.column_map]
    image = dataset.table[0][resolve_columns(dataset.table.column_names, dataset.column_map)["image"]]
    image = image[0] if isinstance(image, list) else image
    if isinstance(image, str) or (isinstance(image, dict) and image["bytes"] is None):
        words += ["--image_root", str(dataset.image_root)]  # images stay where they are
    return shlex.join(words)


if __name__ == "__main__":
    main()
