"""Judge answers claim by claim: split each into claims, ask a labeler about every claim, score = -(number of rejected claims).

    python data/score_claims.py --model_name_or_path llava-hf/llava-1.5-13b-hf --data_path answers/ --output_dir judged/

The labeler is any policy, or a server that speaks OpenAI's protocol and gives log-probs (--labeler endpoint --labeler_model NAME
--labeler_base_url http://localhost:8000/v1). Claims come from rules, or from an instruct model: --splitter llm --splitter_model
FOLDER_OR_HUB_ID, or --splitter endpoint with --splitter_base_url. What models reply is stored in replies/ as it comes, and replays
without them; to ask again what failed, delete the shard that holds it.

Next: data/build_pairs.py. Several GPUs: the same command behind `torchrun --nproc_per_node 8`. Processes take shards from a common
queue, so more may join at any time by running the command on the same --output_dir. Killed: run the command again.

Output: shard-*.parquet, the rows of data/generate_responses.py (or any with image, question and answer) with the columns claims,
claim_questions, p_yes, p_no, score, failure. muffin_labeler.json says who judged. Answers that cannot be judged keep their row, without
score and with the reason.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from muffin.chat_feedback import PROMPT_VERSION, ChatLabeler, ChatSplitter
from muffin.claims import Claim, Splitter, split_by_rules
from muffin.feedback import FEEDBACK_FEATURES, Feedback, Judgement, Labeler, PolicyLabeler, failed, feedback_columns, give_feedback
from muffin.judge import JudgeOptions, StoringJudge, choose_runner
from muffin.pairs import PromptDataset, RowError, load_prompts, parse_column_map
from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint
from muffin.provenance import describe_reference, resolve_numerics
from muffin.scoring import fingerprint
from muffin.shapeworld import claims as shapeworld
from muffin.shapeworld.scenes import Scene
from muffin.shards import Shard, ShardFolder, begin_run, plan_shards, with_columns, write_missing

MANIFEST = "muffin_labeler.json"


def split_shapeworld(question: str, answer: str) -> list[Claim]:
    """The tiny world's own rules: a sentence is a claim."""
    return [Claim(claim.sentence, shapeworld.question_of(claim)) for claim in shapeworld.split_claims(answer)]


LabelerOfShard = Callable[[Shard], Labeler]  # of a shard's answers
SPLITTERS: dict[str, Splitter] = {"rules": split_by_rules, "shapeworld": split_shapeworld}


@dataclass
class FeedbackOptions:
    data_path: str = field(metadata={"help": "Answers: folder of data/generate_responses.py, or rows with image, question and answer."})
    output_dir: str = field(metadata={"help": "Folder for the judged answers; a run that was killed is resumed from it."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Labeler: folder or hub id of a model, or folder of a LoRA adapter. For --labeler policy."}
    )
    labeler: Literal["policy", "endpoint", "shapeworld_truth"] = field(
        default="policy",
        metadata={"help": "A policy, a server, or the ground truth that rows of the tiny world carry (an oracle for experiments)."},
    )
    labeler_model: str | None = field(default=None, metadata={"help": "The labeler's name at its server, for --labeler endpoint."})
    labeler_base_url: str | None = field(default=None, metadata={"help": "The labeler's server: http://localhost:8000/v1."})
    splitter: Literal["rules", "llm", "endpoint", "shapeworld"] = field(
        default="rules",
        metadata={"help": "How answers become claims: rules for English, an instruct model here or at a server, rules of the tiny world."},
    )
    splitter_model: str | None = field(
        default=None, metadata={"help": "Instruct model for --splitter llm (folder or hub id) or endpoint (its name at the server)."}
    )
    splitter_base_url: str | None = field(default=None, metadata={"help": "The splitter's server: http://localhost:8000/v1."})
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the servers' key; local ones need none."}
    )
    concurrency: int = field(default=8, metadata={"help": "Requests that a server is asked at a time, 1 to 64."})
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "Precision of weights and arithmetic; auto is bfloat16 where the hardware computes in it."}
    )
    batch_tokens: int = field(
        default=8192, metadata={"help": "Tokens of one forward, usually 2048 to 32768; the claims of one image still run together."}
    )
    shard_rows: int = field(default=1000, metadata={"help": "Answers of one output file, usually 100 to 5000: what a kill can cost."})
    column_map: str = field(default="", metadata={"help": "Own column names: question=prompt,image=picture."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})
    num_workers: int = field(default=4, metadata={"help": "Processes that decode and encode, per process that labels; 0 to 16."})

    def __post_init__(self) -> None:
        if self.batch_tokens < 1 or self.shard_rows < 1 or self.num_workers < 0:
            raise ValueError(
                f"--batch_tokens {self.batch_tokens} and --shard_rows {self.shard_rows} must be at least 1, "
                f"--num_workers {self.num_workers} at least 0"
            )
        if (self.model_name_or_path is None) == (self.labeler == "policy"):
            raise ValueError(
                f"--labeler {self.labeler} with --model_name_or_path {self.model_name_or_path}: only --labeler policy has a model"
            )
        for flag, wants_model, wants_url in (
            ("labeler", self.labeler == "endpoint", self.labeler == "endpoint"),
            ("splitter", self.splitter in ("llm", "endpoint"), self.splitter == "endpoint"),
        ):
            for name, wanted in ((f"{flag}_model", wants_model), (f"{flag}_base_url", wants_url)):
                if (getattr(self, name) is not None) != wanted:
                    state = "is missing" if wanted else "means nothing"
                    raise ValueError(f"--{name} {state} with --{flag} {getattr(self, flag)}")


