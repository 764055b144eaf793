"""Generate answers to questions about images: K per prompt from one policy with one decoding setting (RLAIF-V's "deconfounded" sampling).

    python data/generate_responses.py --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path prompts.parquet --output_dir answers/

From a server that speaks OpenAI's protocol (vLLM, SGLang), for speed: --generator endpoint --base_url http://localhost:8000/v1; its replies
are stored in replies/ as they come, and what failed is asked again when its shard is deleted.

Next: data/score_claims.py. Several GPUs: the same command behind `torchrun --nproc_per_node 8`. Processes take shards from a common
queue, so more may join at any time by running the command on the same --output_dir. Killed: run the command again.

Output: shard-*.parquet, one row per answer: all columns of its prompt, and prompt_row, answer_number, answer, truncated, failure.
muffin_answers.json says what the answers were made with. A prompt that cannot be used has one row without answer and with the reason.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from muffin.chat_generation import ask_for_answers
from muffin.generation import ANSWER_FEATURES, Answer, Decoding, generate
from muffin.judge import JudgeOptions, StoringJudge, choose_runner
from muffin.pairs import PromptDataset, load_prompts, parse_column_map
from muffin.policies import EncodedResponses, PolicyAdapter, PolicyOptions, load_adapter, load_policy, resolve_checkpoint
from muffin.provenance import Numerics, describe_reference, resolve_numerics
from muffin.scoring import fingerprint
from muffin.shards import Shard, ShardFolder, WorkStream, begin_run, plan_shards, with_columns, write_missing

MANIFEST = "muffin_answers.json"


@dataclass
class GenerationOptions:
    model_name_or_path: str = field(
        metadata={
            "help": "Policy: folder or hub id of a model, or folder of a LoRA adapter; its name at the server for --generator endpoint."
        }
    )
    data_path: str = field(metadata={"help": "Images and questions: Parquet or JSON-lines file, folder of Parquet files, or hub id."})
    output_dir: str = field(metadata={"help": "Folder for the answers; a run that was killed is resumed from it."})
    generator: Literal["policy", "endpoint"] = field(
        default="policy", metadata={"help": "Generate here, or ask a server that speaks OpenAI's protocol (vLLM, SGLang), for speed."}
    )
    base_url: str | None = field(default=None, metadata={"help": "The server: http://localhost:8000/v1. For --generator endpoint."})
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the server's key; local ones need none."}
    )
    concurrency: int = field(default=8, metadata={"help": "Requests that a server is asked at a time, 1 to 64."})
    num_answers: int = field(default=10, metadata={"help": "Answers per prompt; RLAIF-V takes 10."})
    temperature: float = field(default=0.7, metadata={"help": "Of sampling, usually 0.5 to 1; 0 is greedy, with --num_answers 1."})
    num_beams: int = field(default=1, metadata={"help": "Beams of a beam search, usually 3 to 5, with --temperature 0; 1 searches none."})
    max_new_tokens: int = field(default=512, metadata={"help": "Limit on an answer, in tokens; longer ones are cut and marked."})
    seed: int = field(
        default=0, metadata={"help": "Of all draws; each answer has its own, from the seed, its prompt's row and its number."}
    )
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "Precision of weights and arithmetic; auto is bfloat16 where the hardware computes in it."}
    )
    batch_size: int = field(
        default=8, metadata={"help": "Prompts that are generated for at once, usually 1 to 64; times --num_answers sequences."}
    )
    shard_rows: int = field(default=100, metadata={"help": "Prompts of one output file, usually 50 to 1000: what a kill can cost."})
    column_map: str = field(default="", metadata={"help": "Own column names: question=prompt,image=picture."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})
    max_rows: int | None = field(default=None, metadata={"help": "Generate for the first rows only."})
    num_workers: int = field(default=4, metadata={"help": "Processes that decode and encode images, per process that generates; 0 to 16."})

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_rows < 1 or self.num_workers < 0:
            raise ValueError(
                f"--batch_size {self.batch_size} and --shard_rows {self.shard_rows} must be at least 1, "
                f"--num_workers {self.num_workers} at least 0"
            )
        if (self.base_url is not None) != (self.generator == "endpoint"):
            raise ValueError(
                f"--generator {self.generator} with --base_url {self.base_url}: --generator endpoint has a server, policy none"
            )
        if self.generator == "endpoint" and self.num_beams > 1:
            raise ValueError(f"--generator endpoint with --num_beams {self.num_beams}: OpenAI's protocol has no beams; search them here")


OPTIONS = (PolicyOptions, GenerationOptions)
DECIDING = (
    "generator",
    "num_answers",
    "temperature",
    "num_beams",
    "max_new_tokens",
    "seed",
    "batch_size",
    "shard_rows",
    "max_rows",
    "column_map",
    "image_root",
)


@dataclass(frozen=True)
class GenerationSummary:
    """Of all shards. failures: prompts without answers; words: mean per answer."""

    prompts: int
    answers: int
    truncated: int
    failures: int
    words: float


def main(argv: list[str] | None = None) -> GenerationSummary:
    policy_options, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    decoding = Decoding(options.num_answers, options.temperature, options.max_new_tokens, options.seed, options.num_beams)
    first = int(os.environ.get("RANK", 0)) == 0  # set by torchrun, as is LOCAL_RANK
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(name)s: %(message)s")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    prompts = load_prompts(
        options.data_path, column_map=parse_column_map(options.column_map), max_rows=options.max_rows, image_root=options.image_root
    )
    refuse_taken_names(prompts)
    folder = ShardFolder(Path(options.output_dir), plan_shards(len(prompts), options.shard_rows))
    set_up = {"policy": set_up_policy, "endpoint": set_up_endpoint}[options.generator]
    description, load_generator = set_up(options, policy_options, prompts, decoding)
    manifest = {
        "policy": description,
        "settings": {name: getattr(options, name) for name in DECIDING},
        "input": fingerprint(options.data_path, prompts),
    }
    begin_run(folder.path, MANIFEST, manifest)

    start = time.perf_counter()
    written: list[Shard] = []
    if folder.missing():
        generator = load_generator()
        with tqdm(total=len(prompts), initial=folder.finished_rows(), desc="generating", unit="prompt", disable=not first) as progress:
            written = write_missing(folder, lambda shard: answer_table(prompts, generator(shard, progress)), progress)
    seconds = time.perf_counter() - start
    summary = summarize(folder)
    if first:
        rows = sum(shard.stop - shard.start for shard in written)
        rate = f"{rows} of the prompts here in {seconds:.1f} s" if rows else "none of them missing"
        print(
            f"{summary.answers} answers to {summary.prompts} prompts in {folder.path}, {rate}; mean words {summary.words:.1f}, "
            f"truncated {summary.truncated}, prompts that could not be used {summary.failures}"
            + (" (column failure says why; mend them and give an empty --output_dir)" if summary.failures else "")
        )
    return summary


def refuse_taken_names(prompts: PromptDataset) -> None:
    taken = sorted(set(ANSWER_FEATURES).intersection(prompts.table.column_names))
    if taken:
        raise ValueError(f"--data_path already has the columns {', '.join(taken)}, which this command writes; rename or remove them")


@dataclass(frozen=True)
class PromptEncoder:
    """Row position -> prompt as the policy sees it, or why that cannot be; in worker processes."""

    prompts: PromptDataset
    adapter: PolicyAdapter

    def __call__(self, row: int) -> tuple[int, EncodedResponses | str]:
        try:
            prompt = self.prompts[row]
            return row, self.adapter.encode(prompt.image, prompt.question, ())
        except ValueError as error:
            return row, str(error)


# Answers to the prompts of a shard by row; or why a prompt, or one answer to it, has none.
Answers = dict[int, list[Answer] | list[Answer | str] | str]
Generator = Callable[[Shard, tqdm], Answers]


def set_up_policy(
    options: GenerationOptions, policy_options: PolicyOptions, prompts: PromptDataset, decoding: Decoding
) -> tuple[dict[str, Any], Callable[[], Generator]]:
    """The policy's description for the manifest, and what loads it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = resolve_checkpoint(options.model_name_or_path)
    adapter = load_adapter(checkpoint, policy_options)
    numerics = resolve_numerics(dtype=options.dtype, bits=None, lora_enable=True, device_type=device.type)  # no float32 master weights

    def load() -> Generator:
        model = load_policy(checkpoint, adapter, dtype=numerics.load_dtype).requires_grad_(False).to(device).eval()
        stream = WorkStream(PromptEncoder(prompts, adapter), options.num_workers)
        return ShardGenerator(model, adapter, numerics, stream, decoding, options.batch_size)

    return describe_reference(checkpoint, adapter, numerics), load


