"""MMHal-Bench: reading grades, and the scores of grades by hand."""

import json
from collections import Counter

import pytest

from muffin.image_counts import estimate_counts
from muffin.mmhal import TYPES, GradedQuestion, count_ratings, grading_prompt, mmhal_scores, parse_question, parse_rating, undefined_scores


@pytest.mark.parametrize(
    ("review", "rating"),
    [
        ("The answer agrees with what is known.\nRating: 6", 6),
        ("RATING: 0", 0),
        ("**Rating:** 4", 4),
        ("Rating: **3**", 3),
        ("Rating: <2>", 2),
        ("Rating: 5/6", 5),
        ("Rating: 4.", 4),
        ("A rating: 1 would be for invention, which this is not.\n\nRating: 5\n", 5),  # 0 by the authors' script, which sees two
        ("Rating: 3\nThank you.", 3),
        ("I would give it 4 of 6.", None),
        ("Rating: good", None),
        ("Rating: 7", None),
        ("Rating: 10", None),
        ("Rating: -1", None),
        ("Rating: 3.5", None),
        ("Rating: 4, or rather rating: 3", None),
        ("Rating:", None),
        ("", None),
    ],
)
def test_grades_are_read(review, rating):
    assert parse_rating(review) == rating


def question(kind, answer="one two three", image=None):
    return GradedQuestion(image or kind, kind, "What?", ("Cat",), "A cat.", answer)


def test_scores_by_hand():
    questions = [question("attribute"), question("counting", "one"), question("attribute", image="b"), question("other"), question("other")]
    counts = count_ratings(questions, [6, 2, 3, 0, None])
    assert counts.images == ("attribute", "counting", "b", "other")
    values = {name: each.value for name, each in estimate_counts(counts, mmhal_scores).items()}
    # grades 6 2 3 0: mean 11 / 4; below 3: two of four; informative 3 2 0 0 of 3 each: 5 / 4 / 3; words 3 1 3 3
    expected = {"score": 11 / 4, "hallucination_rate": 50, "informativeness": 100 * 5 / 12, "words": 10 / 4}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert (values["score attribute"], values["score counting"], values["score other"]) == (4.5, 2, 0)
    assert undefined_scores(counts) == {f"score {kind}" for kind in TYPES if kind not in ("attribute", "counting", "other")}
    with pytest.raises(ValueError, match="none of the 1 answers has a grade"):
        count_ratings([question("other")], [None])


def test_the_judge_sees_what_is_known_and_the_answer():
    prompt = grading_prompt(GradedQuestion("i", "other", "What {is} it?", ("Cat", "Dog"), "A cat.", "A {dog}."))
    for part in ("Cat, Dog", "What {is} it?", "A cat.", "A {dog}.", "Rating: <0 to 6>"):
        assert part in prompt
    assert "not listed" in grading_prompt(GradedQuestion("i", "other", "What?", (), "A cat.", "")) and "(the assistant said nothing)"


def test_rows_are_checked():
    row = {"question": "What?", "gt_answer": "A cat.", "image_src": "http://x/y.jpg"}
    assert parse_question(row, 9, "a") == GradedQuestion("http://x/y.jpg", "adversarial", "What?", (), "A cat.", "a")  # type 9 % 8
    with pytest.raises(ValueError, match="row 3 has no gt_answer"):
        parse_question({"question": "What?"}, 3, "a")
    with pytest.raises(ValueError, match="row 3: question_type is 'new', want one of attribute"):
        parse_question(row | {"question_type": "new"}, 3, "a")


def test_every_question_is_readable(samples):
    rows = json.loads((samples / "mmhal" / "mmhal-bench_answer_template.json").read_text())
    questions = [parse_question(row, number, "No idea.") for number, row in enumerate(rows)]
    assert Counter(each.kind for each in questions) == dict.fromkeys(TYPES, 12)
    assert all(each.kind == TYPES[number % 8] for number, each in enumerate(questions))
    assert len({each.image for each in questions}) == 96
    assert all(each.reference in grading_prompt(each) for each in questions)
