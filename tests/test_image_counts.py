"""Paired differences and results on disk, against resampling image by image."""

import json

import numpy as np
import pytest

from muffin.image_counts import ImageCounts, estimate_counts, paired_differences, result_of, write_result


def share(sums):
    """Of two columns, bad and all, in percent."""
    return {"bad": 100 * sums[..., 0] / sums[..., 1]}


def counts_of(bad, images, answers=1.0):
    return ImageCounts.of_answers(("bad", "all"), np.stack([bad, np.full(len(bad), answers)], axis=1), images)


def test_answers_to_one_image_are_added_up():
    counts = counts_of([1, 0, 1], ["b", "a", "b"])
    assert counts.images == ("b", "a") and counts.counts.tolist() == [[2, 2], [0, 1]]
    assert counts.sums.tolist() == [2, 3]
    assert counts.only(["a"]).counts.tolist() == [[0, 1]]
    (found,) = estimate_counts(counts, share).values()
    assert found.value == pytest.approx(200 / 3) and (found.low, found.high) == (0, 100)


def test_differences_are_of_the_same_images():
    """Two policies that differ by one answer: the images differ a lot, the policies do not."""
    rng = np.random.default_rng(0)
    bad = (rng.random(200) < 0.4).astype(float)
    better = bad.copy()
    better[np.flatnonzero(bad)[:8]] = 0
    images = [f"{number}.jpg" for number in range(200)]
    shuffled = rng.permutation(200)
    second = counts_of(better[shuffled], [images[number] for number in shuffled])  # in another order
    found = paired_differences(counts_of(bad, images), second, share)["bad"]
    assert found.first == pytest.approx(100 * bad.mean()) and found.second == pytest.approx(100 * better.mean())
    assert found.change.value == pytest.approx(-4)
    draws = np.random.default_rng(1).integers(0, 200, size=(20_000, 200))
    expected = np.percentile(100 * (better[draws].mean(1) - bad[draws].mean(1)), [2.5, 97.5])
    assert [found.change.low, found.change.high] == pytest.approx(expected, abs=0.51)  # one image is 0.5
    alone = estimate_counts(counts_of(bad, images), share)["bad"]
    assert found.change.high - found.change.low < 0.5 * (alone.high - alone.low)


def test_images_that_one_lacks_do_not_count():
    first = counts_of([1, 1, 0], ["a", "b", "c"])
    second = counts_of([0, 1], ["b", "d"])
    found = paired_differences(first, second, share)["bad"]
    assert (found.first, found.second, found.change.value) == (100, 0, -100)
    with pytest.raises(ValueError, match="no image in common: the first is about a"):
        paired_differences(first, counts_of([0], ["d"]), share)
    with pytest.raises(ValueError, match="count different things: bad, all against worse, all"):
        paired_differences(first, ImageCounts(("worse", "all"), ("a",), np.ones((1, 2))), share)


def test_results_survive_the_disk(tmp_path):
    counts = counts_of([1, 0.5, 0], ["a", "b \u00e9", "c"], answers=2.0)
    result = {"benchmark": "x"} | result_of(estimate_counts(counts, share), counts)
    write_result(tmp_path / "new" / "result.json", result)
    stored = json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8"))
    assert stored == result
    assert stored["bad"] == 25 and stored["intervals_over"] == "3 images"
    again = ImageCounts.from_json(stored["per_image"])
    assert again.images == counts.images and (again.counts == counts.counts).all()
    assert "   [1.0, 2.0],\n" in (tmp_path / "new" / "result.json").read_text()  # an image is a line
