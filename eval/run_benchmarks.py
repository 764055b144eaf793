"""Hallucination benchmarks of one policy in one command: answers, scores, one table; and the difference between two policies.

    python eval/run_benchmarks.py --model_name_or_path M --benchmarks pope,amber,chair --data_root DATA --output_dir benchmarks/M
    python eval/run_benchmarks.py --compare benchmarks/BASE benchmarks/M

Every benchmark runs data/generate_responses.py (greedy) on its questions, then its own recipe, in processes of their own whose commands are
printed. Killed: the same command again, answers that are there are not made again. --compare takes folders of this command, or single
results of eval/pope.py and the like, and resamples the same images for both. No hallucination number stands without capability and length.
objhal, mmhal and refomb need a judge: --judge endpoint|local|files, see eval/mmhal.py.

What --data_root holds:

    pope         pope/*pope*.json (random, popular, adversarial; any question file), val2014/ (COCO pictures)
    amber        AMBER/data/ of its repository, pictures in AMBER/images/
    chair        chair/questions.jsonl (image, question), chair/synonyms.txt, annotations/ (COCO), val2014/
    objhal       as chair; with a judge, as the next two
    mmhal        mmhal/mmhal-bench_answer_template.json, mmhal/images/ (the last part of image_src is the file's name)
    refomb       refomb/RefoMB_dev.jsonl, refomb/gpt4v_RefoMB_dev_0521.jsonl, refomb/images/ (the last part of image_url)
    shapeworld   heldout.parquet, pope.parquet: a folder of data/make_shapeworld.py

Output: NAME/answers/ and NAME/result.json for every part, benchmarks.json (all results without their counts per image), comparison.json.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from muffin.answers import Row, read_rows
from muffin.benchmarks import compare_results, format_comparison, format_results, parts_of, read_result
from muffin.image_counts import write_result
from muffin.judge import JudgeOptions, RepliesMissing
from muffin.policies import PolicyOptions
from muffin.provenance import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULT = "result.json"


@dataclass
class RunOptions:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Policy: folder or hub id of a model, or of a LoRA adapter."})
    benchmarks: str = field(
        default="pope,amber,chair", metadata={"help": "Names out of pope, amber, chair, objhal, mmhal, refomb, shapeworld; by commas."}
    )
    data_root: str | None = field(default=None, metadata={"help": "Folder with the benchmarks' files; see above."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for answers and results; a run that was killed goes on from it."}
    )
    compare: list[str] = field(default_factory=list, metadata={"help": "Two folders of this command, or two results; nothing is run."})
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "Precision of weights and arithmetic; auto is bfloat16 where the hardware computes in it."}
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts that are generated for at once, usually 1 to 64."})
    num_workers: int = field(default=4, metadata={"help": "Processes that decode and encode images, per process that generates; 0 to 16."})
    nproc_per_node: str | None = field(
        default=None, metadata={"help": "Processes that generate, through torchrun: a number, or gpu for all."}
    )

    def __post_init__(self) -> None:
        if self.compare and (self.model_name_or_path or len(self.compare) != 2):
            raise ValueError(f"--compare takes two results and no --model_name_or_path, found {len(self.compare)} results")
        needed = {"--model_name_or_path": self.model_name_or_path, "--data_root": self.data_root, "--output_dir": self.output_dir}
        missing = [flag for flag, value in needed.items() if value is None]
        if missing and not self.compare:
            raise ValueError(f"{', '.join(missing)} missing; to compare two finished runs give --compare FIRST SECOND")
        if unknown := sorted(set(self.names).difference(PARTS)):
            raise ValueError(f"--benchmarks {unknown[0]}: want names out of {', '.join(PARTS)}")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.benchmarks.split(",") if name.strip()]


@dataclass(frozen=True)
class Part:
    """One file of questions. score: the recipe that scores the answers, with its flags but for --answers, --output and the judge's.

    rows: what the policy is asked, where that is not the file itself.
    """

    name: str
    questions: Path
    images: Path | None
    column_map: str
    max_new_tokens: int
    score: tuple[str, ...]
    judged: bool = False
    rows: tuple[Row, ...] = ()
    answers: str = ""  # the part whose answers are scored; its own without


def pope(data: Path) -> list[Part]:
    files = sorted((data / "pope").glob("*pope*.json"))
    if not files:
        raise ValueError(f"--data_root {data}: found no pope/*pope*.json; want POPE's files, such as pope/coco_pope_random.json")
    return [Part(file.stem, file, data / "val2014", "question=text", 64, ("eval/pope.py", "--questions", str(file))) for file in files]


def amber(data: Path) -> list[Part]:
    folder = data / "AMBER" / "data"
    queries = folder / "query" / "query_all.json"
    flags = [
        word for file in ("annotations.json", "relation.json", "safe_words.txt") for word in (f"--{Path(file).stem}", str(folder / file))
    ]
    score = ("eval/amber.py", *flags, "--queries", str(queries), "--answer_rule", "first_word")
    return [Part("amber", queries, data / "AMBER" / "images", "question=query", 512, score)]


def chair(data: Path) -> list[Part]:
    score = ("eval/chair.py", "--synonyms", str(data / "chair" / "synonyms.txt"), "--coco_annotations", str(data / "annotations"))
    return [Part("chair", data / "chair" / "questions.jsonl", data / "val2014", "", 512, score)]


def objhal(data: Path) -> list[Part]:
    """Object HalBench: CHAIR's pictures and truth, objects listed by the judge."""
    (part,) = chair(data)
    return [replace(part, name="objhal", score=("eval/object_halbench.py", *part.score[1:]), judged=True, answers=part.name)]


