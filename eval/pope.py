"""POPE: accuracy, precision, recall, F1 and yes ratio on yes/no questions about objects, with 95 % intervals over images.

    python eval/pope.py --questions coco_pope_random.json --answers answers/ --output pope.json

Answers of a policy: data/generate_responses.py --data_path coco_pope_random.json --column_map question=text --image_root val2014
--num_answers 1 --temperature 0; its folder is --answers. Answers made elsewhere: JSON lines with question_id and text (or answer). They
are matched by question_id, without ids by order. Random, popular and adversarial are files of their own; a file that tells its splits
in a column `category` or `kind` is scored in whole and by split.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from muffin.answers import answer_text, match_answers, read_rows
from muffin.hallucination import Estimate, estimate, format_table
from muffin.pope import count_outcomes, is_unclear, parse_question, pope_ratios, says_yes
from muffin.provenance import write_atomically


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

    outcomes = count_outcomes([says_yes(text) for text in texts], [question.is_yes for question in questions])
    images = [question.image for question in questions]
    result, estimates = score(outcomes, images)
    result |= {"unclear": sum(map(is_unclear, texts)), "intervals_over": f"{len(set(images))} images"}
    print(format_table(f"POPE: {len(texts)} questions on {len(set(images))} images, {result['unclear']} unclear answers", estimates, 4))
    kinds = sorted({str(question.kind) for question in questions})
    if len(kinds) > 1:
        result["kinds"] = {}
        for kind in kinds:
            chosen = [number for number, question in enumerate(questions) if str(question.kind) == kind]
            result["kinds"][kind], estimates = score(outcomes[chosen], [images[number] for number in chosen])
            print(format_table(f"{kind}: {len(chosen)} questions", estimates, 4))
    write_atomically(Path(options.output), (json.dumps(result, indent=1) + "\n").encode())
    return result


def score(outcomes: np.ndarray, images: list[str]) -> tuple[dict[str, Any], dict[str, Estimate]]:
    """The result as JSON, and its table."""
    estimates = estimate(pope_ratios(outcomes), images)
    counts = dict(zip(("tp", "fp", "tn", "fn"), map(int, outcomes.sum(axis=0)), strict=True))
    values = {name: each.value for name, each in estimates.items()}
    intervals = {name: [each.low, each.high] for name, each in estimates.items()}
    return counts | values | {"questions": len(outcomes), "intervals": intervals}, estimates


if __name__ == "__main__":
    main()
