"""MMHal-Bench: hallucination rate and grade of answers by a judge that reads, with 95 % intervals over images.

    python eval/mmhal.py --questions mmhal-bench_answer_template.json --answers answers/ --output mmhal.json \\
        --judge_model Qwen/Qwen2.5-72B-Instruct

Answers of a policy: eval/run_benchmarks.py --benchmarks mmhal. Answers made elsewhere: the template with `model_answer` filled in, or
JSON lines with image_id and answer; they are matched by image_id, without ids by order.

Who judges: a server that speaks OpenAI's protocol (--judge endpoint --judge_base_url http://localhost:8000/v1), an instruct model loaded
here (--judge local --judge_model FOLDER_OR_HUB_ID), or anything that runs OpenAI's batch format: without --judge the first run writes
its requests beside the output; run them (`vllm run-batch`, OpenAI), store what comes back as mmhal.replies.jsonl, and give the command
again. Replies are stored as they come: a killed run loses none, failed requests are asked again, and the file replays the result.
Reviews that another script made are scored by --reviews.

The result names judge, date and prompt version, and says what it may be compared with. A failed request or an unreadable review is a
missing value: reported, left out of every mean, never a wrong answer.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from muffin.answers import answer_text, match_answers, read_rows
from muffin.hallucination import format_table
from muffin.image_counts import estimate_counts, result_of, write_result
from muffin.judge import JudgeOptions, StoredReviews, describe_missing, load_judge
from muffin.mmhal import (
    PROMPT_VERSION,
    comparable_with,
    count_ratings,
    grading_prompt,
    mmhal_scores,
    parse_question,
    parse_rating,
    undefined_scores,
)


@dataclass
class MmhalOptions:
    questions: str = field(metadata={"help": "MMHal-Bench's answer template: JSON with question, gt_answer, image_content, ..."})
    answers: str = field(metadata={"help": "Answers: folder of data/generate_responses.py, or a JSON-lines, JSON or Parquet file."})
    output: str = field(metadata={"help": "JSON file for the result, every review included."})
    reviews: str | None = field(
        default=None, metadata={"help": "Reviews made elsewhere, one per question in their order, in place of a judge: JSON or JSON lines."}
    )


OPTIONS = (JudgeOptions, MmhalOptions)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    judge_options, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    rows = read_rows(options.questions, "--questions")
    answers = match_answers(rows, read_rows(options.answers, "--answers"), ("image_id",))
    texts = [answer_text(row, f"--answers, row {number}") for number, row in enumerate(answers)]
    questions = [parse_question(row, number, text) for number, (row, text) in enumerate(zip(rows, texts, strict=True))]

    judge = StoredReviews(options.reviews) if options.reviews else load_judge(judge_options, options.output, os.environ)
    prompt = "of the stored reviews" if options.reviews else PROMPT_VERSION
    reviews = judge.ask([grading_prompt(question) for question in questions])
    ratings = [None if review.text is None else parse_rating(review.text) for review in reviews]
    counts = count_ratings(questions, ratings)
    estimates = {name: each for name, each in estimate_counts(counts, mmhal_scores).items() if name not in undefined_scores(counts)}
    missing = describe_missing(reviews, ratings, "no readable rating")
    result = {
        "benchmark": "mmhal",
        "rules": {"judge": judge.name, "prompt": prompt},
        "judge": judge.describe() | {"prompt": prompt},
        "comparable_with": comparable_with(judge.name, prompt),
        "answers": len(questions),
        "missing": missing,
    } | result_of(estimates, counts)
    result["per_answer"] = [
        {"image": question.image, "type": question.kind, "answer": question.answer, "rating": rating, "review": review.text}
        | ({"failure": review.failure} if review.failure else {})
        for question, rating, review in zip(questions, ratings, reviews, strict=True)
    ]
    print(format_table(f"MMHal-Bench: {len(questions)} answers, judge {judge.name}, prompt {prompt}", estimates, 2))
    print(f"missing: {missing}\ncomparable with {result['comparable_with']}")
    write_result(Path(options.output), result)
    return result


if __name__ == "__main__":
    main()
