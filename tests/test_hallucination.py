"""CHAIR counts, ratios and bootstrap intervals against numbers worked out by hand or by other means."""

import math

import numpy as np
import pytest

from muffin.hallucination import Ratio, bootstrap_interval, chair_ratios, claim_ratios, mean_words, wrong_claims


def test_chair_of_three_captions():
    # caption 1: 3 mentions, dog twice and wrong both times; covers cat of {cat}
    # caption 2: 2 mentions, both right; covers car and cat of {car, cat, tree}
    # caption 3: 1 mention, wrong; covers none of {cup}
    ratios = chair_ratios([["cat", "dog", "dog"], ["car", "cat"], ["fork"]], [{"cat"}, ["car", "cat", "tree"], {"cup"}])
    assert ratios["chair_i"].value == pytest.approx(100 * 3 / 6)
    assert ratios["chair_s"].value == pytest.approx(100 * 2 / 3)
    assert ratios["recall"].value == pytest.approx(100 * 3 / 5)
    assert ratios["chair_i"].numerators.tolist() == [2, 0, 1]
    assert ratios["chair_i"].denominators.tolist() == [3, 2, 1]
    assert ratios["chair_s"].numerators.tolist() == [1, 0, 1]
    assert ratios["recall"].numerators.tolist() == [1, 2, 0]


def test_chair_i_counts_mentions_and_recall_counts_objects():
    ratios = chair_ratios([["cat", "cat", "cat", "dog"]], [["cat", "cat"]])
    assert ratios["chair_i"].value == pytest.approx(25)  # 1 of 4 mentions; over distinct names it would be 50
    assert ratios["recall"].value == pytest.approx(100)  # one true object, however often it is listed or named


def test_a_caption_that_names_nothing_is_not_hallucinated_but_counts():
    ratios = chair_ratios([[], ["dog"]], [{"cat"}, {"cat"}])
    assert ratios["chair_s"].value == pytest.approx(50)
    assert ratios["chair_i"].value == pytest.approx(100)
    assert ratios["recall"].value == 0


def test_no_mentions_at_all_is_zero_not_an_error():
    ratios = chair_ratios([[], []], [{"cat"}, set()])
    assert {name: ratio.value for name, ratio in ratios.items()} == {"chair_s": 0, "chair_i": 0, "recall": 0}
    assert ratios["chair_i"].interval() == (0, 0)


def test_mentions_and_objects_must_be_of_the_same_captions():
    with pytest.raises(ValueError, match="zip"):
        chair_ratios([["cat"]], [{"cat"}, {"dog"}])


def test_wrong_claims_and_words():
    assert wrong_claims([[True, False], [], [False, False, True]]).value == pytest.approx(100 * 3 / 5)
    assert mean_words(["a red circle.", "", "no  such\nthing here"]).value == pytest.approx((3 + 0 + 4) / 3)


def test_answers_to_one_image_are_added_up():
    ratio = Ratio(np.array([1.0, 0, 2, 1]), np.array([2.0, 3, 4, 5])).per_image(["b", "a", "b", "c"])
    assert ratio.numerators.tolist() == [3, 0, 1]
    assert ratio.denominators.tolist() == [6, 3, 5]
    assert ratio.value == pytest.approx(100 * 4 / 14)
    assert Ratio(np.ones(2), np.ones(2), scale=1.0).per_image([0, 0]).scale == 1.0
    with pytest.raises(ValueError, match="3 image names for 2 answers"):
        Ratio(np.ones(2), np.ones(2)).per_image([0, 1, 2])


def test_repeated_answers_do_not_narrow_the_interval():
    """20 answers to each image say nothing more about the images than one does."""
    hits = (np.arange(100) < 30).astype(float)
    once = Ratio(hits, np.ones(100))
    repeated = Ratio(np.repeat(hits, 20), np.ones(2000))
    assert repeated.per_image(np.repeat(np.arange(100), 20).tolist()).interval() == pytest.approx(once.interval())
    low, high = repeated.interval()
    assert high - low < 0.5 * (once.interval()[1] - once.interval()[0])


def test_interval_of_a_mean_has_the_width_of_the_binomial():
    """The bootstrap of k successes in n is Binomial(n, k/n) / n exactly: its quantiles come from summing the probabilities."""
    n, k = 200, 50
    probabilities = [math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i) for i in range(n + 1)]
    cumulative = np.cumsum(probabilities)
    for level in (0.95, 0.8):
        exact = [np.searchsorted(cumulative, q) / n for q in ((1 - level) / 2, (1 + level) / 2)]
        found = bootstrap_interval((np.arange(n) < k).astype(float), np.ones(n), n_resamples=20_000, level=level)
        assert found == pytest.approx(exact, abs=1.01 / n)  # one success more or less


def test_interval_resamples_numerators_and_denominators_together():
    """Against drawing images one by one; a bootstrap of the two sums apart would be three times as wide."""
    rng = np.random.default_rng(5)
    denominators = rng.integers(1, 40, size=60).astype(float)
    numerators = np.floor(denominators * 0.3)
    draws = rng.integers(0, 60, size=(20_000, 60))
    expected = np.percentile(numerators[draws].sum(1) / denominators[draws].sum(1), [2.5, 97.5])
    found = bootstrap_interval(numerators, denominators, n_resamples=20_000)
    assert found == pytest.approx(expected, abs=0.001)
    assert found[1] - found[0] < 0.05


def test_interval_of_equal_images_is_a_point_and_seeds_repeat():
    assert bootstrap_interval(np.full(7, 2.0), np.full(7, 8.0)) == (0.25, 0.25)
    values = np.arange(9.0)
    assert bootstrap_interval(values, np.ones(9), seed=3) == bootstrap_interval(values, np.ones(9), seed=3)
    assert bootstrap_interval(values, np.ones(9), seed=3) != bootstrap_interval(values, np.ones(9), seed=4)


def test_percent_scales_value_and_interval_alike():
    ratio = Ratio(np.array([1.0, 0, 1, 0, 0]), np.ones(5))
    assert ratio.value == pytest.approx(40)
    low, high = bootstrap_interval(ratio.numerators, ratio.denominators)
    assert ratio.interval() == pytest.approx((100 * low, 100 * high))


@pytest.mark.parametrize(("numerators", "denominators"), [([], []), ([1.0], [1.0, 2.0])])
def test_interval_needs_images(numerators, denominators):
    with pytest.raises(ValueError, match=f"{len(numerators)} numerators and {len(denominators)} denominators"):
        bootstrap_interval(np.array(numerators), np.array(denominators))


def test_what_a_labeler_thinks_of_answers():
    ratios = claim_ratios([[True, False, False], [True], []])
    assert {name: ratio.value for name, ratio in ratios.items()} == {
        "rejected_claims": pytest.approx(2 / 3),
        "accepted_claims": pytest.approx(2 / 3),
        "rejected_share": pytest.approx(100 * 2 / 4),
        "rejected_answers": pytest.approx(100 / 3),
    }
