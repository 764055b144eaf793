"""POPE (Li et al. 2023, arXiv:2305.10355): yes/no questions about objects, as many present as absent; positive means yes.

An answer is read as the authors' evaluate.py reads it: in its first sentence, commas dropped, one of the words No, no, not says no;
everything else, junk included, says yes. `unclear` counts what neither names yes nor no, so that junk shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from muffin.answers import IMAGE_NAMES, first_of
from muffin.hallucination import Ratio

NO_WORDS = {"No", "no", "not"}
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
    return not NO_WORDS.intersection(_first_sentence(answer).split(" "))


def is_unclear(answer: str) -> bool:
    """Whether the first sentence, in any case, has neither yes nor a word that says no."""
    return not {"yes", "no", "not"}.intersection(_first_sentence(answer).lower().split())


def _first_sentence(answer: str) -> str:
    return answer.split(".")[0].replace(",", "")


def count_outcomes(said_yes: Sequence[bool], is_yes: Sequence[bool]) -> np.ndarray:
    """(N, 4) ones and zeros: tp, fp, tn, fn of each question; a row has one 1."""
    said, truth = np.array(said_yes, dtype=bool), np.array(is_yes, dtype=bool)
    return np.stack([said & truth, said & ~truth, ~said & ~truth, ~said & truth], axis=1).astype(float)


def pope_ratios(outcomes: np.ndarray) -> dict[str, Ratio]:
    """accuracy, precision, recall, f1, yes_ratio, as fractions, of `count_outcomes`; 0 where a denominator is 0."""
    tp, fp, tn, fn = outcomes.T
    total = outcomes.sum(axis=1)
    return {
        "accuracy": Ratio(tp + tn, total, scale=1.0),
        "precision": Ratio(tp, tp + fp, scale=1.0),
        "recall": Ratio(tp, tp + fn, scale=1.0),
        "f1": Ratio(2 * tp, 2 * tp + fp + fn, scale=1.0),  # 2 P R / (P + R) in one ratio
        "yes_ratio": Ratio(tp + fp, total, scale=1.0),
    }