OPTIONS = (PolicyOptions, FeedbackOptions)
DECIDING = ("labeler", "splitter", "splitter_model", "batch_tokens", "shard_rows", "column_map")


@dataclass(frozen=True)
class FeedbackSummary:
    """Of all shards. failures: answers without score; accepted: share of the claims."""

    answers: int
    failures: int
    claims: int
    accepted: float


def main(argv: list[str] | None = None) -> FeedbackSummary:
    policy_options, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    first = int(os.environ.get("RANK", 0)) == 0  # set by torchrun, as is LOCAL_RANK
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(name)s: %(message)s")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    answers = load_prompts(options.data_path, column_map=parse_column_map(options.column_map), image_root=options.image_root)
    if "answer" not in answers.table.column_names:
        raise ValueError(f"--data_path {options.data_path} has no column answer; make it with data/generate_responses.py")

    set_up = {"policy": set_up_policy, "endpoint": set_up_endpoint, "shapeworld_truth": set_up_truth}[options.labeler]
    description, load_labeler = set_up(options, policy_options, answers)
    split = set_up_splitter(options)
    folder = ShardFolder(Path(options.output_dir), plan_shards(len(answers), options.shard_rows))
    manifest = {
        "labeler": description,
        "settings": {name: getattr(options, name) for name in DECIDING}
        | ({"splitter_prompt": PROMPT_VERSION} if options.splitter in ("llm", "endpoint") else {}),
        "input": fingerprint(options.data_path, answers),
    }
    begin_run(folder.path, MANIFEST, manifest)

    start = time.perf_counter()
    written: list[Shard] = []
    if folder.missing():
        labeler = load_labeler()
        with tqdm(total=len(answers), initial=folder.finished_rows(), desc="labeling", unit="answer", disable=not first) as progress:
            judge = ShardJudge(answers, split, labeler, progress)
            written = write_missing(folder, judge.table, progress)
    seconds = time.perf_counter() - start
    summary = summarize(folder)
    if first:
        rows = sum(shard.stop - shard.start for shard in written)
        rate = f"{rows} of them here in {seconds:.1f} s" if rows else "none of them missing"
        print(
            f"{summary.answers} answers in {folder.path}, {rate}; {summary.claims} claims, {100 * summary.accepted:.1f} % accepted; "
            f"answers that could not be judged {summary.failures}"
        )
    return summary


