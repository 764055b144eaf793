"""The rules that take English answers apart."""

import pytest

from muffin.claims import Claim, split_by_rules

QUESTION = "What is there?"


def claims(answer: str) -> list[tuple[str, str]]:
    split = split_by_rules(QUESTION, answer)
    assert all(claim.question.endswith("? Please answer yes or no.") for claim in split)
    return [(claim.text, claim.question.removesuffix(" Please answer yes or no.")) for claim in split]


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("There are two dogs on the beach.", "Are there two dogs on the beach?"),
        ("The image depicts a Man on a horse.", "Does the image depict a Man on a horse?"),
        ("The dog is brown", "Is the dog brown?"),
        ("The woman in the red car is driving fast!", "Is the woman in the red car driving fast?"),
        ("They have been waiting.", "Have they been waiting?"),
        ("No, the cat can see it.", "Can the cat see it?"),
        ("There is no dog.", "Is there no dog?"),
        ("The man who is surfing wears a hat.", "Is it true that the man who is surfing wears a hat?"),
        ("In the background, there is a bus.", "Is it true that in the background, there is a bus?"),
        ("Mr. Smith holds 3.5 kg of apples.", "Is it true that Mr. Smith holds 3.5 kg of apples?"),
        ("Red", 'Is "Red" the right answer to the question "What is there?"?'),
        ("Yes.", 'Is "Yes" the right answer to the question "What is there?"?'),
    ],
)
def test_a_claim_becomes_a_question(answer, question):
    assert claims(answer) == [(answer, question)]


def test_sentences_clauses_and_lists():
    answer = """There is a dog on the beach, and a cat is sleeping beside it. The sky is blue; it is noon.

    Details:
    1. The ball is red.
    - There are people walking while others sit, and a frisbee in the air.
    ...
    Is it nice? "It is." The end is near."""
    assert [text for text, _ in claims(answer)] == [
        "There is a dog on the beach",
        "a cat is sleeping beside it.",
        "The sky is blue",
        "it is noon.",
        "The ball is red.",
        "There are people walking while others sit, and a frisbee in the air.",
        '"It is.',
        "The end is near.",
    ]


def test_claims_said_twice_are_two():
    assert (
        split_by_rules("", "The dog is red. The dog is red.") == [Claim("The dog is red.", "Is the dog red? Please answer yes or no.")] * 2
    )


@pytest.mark.parametrize("answer", ["", " \n", "...", "What is it?", "Objects:"])
def test_nothing_stated(answer):
    assert split_by_rules(QUESTION, answer) == []
