"""RefoMB: reading choices, and win rates of verdicts by hand in both orders."""

import json

import pytest

from muffin.image_counts import estimate_counts
from muffin.refomb import (
    ComparedAnswer,
    Verdict,
    comparison_prompt,
    count_verdicts,
    hallucination_prompt,
    parse_choice,
    parse_question,
    points_of,
    refomb_scores,
    undefined_scores,
)


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A is right about the dog.\nChoice: A", "first"),
        ("choice: b", "second"),
        ("**Choice:** C", "tie"),
        ("Choice: <B>", "second"),
        ("Choice: Assistant B.", "second"),
        ("Choice: A would be hasty.\nChoice: B", "second"),
        ("Choice: A, or choice: B", None),
        ("Choice: D", None),
        ("Choice: neither", None),
        ("B", None),
        ("", None),
    ],
)
def test_choices_are_read(reply, choice):
    assert parse_choice(reply) == choice


def test_points_are_the_policys():
    """As published GPT-4V comes first, so "A" is a loss; with the places swapped it is a win."""
    assert [points_of(choice, "published") for choice in ("first", "second", "tie", None)] == [0, 1, 0.5, None]
    assert [points_of(choice, "swapped") for choice in ("first", "second", "tie", None)] == [1, 0, 0.5, None]


def question(image, answer="two words"):
    return ComparedAnswer(image, "What {is} it?", "A {cat} on a mat.", "A cat, of course.", answer)


def test_places_in_the_prompt():
    published, swapped = (comparison_prompt(question("i"), order) for order in ("published", "swapped"))
    assert published.index("A cat, of course.") < published.index("two words")
    assert swapped.index("two words") < swapped.index("A cat, of course.")
    assert all("A {cat} on a mat." in prompt and "What {is} it?" in prompt for prompt in (published, swapped))
    assert "(the assistant said nothing)" in comparison_prompt(question("i", ""), "published")
    assert "my {review}" in hallucination_prompt("my {review}")


def test_scores_by_hand():
    verdicts = [
        {"published": Verdict(1.0, 1.0), "swapped": Verdict(0.0, None)},
        {"published": Verdict(0.5, 0.5), "swapped": Verdict(0.5, 1.0)},
        {"published": Verdict(0.0, None), "swapped": Verdict(None, None)},
        {"published": Verdict(None, None), "swapped": Verdict(None, None)},
    ]
    counts = count_verdicts([question(image) for image in "abcd"], verdicts)
    assert counts.images == ("a", "b", "c")  # d is missing, not lost
    values = {name: each.value for name, each in estimate_counts(counts, refomb_scores).items()}
    assert values == pytest.approx(
        {
            "win_rate": 100 * 1.5 / 3,
            "hall_win_rate": 100 * 1.5 / 2,
            "win_rate_swapped": 100 * 0.5 / 2,
            "hall_win_rate_swapped": 100 * 1.0 / 1,
            "win_rate_balanced": 100 * (0.5 + 0.5) / 2,  # a: won and lost, b: tied twice
            "same_verdict": 50,
            "words": 2,
            "words_of_gpt4v": 4,
        }
    )
    assert undefined_scores(counts) == set()
    published = count_verdicts([question("a")], [{"published": Verdict(1.0, None)}])
    assert undefined_scores(published) == {
        "hall_win_rate",
        "win_rate_swapped",
        "hall_win_rate_swapped",
        "win_rate_balanced",
        "same_verdict",
    }
    with pytest.raises(ValueError, match="none of the 1 questions has a verdict"):
        count_verdicts([question("a")], [{"published": Verdict(None, 1.0)}])


def test_every_question_is_readable(samples):
    rows, answers = (
        [json.loads(line) for line in (samples / "refomb" / name).read_text().splitlines()]
        for name in ("RefoMB_dev.jsonl", "gpt4v_RefoMB_dev_0521.jsonl")
    )
    pairs = zip(rows, answers, strict=True)
    questions = [parse_question(row, number, other["answer"], "No idea.") for number, (row, other) in enumerate(pairs)]
    assert len(questions) == 99
    assert all(each.description in comparison_prompt(each, "swapped") and each.reference for each in questions)
    with pytest.raises(ValueError, match="--questions, row 4 has no description"):
        parse_question({"image_url": "u", "question": "q"}, 4, "", "")
