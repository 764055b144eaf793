"""POPE: how answers are read, and the numbers of a confusion matrix worked out by hand."""

import pytest

from muffin.answers import answer_text, match_answers, read_rows
from muffin.image_counts import estimate_counts
from muffin.pope import PopeQuestion, count_answers, count_outcomes, is_unclear, parse_question, pope_scores, says_yes


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("No, there is a dog.", False),  # the comma is dropped before words are compared
        ("There is not a dog in the image.", False),
        ("Yes. There is no cat, though.", True),  # the first sentence only
        ("NO", True),  # the authors' rule knows No and no
        ("There isn't one", True),
        ("I cannot tell", True),  # junk says yes
        ("", True),
        ("None of them", True),
    ],
)
def test_answers_are_read_as_the_authors_read_them(answer, yes):
    assert says_yes(answer) is yes


def test_junk_is_counted():
    answers = ["I cannot tell", "", "NO", "yes.", "It is not there", "No, none", "No"]
    assert [is_unclear(answer) for answer in answers] == [True, True, False, False, False, False, False]


def test_outcomes_and_ratios_by_hand():
    said = [True, True, True, False, False, False, False, True]
    true = [True, True, False, False, False, False, True, True]
    outcomes = count_outcomes(said, true)
    assert outcomes.sum(axis=0).tolist() == [3, 1, 3, 1]  # tp, fp, tn, fn
    assert outcomes[2].tolist() == [0, 1, 0, 0] and outcomes[6].tolist() == [0, 0, 0, 1]


def test_scores_by_hand():
    answers = ["Yes", "yes, a red one", "Yes", "No", "No", "It is not", "No", "Maybe"]  # 13 words, the last is junk
    true = [True, True, False, False, True, False, True, True]
    images = ["a", "a", "a", "a", "b", "b", "b", "b"]
    counts = count_answers(answers, [PopeQuestion(image, truth, None) for image, truth in zip(images, true, strict=True)])
    assert counts.images == ("a", "b")
    assert counts.counts.tolist() == [[2, 1, 1, 0, 0, 7], [1, 0, 1, 2, 1, 6]]  # tp, fp, tn, fn, unclear, words
    expected = {"accuracy": 5 / 8, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 * 0.75 * 0.6 / 1.35, "yes_ratio": 4 / 8}
    assert pope_scores(counts.sums) == pytest.approx(expected | {"false_yes": 1 / 3, "words": 13 / 8})


def test_never_saying_yes_divides_by_nothing():
    counts = count_answers(["No", "No"], [PopeQuestion("a", True, None), PopeQuestion("a", False, None)])
    expected = {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0, "false_yes": 0, "words": 1}
    assert pope_scores(counts.sums) == expected
    precision = estimate_counts(counts, pope_scores)["precision"]
    assert (precision.low, precision.high) == (0, 0)


def test_rows_of_question_files():
    assert parse_question({"question_id": 1, "image": "a.jpg", "text": "Is there?", "label": "yes"}, 0) == PopeQuestion("a.jpg", True, None)
    assert parse_question({"image_source": "a", "answer": "No", "category": "popular"}, 0) == PopeQuestion("a", False, "popular")
    assert parse_question({"image_path": "a", "chosen": "No.", "kind": "random"}, 0) == PopeQuestion("a", False, "random")
    with pytest.raises(ValueError, match="row 7: the label is 'maybe', want yes or no"):
        parse_question({"image": "a", "label": "maybe"}, 7)
    with pytest.raises(ValueError, match="row 7: found no image name"):
        parse_question({"label": "yes"}, 7)


def test_the_published_numbers_of_llava(samples):
    """LLaVA-1.5-7B on the random split, by the authors' evaluate.py."""
    rows = read_rows(samples / "pope" / "coco_pope_random.json", "--questions")
    answers = match_answers(rows, read_rows(samples / "pope" / "llava15_7b_greedy_random.jsonl", "--answers"))
    questions = [parse_question(row, number) for number, row in enumerate(rows)]
    counts = count_answers([answer_text(row, "") for row in answers], questions)
    assert counts.sums.tolist() == [1150, 40, 1460, 350, 0, 3000]
    assert len(questions) == 3000 and len(counts.images) == 500
    estimates = estimate_counts(counts, pope_scores)
    rounded = {name: round(each.value, 4) for name, each in estimates.items()}
    published = {"accuracy": 0.87, "precision": 0.9664, "recall": 0.7667, "f1": 0.855, "yes_ratio": 0.3967}
    assert rounded == published | {"false_yes": round(40 / 1500, 4), "words": 1}
    assert all(each.low < each.value < each.high for name, each in estimates.items() if name != "words")
