"""Pairs from scores, by hand; the length balance against a plain search over every ratio."""

from dataclasses import dataclass
from fractions import Fraction

import pytest

from muffin.pair_selection import (
    LENGTH_RATIOS,
    NumberedPair,
    ScoredAnswer,
    balance_lengths,
    candidate_pairs,
    cap_pairs,
    length_imbalance,
    mean_lengths,
)


def numbers(answers: list[tuple[str, int | None]], gap: int = 1) -> list[tuple[int, int]]:
    pairs = candidate_pairs([ScoredAnswer(*answer) for answer in answers], gap)
    assert all((pair.chosen, pair.rejected) == (answers[pair.chosen_number][0], answers[pair.rejected_number][0]) for pair in pairs)
    return [(pair.chosen_number, pair.rejected_number) for pair in pairs]


def test_every_two_answers_with_a_score_gap_are_a_pair():
    answers = [("a", -1), ("b", 0), ("c", -3), ("d", -1)]
    assert numbers(answers) == [(1, 0), (0, 2), (1, 2), (1, 3), (3, 2)]
    assert numbers(answers, gap=2) == [(0, 2), (1, 2), (3, 2)]
    assert numbers(answers, gap=4) == []


def test_answers_without_a_score_are_in_no_pair():
    assert numbers([("a", None), ("b", 0), ("c", -1), ("", None)]) == [(1, 2)]
    assert numbers([("a", None), ("b", None)]) == []
    assert numbers([]) == []


def test_equal_texts_count_once():
    """ "a" is there three times: it never meets itself, and (a, b) is one pair."""
    assert numbers([("a", 0), ("b", -2), (" a\n", 0), ("a", -1)]) == [(0, 1)]
    assert numbers([("b", -2), ("a", None), ("a", 0)]) == [(2, 0)], "the first with a score"


def test_gap_of_zero_is_refused():
    with pytest.raises(ValueError, match="--min_score_gap 0"):
        candidate_pairs([], 0)


# --- cap


def test_cap_draws_by_seed_and_prompt():
    pairs = candidate_pairs([ScoredAnswer(str(number), -number) for number in range(6)])
    assert len(pairs) == 15
    assert cap_pairs(pairs, 15, 0, 7) == cap_pairs(pairs, 99, 0, 7) == pairs
    drawn = {(seed, prompt): tuple(map(pairs.index, cap_pairs(pairs, 3, seed, prompt))) for seed in range(20) for prompt in range(20)}
    assert drawn == {key: tuple(map(pairs.index, cap_pairs(pairs, 3, *key))) for key in drawn}
    assert all(len(set(chosen)) == 3 and list(chosen) == sorted(chosen) for chosen in drawn.values())
    assert len(set(drawn.values())) > 100, "seed and prompt both matter: 455 sets are possible"
    counts = [sum(number in chosen for chosen in drawn.values()) for number in range(15)]
    assert min(counts) > 50 and max(counts) < 110, "400 draws of 3 from 15: 80 each, standard deviation 8"


# --- length balance


@dataclass(frozen=True)
class WordPair:
    """A pair of answers of so many words."""

    chosen_words: int
    rejected_words: int

    @property
    def chosen(self) -> str:
        return " ".join("c" * self.chosen_words)

    @property
    def rejected(self) -> str:
        return " ".join("r" * self.rejected_words)


def test_balance_by_hand():
    """Shortening 0.5, 0.1, 0, -0.25. Kept at r = 0: (10, 10), (10, 8), imbalance 1/9. At r = 0.1: with (9, 10), means 29/3 and 28/3,
    imbalance 1/28. At r = 0.5: all four, means 34/4 and 38/4, imbalance 4/38. The middle one wins."""
    pairs = [WordPair(5, 10), WordPair(9, 10), WordPair(10, 10), WordPair(10, 8)]
    assert balance_lengths(pairs) == pairs[1:]
    assert mean_lengths(pairs[1:]) == pytest.approx((29 / 3, 28 / 3))
    assert length_imbalance(pairs[1:]) == pytest.approx(1 / 28)


def test_strictest_ratio_wins_ties():
    """r = 0 keeps (11, 10), imbalance 1/10; r = 0.3 keeps both, means 9 and 10, imbalance 1/10."""
    assert balance_lengths([WordPair(11, 10), WordPair(7, 10)]) == [WordPair(11, 10)]
    assert balance_lengths([WordPair(12, 10), WordPair(7, 10)]) == [WordPair(12, 10), WordPair(7, 10)], "2/10 against 1/20"


def test_ratios_that_leave_nothing_are_passed_over():
    """RLAIF-V's search divides by zero here: at r = 0 no pair is left."""
    assert balance_lengths([WordPair(5, 10), WordPair(4, 10)]) == [WordPair(5, 10)]
    assert balance_lengths([]) == []
    assert balance_lengths([WordPair(1, 200)]) == [], "shortened by more than 0.98, the last ratio"


def test_balance_equals_a_plain_search():
    """Exact fractions over the fifty ratios, on mixtures where every ratio leaves a pair: there the original is right, too."""
    state = 1
    for case in range(30):
        pairs = [WordPair(10, 9)]
        for _ in range(2 + case):
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            pairs.append(WordPair(1 + state % 37, 1 + state // 37 % 41))
        results = []
        for hundredths in range(0, 100, 2):
            kept = [p for p in pairs if Fraction(p.rejected_words - p.chosen_words, p.rejected_words) <= Fraction(hundredths, 100)]
            chosen, rejected = sum(p.chosen_words for p in kept), sum(p.rejected_words for p in kept)
            results.append((abs(Fraction(chosen, len(kept)) - Fraction(rejected, len(kept))) / Fraction(rejected, len(kept)), kept))
        assert balance_lengths(pairs) == min(results, key=lambda result: result[0])[1]


def test_ratios():
    assert len(LENGTH_RATIOS) == 50 and LENGTH_RATIOS[0] == 0 and LENGTH_RATIOS[-1] == pytest.approx(0.98)


def test_numbered_pairs_hold_texts_as_they_are():
    assert candidate_pairs([ScoredAnswer(" a ", 0), ScoredAnswer("b", -1)]) == [NumberedPair(0, 1, " a ", "b")]
