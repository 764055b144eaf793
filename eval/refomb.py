"""RefoMB: how often answers beat GPT-4V's, overall and in hallucination, by a judge that reads, with 95 % intervals over images.

    python eval/refomb.py --questions RefoMB_dev.jsonl --reference_answers gpt4v_RefoMB_dev_0521.jsonl --answers answers/ \\
        --output refomb.json --judge_model Qwen/Qwen2.5-72B-Instruct

Answers of a policy: eval/run_benchmarks.py --benchmarks refomb. Answers made elsewhere: JSON lines with image_url, question and answer.
Every answer is compared twice: with GPT-4V's answer first, as published, and with the places swapped, which shows how much the judge
likes a place. A second question to the judge is about its own review: who hallucinates less. Who judges (a server, a model loaded here,
or files, whose two questions are two rounds of requests): see eval/mmhal.py. Published numbers are means of three runs or more: with a
judge that samples (--judge_temperature), run this with --judge_seed 1, 2, 3 and other --output.

The result names judge, date and prompt version, and says what it may be compared with. A failed request or an unreadable verdict is a
missing value: reported, left out of every share, never a loss.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from muffin.answers import Row, answer_text, match_answers, read_rows
from muffin.hallucination import format_table
from muffin.image_counts import estimate_counts, result_of, write_result
from muffin.judge import Judge, JudgeOptions, Reply, describe_missing, load_judge
from muffin.refomb import (
    ORDERS,
    PROMPT_VERSION,
    Choice,
    ComparedAnswer,
    Order,
    Verdict,
    comparable_with,
    comparison_prompt,
    count_verdicts,
    hallucination_prompt,
    parse_choice,
    parse_question,
    points_of,
    refomb_scores,
    undefined_scores,
)


@dataclass
class RefombOptions:
    questions: str = field(metadata={"help": "RefoMB_dev.jsonl: image_url, question, description."})
    reference_answers: str = field(metadata={"help": "GPT-4V's answers: image_url, question, answer."})
    answers: str = field(
        metadata={"help": "Answers: folder of data/generate_responses.py, or JSON lines with image_url, question, answer."}
    )
    output: str = field(metadata={"help": "JSON file for the result, every review included."})
    order: Literal["both", "published", "swapped"] = field(
        default="both", metadata={"help": "Places of the answers: GPT-4V's first (published), the policy's first (swapped), or both."}
    )


OPTIONS = (JudgeOptions, RefombOptions)


@dataclass(frozen=True)
class Judged:
    """What the judge said about all questions in one order: reviews with their choices, and what it made of the reviews."""

    reviews: list[Reply]
    choices: list[Choice | None]
    hall_replies: list[Reply | None]
    hall_choices: list[Choice | None]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    judge_options, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    questions = read_questions(options)
    judge = load_judge(judge_options, options.output, os.environ)
    orders: Sequence[Order] = ORDERS if options.order == "both" else (options.order,)
    judged = compare_answers(judge, questions, orders)

    verdicts = [
        {order: Verdict(points_of(each.choices[n], order), points_of(each.hall_choices[n], order)) for order, each in judged.items()}
        for n in range(len(questions))
    ]
    counts = count_verdicts(questions, verdicts)
    estimates = {name: each for name, each in estimate_counts(counts, refomb_scores).items() if name not in undefined_scores(counts)}
    missing = {order: describe_missing(each.reviews, each.choices, "no readable choice") for order, each in judged.items()}
    result = {
        "benchmark": "refomb",
        "rules": {"judge": judge.name, "prompt": PROMPT_VERSION, "orders": list(orders)},
        "judge": judge.describe() | {"prompt": PROMPT_VERSION},
        "comparable_with": comparable_with(judge.name),
        "answers": len(questions),
        "missing": missing,
        "missing_hall": {order: sum(choice is None for choice in each.hall_choices) for order, each in judged.items()},
    } | result_of(estimates, counts)
    result["per_answer"] = [
        {"image": question.image, "question": question.question, "answer": question.answer}
        | {order: as_row(each, n) | vars(verdicts[n][order]) for order, each in judged.items()}
        for n, question in enumerate(questions)
    ]
    print(format_table(f"RefoMB: {len(questions)} answers, judge {judge.name}, prompt {PROMPT_VERSION}", estimates, 1))
    print(f"missing: {missing}; of the reviews on hallucination {result['missing_hall']}\ncomparable with {result['comparable_with']}")
    write_result(Path(options.output), result)
    return result


def read_questions(options: RefombOptions) -> list[ComparedAnswer]:
    """Questions with both answers, joined by image and question."""
    rows = with_keys(read_rows(options.questions, "--questions"))
    others = match_answers(rows, with_keys(read_rows(options.reference_answers, "--reference_answers")), ("key",))
    answers = match_answers(rows, with_keys(read_rows(options.answers, "--answers")), ("key",))
    return [
        parse_question(
            row, number, answer_text(other, f"--reference_answers, row {number}"), answer_text(answer, f"--answers, row {number}")
        )
        for number, (row, other, answer) in enumerate(zip(rows, others, answers, strict=True))
    ]


def with_keys(rows: list[Row]) -> list[Row]:
    """Rows with image and question as one column; without the image's address the rows are in the order of the questions."""
    return [row | {"key": f"{row['image_url']} {row.get('question')}"} if row.get("image_url") else row for row in rows]


def compare_answers(judge: Judge, questions: Sequence[ComparedAnswer], orders: Sequence[Order]) -> dict[Order, Judged]:
    """All comparisons first, then all questions about their reviews: a judge that works on files is asked twice, not four times."""
    asked = [(order, number) for order in orders for number in range(len(questions))]
    reviews = dict(zip(asked, judge.ask([comparison_prompt(questions[number], order) for order, number in asked]), strict=True))
    choices = {key: None if review.text is None else parse_choice(review.text) for key, review in reviews.items()}
    readable = [key for key in asked if choices[key] is not None]
    replies = dict(zip(readable, judge.ask([hallucination_prompt(str(reviews[key].text)) for key in readable]), strict=True))
    hall_choices = {key: None if reply.text is None else parse_choice(reply.text) for key, reply in replies.items()}
    numbers = range(len(questions))
    return {
        order: Judged(
            [reviews[order, n] for n in numbers],
            [choices[order, n] for n in numbers],
            [replies.get((order, n)) for n in numbers],
            [hall_choices.get((order, n)) for n in numbers],
        )
        for order in orders
    }


def as_row(judged: Judged, number: int) -> dict[str, Any]:
    review, hall = judged.reviews[number], judged.hall_replies[number]
    failures = [reply.failure for reply in (review, hall) if reply is not None and reply.failure]
    return {"review": review.text, "hall_review": hall.text if hall else None} | ({"failure": failures[0]} if failures else {})


if __name__ == "__main__":
    main()