def set_up_endpoint(
    options: GenerationOptions, _: PolicyOptions, prompts: PromptDataset, decoding: Decoding
) -> tuple[dict[str, Any], Callable[[], Generator]]:
    """As `set_up_policy`. Replies are stored per shard: a shard has one writer, and one that was killed goes on with what is there."""
    server = JudgeOptions(
        judge="endpoint",
        judge_model=options.model_name_or_path,
        judge_base_url=options.base_url,
        judge_api_key_env=options.api_key_env,
        judge_concurrency=options.concurrency,
    )
    runner = choose_runner(server, os.environ)

    def generate_shard(shard: Shard, progress: tqdm) -> Answers:
        judge = StoringJudge(server, Path(options.output_dir) / "replies" / f"{Path(shard.name).stem}.replies.jsonl", runner)
        answers = ask_for_answers(judge, prompts, range(shard.start, shard.stop), decoding)
        progress.update(len(answers))
        return answers

    return {"endpoint": options.model_name_or_path}, lambda: generate_shard


@dataclass(frozen=True)
class ShardGenerator:
    """Answers to the prompts of a shard, by a policy."""

    model: torch.nn.Module
    adapter: PolicyAdapter
    numerics: Numerics
    stream: WorkStream
    decoding: Decoding
    batch_size: int

    def __call__(self, shard: Shard, progress: tqdm) -> Answers:
        answers: Answers = {}
        usable: list[tuple[int, EncodedResponses]] = []
        for row, encoded in self.stream.results(range(shard.start, shard.stop)):
            if isinstance(encoded, str):
                answers[row] = encoded
                progress.update()
            else:
                usable.append((row, encoded))
        usable.sort(key=lambda item: len(item[1].prompt_ids))  # little padding
        device = next(self.model.parameters()).device
        for start in range(0, len(usable), self.batch_size):
            rows, encoded = zip(*usable[start : start + self.batch_size], strict=True)
            with self.numerics.autocast(device.type):
                answers.update(zip(rows, generate(self.model, self.adapter, encoded, rows, self.decoding), strict=True))
            progress.update(len(rows))
        return answers


