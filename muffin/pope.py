"""POPE (Li et al. 2023, arXiv:2305.10355): yes/no questions about objects, as many present as absent; positive means yes.

An answer is read as the authors' evaluate.py reads it: in its first sentence, commas dropped, one of the words No, no, not says no;
everything else, junk included, says yes. `unclear` counts what neither names yes nor no, so that junk shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from muffin.answers import IMAGE_NAMES, first_of
from muffin.hallucination import divide
from muffin.image_counts import ImageCounts

NO_WORDS = {"No", "no", "not"}
OUTCOMES = ("tp", "fp", "tn", "fn")
COUNTS = (*OUTCOMES, "unclear", "words")
LABEL_NAMES = ("label", "answer", "chosen")


@dataclass(frozen=True)
class PopeQuestion:
    """image: its name; is_yes: the true answer; kind: the split (random, popular, adversarial) if the file tells."""

    image: str
    is_yes: bool
    kind: str | None


def parse_question(row: Mapping[str, Any], number: int) -> PopeQuestion:
    """A row of a question file: POPE's own (image, label), lmms-lab's (image_source, answer) or shapeworld's (image_path, chosen)."""
    label, image = first_of(row, LABEL_NAMES), first_of(row, IMAGE_NAMES)
    truth = {"yes": True, "no": False}.get(str(label).strip(" .").lower())
    if truth is None:
        raise ValueError(f"--questions, row {number}: the label is {label!r}, want yes or no in one of {', '.join(LABEL_NAMES)}")
    if image is None:
        raise ValueError(f"--questions, row {number}: found no image name in {', '.join(IMAGE_NAMES)}; intervals are over images")
    return PopeQuestion(str(image), truth, first_of(row, ("category", "kind")))


def says_yes(answer: str) -> bool:
    """POPE's rule: an answer is yes unless its first sentence has one of the words no and not."""
    return not NO_WORDS.intersection(_first_sentence(answer).split(" "))


def is_unclear(answer: str) -> bool:
    """Whether the first sentence, in any case, has neither yes nor a word that says no."""
    return not {"yes", "no", "not"}.intersection(_first_sentence(answer).lower().split())


def _first_sentence(answer: str) -> str:
    return answer.split(".")[0].replace(",", "")


def count_outcomes(said_yes: Sequence[bool], is_yes: Sequence[bool]) -> np.ndarray:
    """(N, 4) ones and zeros: OUTCOMES of each question; a row has one 1."""
    said, truth = np.array(said_yes, dtype=bool), np.array(is_yes, dtype=bool)
    return np.stack([said & truth, said & ~truth, ~said & ~truth, ~said & truth], axis=1).astype(float)


def count_answers(answers: Sequence[str], questions: Sequence[PopeQuestion]) -> ImageCounts:
    """COUNTS of the answers to N questions."""
    outcomes = count_outcomes([says_yes(answer) for answer in answers], [question.is_yes for question in questions])
    rest = [(is_unclear(answer), len(answer.split())) for answer in answers]
    return ImageCounts.of_answers(COUNTS, np.hstack([outcomes, np.array(rest, dtype=float)]), [question.image for question in questions])


def pope_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Of sums (..., 6) of COUNTS: accuracy, precision, recall, f1, yes_ratio as fractions, words per answer; 0 where a denominator is 0.

    false_yes: share of the absent objects that are said to be there, which is what hallucination is here.
    """
    tp, fp, tn, fn, _, words = np.moveaxis(sums, -1, 0)
    total = tp + fp + tn + fn
    return {
        "accuracy": divide(tp + tn, total),
        "precision": divide(tp, tp + fp),
        "recall": divide(tp, tp + fn),
        "f1": divide(2 * tp, 2 * tp + fp + fn),  # 2 P R / (P + R)
        "yes_ratio": divide(tp + fp, total),
        "false_yes": divide(fp, fp + tn),
        "words": divide(words, total),
    }