def mmhal(data: Path) -> list[Part]:
    questions = data / "mmhal" / "mmhal-bench_answer_template.json"
    rows = rows_of(questions, "image_src", ("image_id",))
    score = ("eval/mmhal.py", "--questions", str(questions))
    return [Part("mmhal", questions, data / "mmhal" / "images", "", 512, score, judged=True, rows=rows)]


def refomb(data: Path) -> list[Part]:
    questions, others = (data / "refomb" / name for name in ("RefoMB_dev.jsonl", "gpt4v_RefoMB_dev_0521.jsonl"))
    score = ("eval/refomb.py", "--questions", str(questions), "--reference_answers", str(others))
    rows = rows_of(questions, "image_url", ("image_url",))
    return [Part("refomb", questions, data / "refomb" / "images", "", 512, score, judged=True, rows=rows)]


def rows_of(questions: Path, address: str, kept: tuple[str, ...]) -> tuple[Row, ...]:
    """Questions on images that stand as addresses: the image is the file that the address ends in."""
    if not questions.is_file():
        return ()  # named by main
    return tuple(
        {"image": row[address].rpartition("/")[2], "question": row["question"]} | {name: row[name] for name in kept}
        for row in read_rows(questions, "--data_root")
    )


def shapeworld(data: Path) -> list[Part]:
    questions = data / "pope.parquet"
    return [
        Part("shapeworld_pope", questions, None, "", 16, ("eval/pope.py", "--questions", str(questions))),
        Part("shapeworld_chair", data / "heldout.parquet", None, "", 80, ("eval/chair.py",)),
    ]


