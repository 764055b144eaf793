"""Scored answers -> preference pairs, as RLAIF-V selects them (arXiv:2405.17220, section 3.2), without its instabilities.

    answers of a prompt --candidate_pairs--> all pairs with a score gap --cap_pairs--> at most 2 --balance_lengths, over all prompts-->

Everything is a pure function of texts, scores and a seed; an answer is named by its number, its place in the list it came in.
"""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, TypeVar

LENGTH_RATIOS = tuple(step * 0.02 for step in range(50))  # what the search tries: 0, 0.02, ..., 0.98


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer of a prompt; score is None when it could not be judged or states nothing."""

    text: str
    score: int | None


@dataclass(frozen=True)
class NumberedPair:
    """Two answers of a prompt by number, and their texts."""

    chosen_number: int
    rejected_number: int
    chosen: str
    rejected: str


class Texts(Protocol):
    """Anything with a chosen and a rejected text."""

    @property
    def chosen(self) -> str:
        """The preferred answer."""
        ...

    @property
    def rejected(self) -> str:
        """The other answer."""
        ...


Pair = TypeVar("Pair", bound=Texts)


def candidate_pairs(answers: Sequence[ScoredAnswer], min_score_gap: int = 1) -> list[NumberedPair]:
    """All pairs of a prompt's answers whose scores differ by at least `min_score_gap`, in order of their numbers.

    An answer without a score is in none. Of answers with equal texts only the first counts, so that no text meets itself and no pair of
    texts occurs twice (RLAIF-V utils/pair_construction.py:36-79 keeps the latter).
    """
    if min_score_gap < 1:
        raise ValueError(f"--min_score_gap {min_score_gap} must be at least 1: equal scores say nothing about the order")
    distinct: dict[str, int] = {}
    for number, answer in enumerate(answers):
        if answer.score is not None:
            distinct.setdefault(answer.text.strip(), number)
    pairs = []
    for first, second in combinations(distinct.values(), 2):
        if abs(answers[first].score - answers[second].score) >= min_score_gap:
            chosen, rejected = (first, second) if answers[first].score > answers[second].score else (second, first)
            pairs.append(NumberedPair(chosen, rejected, answers[chosen].text, answers[rejected].text))
    return pairs


def cap_pairs(pairs: Sequence[Pair], limit: int, seed: int, prompt: Hashable) -> list[Pair]:
    """At most `limit` of a prompt's pairs, drawn without replacement by (seed, prompt); in their order."""
    if len(pairs) <= limit:
        return list(pairs)
    kept = random.Random(f"{seed}/{prompt}").sample(range(len(pairs)), limit)
    return [pairs[number] for number in sorted(kept)]


def balance_lengths(pairs: Sequence[Pair]) -> list[Pair]:
    """Leave out the pairs whose chosen answer is much the shorter one, as many as make mean lengths of chosen and rejected most alike.

    Keeps pairs with (rejected words - chosen words) / rejected words <= r, for the r in 0, 0.02, ..., 0.98 that minimises
    |mean chosen - mean rejected| / mean rejected; the smallest such r at ties (utils/get_pairs_filter_shorten.py:50-79).
    A ratio that leaves nothing is passed over, where the original divides by zero; if all do, there are no pairs.
    """
    best: list[Pair] = []
    best_imbalance = float("inf")
    shortening = [_shortening(pair) for pair in pairs]
    for ratio in LENGTH_RATIOS:
        kept = [pair for pair, value in zip(pairs, shortening, strict=True) if value <= ratio]
        if kept and (imbalance := length_imbalance(kept)) < best_imbalance:
            best, best_imbalance = kept, imbalance
    return best


def length_imbalance(pairs: Sequence[Texts]) -> float:
    """|mean chosen - mean rejected| / mean rejected, in words."""
    chosen, rejected = mean_lengths(pairs)
    return abs(chosen - rejected) / rejected


def mean_lengths(pairs: Sequence[Texts]) -> tuple[float, float]:
    """Mean words of chosen and of rejected; needs a pair."""
    words = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in pairs]
    chosen, rejected = zip(*words, strict=True)
    return sum(chosen) / len(words), sum(rejected) / len(words)


def _shortening(pair: Texts) -> float:
    chosen, rejected = len(pair.chosen.split()), len(pair.rejected.split())
    return (rejected - chosen) / rejected