def set_up_policy(
    options: FeedbackOptions, policy_options: PolicyOptions, answers: PromptDataset
) -> tuple[dict[str, Any], Callable[[], LabelerOfShard]]:
    """The labeler's description for the manifest, and what loads it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = resolve_checkpoint(options.model_name_or_path)
    adapter = load_adapter(checkpoint, policy_options)
    numerics = resolve_numerics(dtype=options.dtype, bits=None, lora_enable=True, device_type=device.type)  # no float32 master weights

    def load() -> LabelerOfShard:
        model = load_policy(checkpoint, adapter, dtype=numerics.load_dtype).requires_grad_(False).to(device).eval()
        labeler = PolicyLabeler(model, adapter, numerics, answers, batch_tokens=options.batch_tokens, num_workers=options.num_workers)
        return lambda shard: labeler

    return describe_reference(checkpoint, adapter, numerics), load


def set_up_endpoint(
    options: FeedbackOptions, _: PolicyOptions, answers: PromptDataset
) -> tuple[dict[str, Any], Callable[[], LabelerOfShard]]:
    ask = chat(options, "labeler", judge="endpoint", judge_model=options.labeler_model, judge_base_url=options.labeler_base_url)
    return {"endpoint": options.labeler_model}, lambda: lambda shard: ChatLabeler(ask(shard), answers)


def set_up_splitter(options: FeedbackOptions) -> Callable[[Shard, Sequence[tuple[str, str]]], Splitter]:
    """What splits the (question, answer) pairs of a shard."""
    if options.splitter in SPLITTERS:
        return lambda shard, answers: SPLITTERS[options.splitter]
    kind = "local" if options.splitter == "llm" else "endpoint"
    ask = chat(options, "splitter", judge=kind, judge_model=options.splitter_model, judge_base_url=options.splitter_base_url)
    return lambda shard, answers: ChatSplitter(ask(shard), answers)


def chat(options: FeedbackOptions, name: str, **settings: Any) -> Callable[[Shard], StoringJudge]:
    """A model to ask, whose replies are stored per shard: a shard has one writer, and one that was killed goes on with what is there."""
    judge = JudgeOptions(**settings, judge_api_key_env=options.api_key_env, judge_concurrency=options.concurrency)
    runner = choose_runner(judge, os.environ)
    replies = Path(options.output_dir) / "replies"
    return lambda shard: StoringJudge(judge, replies / f"{name}-{Path(shard.name).stem}.replies.jsonl", runner)


def set_up_truth(options: FeedbackOptions, _: PolicyOptions, answers: PromptDataset) -> tuple[dict[str, Any], Callable[[], LabelerOfShard]]:
    if "scene" not in answers.table.column_names:
        raise ValueError(f"--labeler shapeworld_truth needs the column scene, which {options.data_path} lacks; use --labeler policy")
    scenes = answers.table["scene"]

    def judge(claims: Mapping[int, Sequence[Claim]]) -> Iterator[tuple[int, Feedback]]:
        for row, split in claims.items():
            scene = Scene.from_json(scenes[row])
            truths = [shapeworld.is_true(stated, scene) for claim in split for stated in shapeworld.split_claims(claim.text)]
            yield row, Feedback(tuple(split), tuple(Judgement(float(truth), float(not truth)) for truth in truths))

    return {"ground_truth": "scene"}, lambda: lambda shard: judge


@dataclass(frozen=True)
class ShardJudge:
    """Makes the rows of a shard."""

    answers: PromptDataset
    split: Callable[[Shard, Sequence[tuple[str, str]]], Splitter]
    labeler: LabelerOfShard
    progress: tqdm

    def table(self, shard: Shard) -> pa.Table:
        rows = range(shard.start, shard.stop)
        table = self.answers.table
        texts = table[shard.start : shard.stop]["answer"]
        failures = table[shard.start : shard.stop]["failure"] if "failure" in table.column_names else [None] * len(rows)
        feedback: dict[int, Feedback] = {}
        asked: dict[int, tuple[str, str]] = {}
        for row, text, failure in zip(rows, texts, failures, strict=True):
            try:
                asked[row] = (self.answers[row].question, text)
            except RowError as error:
                failure = failure or error.reason
            if failure or text is None:
                feedback[row] = failed(failure or "answer is null")
                asked.pop(row, None)
        for row, judged in give_feedback(asked, self.split(shard, list(asked.values())), self.labeler(shard)):
            feedback[row] = judged
            self.progress.update()
        return with_columns(table, rows, FEEDBACK_FEATURES, feedback_columns([feedback[row] for row in rows]))


def summarize(folder: ShardFolder) -> FeedbackSummary:
    """Read back what all processes wrote. Raises ValueError when no answer could be judged."""
    names = ["p_yes", "p_no", "failure"]
    rows = [row for shard in folder.shards for row in pq.read_table(folder.path / shard.name, columns=names).to_pylist()]
    failures = [row["failure"] for row in rows if row["failure"] is not None]
    if len(failures) == len(rows):
        raise ValueError(f"no answer could be judged; the first failed because {failures[0]}")
    claims = [claim for row in rows for claim in zip(row["p_yes"], row["p_no"], strict=True)]
    accepted = sum(p_yes is not None and p_yes > p_no for p_yes, p_no in claims)
    return FeedbackSummary(len(rows), len(failures), len(claims), accepted / len(claims))


if __name__ == "__main__":
    main()