def answer_table(prompts: PromptDataset, answers: Answers) -> pa.Table:
    """The rows of a shard: its prompts' columns with ANSWER_FEATURES."""
    rows = [answer_row for row in sorted(answers) for answer_row in answer_rows(row, answers[row])]
    columns = {name: [row[name] for row in rows] for name in ANSWER_FEATURES}
    return with_columns(prompts.table, columns["prompt_row"], ANSWER_FEATURES, columns)


def answer_rows(row: int, answers: list[Answer] | list[Answer | str] | str) -> list[dict]:
    """The values of ANSWER_FEATURES of a prompt's answers; of failures, where those are what there is."""
    rows = []
    for number, answer in enumerate([answers] if isinstance(answers, str) else answers):
        failure = answer if isinstance(answer, str) else None
        text, truncated = (None, None) if isinstance(answer, str) else (answer.text, answer.truncated)
        rows.append({"prompt_row": row, "answer_number": number, "answer": text, "truncated": truncated, "failure": failure})
    return rows


def summarize(folder: ShardFolder) -> GenerationSummary:
    """Read back what all processes wrote. Raises ValueError when there is no answer."""
    rows = [row for shard in folder.shards for row in pq.read_table(folder.path / shard.name, columns=list(ANSWER_FEATURES)).to_pylist()]
    answers = [row["answer"] for row in rows if row["failure"] is None]
    failures = [row for row in rows if row["failure"] is not None]
    if not answers:
        raise ValueError(f"no prompt could be used; the first failed because {failures[0]['failure']}")
    return GenerationSummary(
        prompts=folder.shards[-1].stop,
        answers=len(answers),
        truncated=sum(row["truncated"] for row in rows if row["failure"] is None),
        failures=len(failures),
        words=sum(len(answer.split()) for answer in answers) / len(answers),
    )


if __name__ == "__main__":
    main()
