"""MMHal-Bench (Sun et al. 2023, arXiv:2309.14525): 96 questions about pictures, answers graded from 0 to 6 by a judge that reads, not sees.

    question, objects in the picture, reference answer, answer --grading_prompt--> judge --parse_rating--> 0 ... 6, or None

The meaning of the grades and the arithmetic are the benchmark's. The prompt is muffin's own, with a version: a grade depends on the judge
and on the prompt, and compares with grades of the same two only. What the judge did not grade is missing; the authors' script counts it as
0 (eval_gpt_mmhal.py), which makes a policy worse by every failed request.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muffin.answers import Row, first_of
from muffin.hallucination import divide
from muffin.image_counts import ImageCounts

PROMPT_VERSION = "muffin-mmhal-1"
PUBLISHED_WITH = "gpt-4-1106-preview or gpt-4-0314 and the authors' prompt"
HALLUCINATED_BELOW = 3  # grades 0, 1, 2
TYPES = (
    "attribute",
    "adversarial",
    "comparison",
    "counting",
    "relation",
    "environment",
    "holistic",
    "other",
)  # of question i: TYPES[i % 8]
COUNTS = (
    "reviews",
    "rating",
    "hallucinated",
    "informative",
    "words",
    *(f"{kind} {name}" for kind in TYPES for name in ("reviews", "rating")),
)

_PROMPT = """\
You grade an answer that an AI assistant gave to a question about a picture. You do not see the picture. What is known about it: \
a list of things in it, and an answer written by a person, which is right.

An answer hallucinates if it states something about the picture that is wrong, or that cannot be in it by what is known. To \
leave something out is no hallucination. Details that go beyond what is known are no hallucination as long as they fit it. If \
the question takes for granted something that the picture does not have, an answer that says so is right, and one that goes \
along with it hallucinates.

Grades without hallucination: 6 very informative, with sound analysis or reasoning; 5 very informative; 4 somewhat informative; \
3 not informative.
Grades with hallucination: 2 otherwise very informative; 1 otherwise somewhat informative; 0 otherwise not informative.

Things in the picture: {objects}
Question: {question}
Answer by a person: {reference}
Answer to grade: {answer}

First name, in a few sentences, what the answer states and whether that agrees with what is known. Then close with a line of its \
own that holds nothing but the grade, in this form:
Rating: <0 to 6>"""

_RATING = re.compile(r"\brating\b[\s:*_`=<\[]{1,6}(\d+(?:\.\d+)?)", re.IGNORECASE)


@dataclass(frozen=True)
class GradedQuestion:
    """A row of the benchmark with an answer. image: its name; kind: one of TYPES."""

    image: str
    kind: str
    question: str
    objects: tuple[str, ...]
    reference: str
    answer: str


def parse_question(row: Row, number: int, answer: str) -> GradedQuestion:
    """A row of the answer template (question, gt_answer, image_content, image_src or image_id, question_type), position `number` in it."""
    missing = [name for name in ("question", "gt_answer") if not isinstance(row.get(name), str)]
    if missing:
        raise ValueError(f"row {number} has no {missing[0]}; want the columns of MMHal-Bench's answer template")
    kind = row.get("question_type") or TYPES[number % len(TYPES)]
    if kind not in TYPES:
        raise ValueError(f"row {number}: question_type is {kind!r}, want one of {', '.join(TYPES)}")
    image = first_of(row, ("image_id", "image_src", "image", "image_path"))
    objects = tuple(row.get("image_content") or ())
    return GradedQuestion(str(number if image is None else image), kind, row["question"], objects, row["gt_answer"], answer)


def grading_prompt(question: GradedQuestion) -> str:
    """What the judge is asked."""
    return _PROMPT.format(
        objects=", ".join(question.objects) or "not listed",
        question=question.question,
        reference=question.reference,
        answer=question.answer or "(the assistant said nothing)",
    )


def parse_rating(review: str) -> int | None:
    """The grade in a review; None when there is none, when it is no whole number from 0 to 6, or when grades contradict each other.

    The last line that names one decides; "rating: 1" in the analysis above it does not matter.
    """
    lines = [found for found in (_RATING.findall(line) for line in review.splitlines()) if found]
    if not lines or len(set(lines[-1])) > 1:
        return None
    grade = lines[-1][0]
    return int(grade) if grade in ("0", "1", "2", "3", "4", "5", "6") else None


def count_ratings(questions: Sequence[GradedQuestion], ratings: Sequence[int | None]) -> ImageCounts:
    """COUNTS of the graded answers; those without a grade are left out. Raises ValueError when none has one."""
    counts, images = [], []
    for question, rating in zip(questions, ratings, strict=True):
        if rating is not None:
            hallucinated = rating < HALLUCINATED_BELOW
            row = [1, rating, hallucinated, rating if hallucinated else rating - HALLUCINATED_BELOW, len(question.answer.split())]
            row += [value * (kind == question.kind) for kind in TYPES for value in (1, rating)]
            counts.append(row)
            images.append(question.image)
    if not counts:
        raise ValueError(f"none of the {len(questions)} answers has a grade; look at the judge's replies")
    return ImageCounts.of_answers(COUNTS, np.array(counts, dtype=float), images)


def mmhal_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Of sums (..., 21) of COUNTS. score: mean grade; hallucination_rate: percent with a grade below 3; informativeness: percent of 3.

    Informativeness is the grade without what it says about hallucination: g - 3 from 3 on, else g. "score attribute", ...: by type.
    """
    reviews, rating, hallucinated, informative, words = np.moveaxis(sums[..., :5], -1, 0)
    by_type = {f"score {kind}": divide(sums[..., 6 + 2 * n], sums[..., 5 + 2 * n]) for n, kind in enumerate(TYPES)}
    return {
        "score": divide(rating, reviews),
        "hallucination_rate": 100 * divide(hallucinated, reviews),
        "informativeness": 100 * divide(informative, reviews) / 3,
        "words": divide(words, reviews),
        **by_type,
    }


def undefined_scores(counts: ImageCounts) -> set[str]:
    """Names of the scores of types without a graded answer, which are no scores."""
    return {f"score {kind}" for number, kind in enumerate(TYPES) if not counts.sums[5 + 2 * number]}


def comparable_with(judge: str, prompt: str) -> str:
    """Which published numbers a result may be set beside."""
    return (
        f"grades by {judge} under the prompt {prompt} only; published MMHal-Bench numbers are by {PUBLISHED_WITH}, "
        "and their scripts count an unreadable review as 0"
    )
