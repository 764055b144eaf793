"""The choice of a checkpoint, by hand."""

import json
from pathlib import Path

import pytest

from muffin.checkpoint_choice import Measured, choose, doubt, read_measured

START = Measured("start", 50.0, 4.0)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([("a", 40, 3.9), ("b", 20, 3.6), ("c", 5, 1.0)], "b"),  # 3.6 = 0.9 * 4.0 is enough, 1.0 is not
        ([("a", 20, 3.7), ("b", 20, 3.9), ("c", 20, 3.9)], "b"),  # of equals the more capable, then the earlier
        ([("a", 0, 0.5), ("b", 60, 3.5), ("c", 1, 3.5)], "b"),  # none is capable enough: the most capable, the earlier
        ([("a", 70, 4.5)], "a"),  # worse than the start, but the only one
    ],
)
def test_the_least_hallucination_among_the_capable(candidates, chosen):
    assert choose(START, [Measured(*each) for each in candidates], min_capability=0.9).name == chosen


def test_without_a_floor_the_silent_one_wins():
    assert choose(START, [Measured("a", 20, 3.9), Measured("mute", 0, 0.0)], min_capability=0.0).name == "mute"


def test_numbers_come_from_results(tmp_path: Path):
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"rejected_share": 12.5, "accepted_claims": 3.0, "words": 9}))
    assert read_measured("x", file, "labeler") == Measured("x", 12.5, 3.0)
    file.write_text(json.dumps({"results": {"chair": {"chair_s": 30.0, "recall": 80.0}}}))
    assert read_measured("x", file, "chair") == Measured("x", 30.0, 80.0)
    with pytest.raises(ValueError, match="holds no CHAIR of amber"):
        read_measured("x", file, "amber")


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ((50.0, 4.0), "measures exactly as the round's start"),
        ((10.0, 3.5), "keeps less than 0.9 of the start's capability"),  # 3.5 < 3.6
        ((50.0, 3.9), "hallucinates no less"),
        ((49.9, 3.6), None),
    ],
)
def test_what_is_doubtful_about_a_choice(chosen, said):
    found = doubt(START, Measured("checkpoint-3", *chosen), min_capability=0.9)
    assert found is None if said is None else said in found
