"""POPE: accuracy, precision, recall, F1 and yes ratio on yes/no questions about objects, with 95 % intervals over images.

    python eval/pope.py --questions coco_pope_random.json --answers answers/ --output pope.json

Answers of a policy: data/generate_responses.py --data_path coco_pope_random.json --column_map question=text --image_root val2014
--num_answers 1 --temperature 0; its folder is --answers. Answers made elsewhere: JSON lines with question_id and text (or answer). They
are matched by question_id, without ids by order. Random, popular and adversarial are files of their own; a file that tells its splits
in a column `category` or `kind` is scored in whole and by split.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from muffin.answers import answer_text, match_answers, read_rows
from muffin.hallucination import Estimate, format_table
from muffin.image_counts import estimate_counts, result_of, write_result
from muffin.pope import COUNTS, OUTCOMES, PopeQuestion, count_answers, parse_question, pope_scores


@dataclass
class PopeOptions:
    questions: str = field(metadata={"help": "Questions with labels: JSON lines, JSON or Parquet."})
    answers: str = field(metadata={"help": "Answers: folder of data/generate_responses.py, or a JSON-lines, JSON or Parquet file."})
    output: str = field(metadata={"help": "JSON file for the result."})


OPTIONS = (PopeOptions,)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    rows = read_rows(options.questions, "--questions")
    answers = match_answers(rows, read_rows(options.answers, "--answers"))
    questions = [parse_question(row, number) for number, row in enumerate(rows)]
    texts = [answer_text(row, f"--answers, row {number}") for number, row in enumerate(answers)]

    result, estimates = score(texts, questions)
    print(format_table(f"POPE: {len(texts)} questions, {result['unclear']} unclear answers", estimates, 4))
    kinds = sorted({str(question.kind) for question in questions})
    if len(kinds) > 1:
        result["kinds"] = {}
        for kind in kinds:
            chosen = [number for number, question in enumerate(questions) if str(question.kind) == kind]
            result["kinds"][kind], estimates = score([texts[number] for number in chosen], [questions[number] for number in chosen])
            print(format_table(f"{kind}: {len(chosen)} questions", estimates, 4))
    write_result(Path(options.output), result)
    return result


def score(texts: list[str], questions: list[PopeQuestion]) -> tuple[dict[str, Any], dict[str, Estimate]]:
    """The result as JSON, and its table."""
    counts = count_answers(texts, questions)
    estimates = estimate_counts(counts, pope_scores)
    sums = dict(zip(COUNTS, map(int, counts.sums), strict=True))
    outcomes = {name: sums[name] for name in (*OUTCOMES, "unclear")}
    return {"benchmark": "pope"} | outcomes | {"questions": len(texts)} | result_of(estimates, counts), estimates


if __name__ == "__main__":
    main()
