"""AMBER's arithmetic from the published formulas, worked out by hand: constants, rounding and the order in which words are compared."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest

from muffin.amber import (
    TYPES,
    Annotation,
    Lexicon,
    count_answers,
    description_counts,
    exact_answer,
    first_word_answer,
    published_generative,
    published_questions,
    question_counts,
    read_annotations,
    read_lexicon,
    same_word,
    score_answers,
    spacy_similarity,
    vocabulary_nouns,
)
from muffin.lemmas import MissingResource

LEXICON = Lexicon(
    {
        "sky": [],
        "person": ["man", "woman"],
        "woman": ["person", "girl"],
        "road": ["path", "street"],
        "ship": ["boat"],
        "cloud": [],
        "dog": ["puppy"],
        "bench": ["chair"],
        "light": [],
    },
    frozenset({"light"}),
)


def description(*truth, hallu=()):
    return Annotation(1, "generative", truth, hallu)


def counts(nouns, annotation, alike=same_word):
    return description_counts(nouns, annotation, LEXICON, alike).tolist()


def test_counts_of_a_description():
    # man stands for person, path for road; cloud and dog are invented, both are traps; camel is in no list; light is safe but counted
    nouns = ["man", "path", "cloud", "dog", "light", "camel", "man"]
    annotation = description("sky", "person", "road", hallu=("cloud", "dog", "bench"))
    assert counts(nouns, annotation) == [2, 6, 2, 3, 2, 3, 0, 1]


def test_a_clean_description():
    assert counts(["sky", "light"], description("sky", hallu=("cloud",))) == [0, 2, 1, 1, 0, 1, 1, 1]
    assert counts([], description("sky", "sky", hallu=("cloud",))) == [0, 0, 0, 2, 0, 1, 1, 1]


def test_associations_come_before_the_objects_themselves():
    """ "person" is first found as a word for woman, so woman is covered and person is not."""
    assert counts(["person"], description("woman", "person"))[2] == 1
    assert counts(["person", "man"], description("woman", "person"))[2] == 2
    assert counts(["person", "person"], description("woman", "person"))[2] == 1


def test_a_repeated_object_is_covered_once():
    assert counts(["ship", "ship"], description("ship", "ship")) == [0, 2, 1, 2, 0, 0, 1, 1]


def test_a_trap_that_is_also_there_is_no_hallucination():
    assert counts(["sky"], description("sky", hallu=("sky",))) == [0, 1, 1, 1, 0, 1, 1, 1]


def test_like_words():
    """ "boat" is like "ship"... and a trap may be met by an equal word and another one by a like word, as in the original."""
    pairs = {("street", "ship"), ("cloud", "sky"), ("dog", "puppy"), ("bench", "dog")}

    def alike(first, second):
        return first == second or (first, second) in pairs

    assert counts(["street"], description("ship"), alike) == [0, 1, 1, 1, 0, 0, 1, 1]
    assert counts(["cloud"], description("sky", hallu=("cloud",)), alike) == [0, 1, 1, 1, 1, 1, 1, 1]  # a trap, but like the sky
    assert counts(["bench"], description("sky", hallu=("dog", "bench")), alike) == [1, 1, 0, 1, 2, 2, 0, 1]
    assert counts(["street"], description("sky", hallu=("ship",)), alike) == [1, 1, 0, 1, 1, 1, 0, 1]


def test_published_numbers_of_descriptions():
    # 2 of 6 nouns: 100 * 2 / 6.001 = 33.328; 2 of 3: 66.644; 1 of 2 clean: 100 - 100 / 2.001 = 50.025; 1 of 3 traps: 33.322
    assert published_generative(np.array([2, 6, 2, 3, 1, 3, 1, 2.0])) == {"CHAIR": 33.3, "Cover": 66.6, "Hal": 50.0, "Cog": 33.3}
    # the constant shows in small sets: one clean description is 100 - 100 / 1.001 = 0.0999, and 1 of 1 covered is 99.9
    assert published_generative(np.array([0, 1, 1, 1, 0, 5, 1, 1.0])) == {"CHAIR": 0.0, "Cover": 99.9, "Hal": 0.1, "Cog": 0.0}
    assert published_generative(np.zeros(8)) == {"CHAIR": 0.0, "Cover": 0.0, "Hal": 100.0, "Cog": 0.0}


def question(truth, kind="discriminative-attribute-state"):
    return Annotation(2000, kind, truth, ())


def test_counts_of_a_question():
    # correct, questions, found_no, true_no, right_no, said_no
    assert question_counts("Yes", question("yes")).tolist() == [1, 1, 0, 0, 0, 0]
    assert question_counts("No", question("yes")).tolist() == [0, 1, 0, 0, 0, 1]
    assert question_counts("No", question("no")).tolist() == [1, 1, 1, 1, 1, 1]
    assert question_counts("Yes", question("no")).tolist() == [0, 1, 0, 1, 0, 0]
    assert question_counts("No.", question("no")).tolist() == [0, 1, 0, 1, 0, 0]  # only the exact strings are answers


def test_published_numbers_of_questions():
    # 3 of 5 right, 2 of 3 noes found, 2 of 3 said rightly
    sums = np.array([3, 5, 2, 3, 2, 3.0])
    # 300 / 5.001 = 59.988; 200 / 3.001 = 66.644; F1 of the ROUNDED .666 and .666: 2 * .443556 / 1.3321 = .665950
    assert published_questions(sums, 1, 0.0001) == {"accuracy": 60.0, "precision": 66.6, "recall": 66.6, "F1": 66.6}
    # three pooled types bring 0.003: 300 / 5.003 = 59.964; 200 / 3.003 = 66.600
    assert published_questions(sums, 3, 0.0001) == {"accuracy": 60.0, "precision": 66.6, "recall": 66.6, "F1": 66.6}
    one = np.array([1, 1, 1, 1, 1, 1.0])
    # 100 / 1.001 = 99.900; F1 with 0.0001: 2 * .998001 / 1.9981 = .998950 -> 99.9; with 0.001: 1.996002 / 1.999 = .998500
    assert published_questions(one, 1, 0.0001) == {"accuracy": 99.9, "precision": 99.9, "recall": 99.9, "F1": 99.9}
    # 100 / 1.003 = 99.701 -> 99.7; F1 = 2 * .994009 / 1.9941 = .996950 -> 99.7
    assert published_questions(one, 3, 0.0001) == {"accuracy": 99.7, "precision": 99.7, "recall": 99.7, "F1": 99.7}
    ten = np.array([7, 10, 2, 5, 2, 2.0])
    # precision 200 / 2.001 = 99.950 -> 100.0 (rounds up), recall 200 / 5.001 = 39.992 -> 40.0
    # F1: 2 * 1 * .4 / 1.4001 = .571388 -> 57.1; with 0.001: .8 / 1.401 = .571021 -> 57.1; 700 / 10.001 = 69.993
    assert published_questions(ten, 1, 0.001) == {"accuracy": 70.0, "precision": 100.0, "recall": 40.0, "F1": 57.1}
    assert published_questions(np.array([1, 1, 0, 0, 0, 0.0]), 1, 0.0001) == {"accuracy": 99.9, "precision": 0.0, "recall": 0.0, "F1": 0.0}


def count(answers, images):
    return count_answers(answers, images, vocabulary_nouns(LEXICON), LEXICON, same_word, exact_answer)


def test_answers_of_all_kinds():
    answers = [
        (Annotation(1, "generative", ("sky", "road"), ("cloud",)), "A puppy on the street."),  # dog's puppy is invented, road covered
        (Annotation(2, "discriminative-hallucination", "no", ()), "No"),
        (Annotation(3, "discriminative-attribute-state", "yes", ()), "Yes"),
        (Annotation(4, "discriminative-attribute-number", "no", ()), "Yes"),
        (Annotation(5, "relation", "no", ()), "No"),
        (Annotation(6, "discriminative-relation", "yes", ()), "No"),
    ]
    scores = score_answers(count(answers, ["1", "1", "2", "2", "3", "3"]))
    values = {name: each.value for name, each in scores.items()}
    # 1 of 2 nouns: 100 / 2.001 = 49.975; 1 of 2 truths; not clean: 100 - 0; no trap met
    assert {name: values[name] for name in ("CHAIR", "Cover", "Hal", "Cog")} == {"CHAIR": 50.0, "Cover": 50.0, "Hal": 100.0, "Cog": 0.0}
    # all: 3 of 5 right, 2 of 3 noes found, 2 of 3 noes right; see above
    assert [values[f"all {name}"] for name in ("accuracy", "precision", "recall", "F1")] == [60.0, 66.6, 66.6, 66.6]
    # relation: 1 of 2 right: 49.975; the one no found: 99.9; of two said one right: 50.0; F1 = 2 * .4995 / 1.4991 = .66640
    assert [values[f"relation {name}"] for name in ("accuracy", "precision", "recall", "F1")] == [50.0, 50.0, 99.9, 66.6]
    # attribute: 1 of 2 right, 100 / 2.003 = 49.925; no "no" was said
    assert [values[f"attribute {name}"] for name in ("accuracy", "precision", "recall", "F1")] == [49.9, 0.0, 0.0, 0.0]
    assert "action F1" not in values
    assert values["score"] == (100 - 50.0 + 66.6) / 2
    assert all(each.low <= each.high for each in scores.values())
    assert values["words"] == 5
    one_image = score_answers(count(answers, ["1"] * 6))
    assert one_image["all F1"].low == pytest.approx(one_image["all F1"].high) == pytest.approx(66.64, abs=0.02)  # not rounded


def test_parts_without_answers_are_left_out():
    assert set(score_answers(count([(question("yes"), "Yes")], ["1"]))) == {
        f"{part} {metric}" for part in ("all", "attribute", "state") for metric in ("accuracy", "precision", "recall", "F1")
    }
    assert set(score_answers(count([(description("sky"), "Sky.")], ["1"]))) == {"CHAIR", "Cover", "Hal", "Cog", "words"}


def test_answer_rules():
    assert [exact_answer(text) for text in ("Yes", "yes", "No.")] == ["Yes", "yes", "No."]
    assert [first_word_answer(text) for text in ("Yes", "yes, it is", "NO.", "It is", "", " no way")] == [
        "Yes",
        "Yes",
        "No",
        "It",
        "",
        "No",
    ]


def test_words_of_the_vocabulary():
    assert vocabulary_nouns(LEXICON)("Two WOMEN and a dog's puppies on streets, light blue camels.") == [
        "woman",
        "dog",
        "puppy",
        "street",
        "light",
    ]


def test_spacy_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(MissingResource, match="python -m spacy download en_core_web_lg"):
        spacy_similarity()


def test_similarity_must_exceed_the_published_threshold(monkeypatch):
    class Document:
        def __init__(self, word):
            self.word = word

        def similarity(self, other):
            return {("a", "b"): 0.81, ("a", "c"): 0.8}[self.word, other.word]

    spacy = ModuleType("spacy")
    spacy.load = {"en_core_web_lg": Document}.__getitem__
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    alike = spacy_similarity()
    assert alike("a", "b") is True and alike("a", "c") is False


def test_annotations_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "annotations.json"
    for row in ({"id": 1, "type": "generative", "truth": "yes"}, {"id": 1, "type": "other", "truth": "yes"}, {"id": 1, "type": TYPES[1]}):
        path.write_text(json.dumps([row]))
        with pytest.raises(ValueError, match=r"--annotations .*, row 0: found type"):
            read_annotations(path)


def test_every_annotation_is_readable(samples):
    folder = samples / "amber"
    annotations = read_annotations(folder / "annotations.json")
    lexicon = read_lexicon(folder / "relation.json", folder / "safe_words.txt")
    assert sorted(annotations) == list(range(1, 15221))
    found = {kind: sum(each.type == kind for each in annotations.values()) for kind in TYPES}
    assert found == {
        "generative": 1004,
        "discriminative-hallucination": 4924,
        "discriminative-attribute-state": 4764,
        "discriminative-attribute-number": 2072,
        "discriminative-attribute-action": 792,
        "discriminative-relation": 975,
        "relation": 689,
    }
    assert len(lexicon.safe) == 9 and "light" in lexicon.safe
    # The truth itself as the answer: every description names its objects once, every question is answered rightly.
    answers = [(each, " ".join(each.truth) if each.type == "generative" else each.truth.capitalize()) for each in annotations.values()]
    counts = count_answers(answers, list(map(str, annotations)), str.split, lexicon, same_word, exact_answer)
    values = {name: each.value for name, each in score_answers(counts).items()}
    assert (values["CHAIR"], values["Hal"]) == (0.0, 0.0)
    assert values["all accuracy"] == values["existence recall"] == values["all F1"] == 100.0
    assert values["score"] == 100.0
