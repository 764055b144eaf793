"""Answers to a benchmark's questions, from files: the Parquet of data/generate_responses.py, and what other people's scripts write.

    {"question_id": 7, "text": "Yes"}      {"id": 7, "response": "Yes"}      {"image_id": 7, "caption": "A dog ..."}

Answers belong to questions by id where both have one, else by order. Never by text: prompts differ between scripts in wording and typos.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ANSWER_NAMES = ("answer", "response", "text", "caption", "model_answer")  # the first that a row has is its answer
IMAGE_NAMES = ("image", "image_path", "image_source", "image_id")
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)\.parquet")

Row = dict[str, Any]


def read_rows(path: str | Path, flag: str) -> list[Row]:
    """Rows of a Parquet file, of a folder of Parquet files (images are left out), of a JSON file or of a JSON-lines file of any ending.

    A JSON file holds a list of rows, or an object with the list under "sentences" (CHAIR's output) or "imgToEval" (its input).
    Raises ValueError, naming `flag`, when there is nothing readable.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".parquet":
        rows = _read_parquet(path, flag)
    elif path.is_file():
        rows = _read_json(path, flag)
    else:
        raise ValueError(f"{flag} {path}: no such file or folder")
    if not rows:
        raise ValueError(f"{flag} {path} holds no rows")
    return rows


def _read_parquet(path: Path, flag: str) -> list[Row]:
    files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith(".")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{flag} {path}: found no *.parquet file in this folder")
    shards = [match for match in (_SHARD.fullmatch(file.name) for file in files) if match]
    if path.is_dir() and shards and (len(shards) != int(shards[0][2]) or len(shards) != len(files)):
        raise ValueError(f"{flag} {path}: found {len(files)} files of the {int(shards[0][2])} shards of a run; finish the run first")
    rows: list[Row] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{flag} {file}: no such file")
        schema = pq.read_schema(file)
        columns = [field.name for field in schema if not _holds_bytes(field.type)]
        rows += pq.read_table(file, columns=columns).to_pylist()
    return rows


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or (pa.types.is_list(kind) and _holds_bytes(kind.value_type))


def _read_json(path: Path, flag: str) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = [_parse_line(line, f"{flag} {path}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(content, dict):
        content = content.get("sentences") or list(content.get("imgToEval", {}).values()) or [content]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{flag} {path}: want JSON objects, one per line or in one list")
    return content


def _parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: neither JSON nor JSON lines ({error})") from error


def first_of(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of `names` that the row has with a value; None without any."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def answer_text(row: Mapping[str, Any], where: str) -> str:
    """The row's answer. Raises ValueError, starting with `where`, when it has none: a failure is not a wrong answer."""
    text = first_of(row, ANSWER_NAMES)
    if isinstance(text, str):
        return text
    if row.get("failure"):
        raise ValueError(f"{where} was not answered: {row['failure']}; mend or remove its question")
    raise ValueError(f"{where}: found the columns {', '.join(row)}; want a text in one of {', '.join(ANSWER_NAMES)}")


def row_ids(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str] | None:
    """The ids of rows, as text, from the first of `names` that all rows have; None when there is none."""
    for name in names:
        if all(row.get(name) is not None for row in rows):
            return [str(row[name]) for row in rows]
    return None


def match_answers(questions: Sequence[Mapping[str, Any]], answers: Sequence[Row], names: Sequence[str] = ("question_id",)) -> list[Row]:
    """The answer rows in the order of the questions: by id where both have one of `names`, else by order.

    Raises ValueError when the counts differ, when an id occurs twice or has no counterpart, or for several answers to one question.
    """
    prompts = [row["prompt_row"] for row in answers if "prompt_row" in row]
    if len(set(prompts)) < len(prompts):
        raise ValueError("--answers holds several answers per question; generate with --num_answers 1, or pick one with eval/best_of_n.py")
    if len(questions) != len(answers):
        raise ValueError(f"found {len(answers)} answers to {len(questions)} questions, want one each; check that both are of one split")
    wanted, given = row_ids(questions, names), row_ids(answers, names)
    if wanted is None or given is None:
        return list(answers)
    for flag, ids in (("--questions", wanted), ("--answers", given)):
        refuse_repeated(flag, ids)
    by_id = dict(zip(given, answers, strict=True))
    unanswered = [each for each in wanted if each not in by_id]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} questions have no answer, the first is {names[0]} {unanswered[0]}; "
            f"the answers' ids go from {given[0]} to {given[-1]}"
        )
    return [by_id[each] for each in wanted]


def refuse_repeated(flag: str, ids: Sequence[str]) -> None:
    """Raise ValueError for an id that occurs twice."""
    each, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{flag}: id {each} occurs {times} times; want every id once (one file per split)")