PARTS: dict[str, Callable[[Path], list[Part]]] = {
    "pope": pope,
    "amber": amber,
    "chair": chair,
    "objhal": objhal,
    "mmhal": mmhal,
    "refomb": refomb,
    "shapeworld": shapeworld,
}
OPTIONS = (PolicyOptions, JudgeOptions, RunOptions)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    policy, judge, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    if options.compare:
        return compare(*options.compare, output_dir=options.output_dir)
    parts = [part for name in options.names for part in PARTS[name](Path(options.data_root))]
    for part in parts:  # before the first hour, not after it
        if not part.questions.is_file():
            raise ValueError(
                f"--data_root {options.data_root} lacks {part.questions.relative_to(options.data_root)}, which {part.name} needs"
            )
    output_dir = Path(options.output_dir)
    waiting = []
    for part in parts:
        answers, result = output_dir / (part.answers or part.name) / "answers", output_dir / part.name / RESULT
        run_recipe(*generation(part, answers, policy, options))
        score = (*part.score, "--answers", str(answers), "--output", str(result))
        if not part.judged:
            run_recipe(*score)
            continue
        result.unlink(missing_ok=True)
        try:
            run_recipe(*score, *judge.flags())
        except (SystemExit, RepliesMissing):  # the others go on
            waiting.append(part.name)
    parts = [part for part in parts if part.name not in waiting]
    results = {part.name: read_result(output_dir / part.name / RESULT) for part in parts}
    numbers = {title: without_details(part) for name, result in results.items() for title, part in parts_of(name, result)}
    summary = {"model": options.model_name_or_path, "date": datetime.now(UTC).date().isoformat(), "results": numbers}
    write_result(output_dir / "benchmarks.json", summary)
    print(f"\n{options.model_name_or_path}; 95 % intervals over images\n\n{format_results(results)}")
    print(f"\nresults: {output_dir / 'benchmarks.json'}")
    if waiting:
        raise SystemExit(f"not scored: {', '.join(waiting)}; see above what their judge waits for, and give this command again")
    return summary


def without_details(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("per_image", "per_caption", "per_answer", "kinds")}


def generation(part: Part, answers: Path, policy: PolicyOptions, options: RunOptions) -> list[str]:
    """The words of the command that answers a part's questions."""
    questions = part.questions
    if part.rows:
        questions = answers.parent / "questions.jsonl"
        questions.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(questions, "".join(json.dumps(row) + "\n" for row in part.rows).encode())
    words = ["data/generate_responses.py", "--model_name_or_path", options.model_name_or_path, "--data_path", str(questions)]
    words += ["--output_dir", str(answers), "--num_answers", "1", "--temperature", "0", "--max_new_tokens", str(part.max_new_tokens)]
    words += ["--dtype", options.dtype, "--batch_size", str(options.batch_size), "--num_workers", str(options.num_workers)]
    words += [*(["--column_map", part.column_map] if part.column_map else []), *(["--image_root", str(part.images)] if part.images else [])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", options.nproc_per_node] if options.nproc_per_node else []
    return [*launcher, *words, *policy.flags()]


def run_recipe(*words: str) -> None:
    """One recipe in a process of its own."""
    print(f"\n== python {shlex.join(words)}", flush=True)
    finished = subprocess.run([sys.executable, *words], cwd=ROOT)
    if finished.returncode:
        raise SystemExit(f"this command failed with exit code {finished.returncode}; mend the cause above and run the same again")


def compare(first: str, second: str, output_dir: str | None) -> dict[str, Any]:
    results = [results_in(path) for path in (first, second)]
    if all(Path(path).is_file() for path in (first, second)):
        results = [{"result": result} for each in results for result in each.values()]
    differences = compare_results(*results)
    benchmark_of = {title: part["benchmark"] for name, result in results[0].items() for title, part in parts_of(name, result)}
    print(f"first: {first}\nsecond: {second}\n\n{format_comparison(differences, benchmark_of)}\n\n* the interval leaves out zero")
    found = {
        "first": first,
        "second": second,
        "differences": {title: {name: asdict(each) for name, each in numbers.items()} for title, numbers in differences.items()},
    }
    if output_dir:
        write_result(Path(output_dir) / "comparison.json", found)
    return found


def results_in(path: str) -> dict[str, dict[str, Any]]:
    """The result at a path, or those in a folder of this command, by name."""
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob(f"*/{RESULT}"))
    if not files:
        raise ValueError(f"--compare {path}: found no */{RESULT}; want a folder of eval/run_benchmarks.py, or a benchmark's result")
    return {file.parent.name if file.name == RESULT else file.stem: read_result(file) for file in files}


if __name__ == "__main__":
    main()
