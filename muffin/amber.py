"""AMBER (Wang et al. 2023, arXiv:2311.07397): descriptions checked against annotated objects, and yes/no questions.

The arithmetic is that of the authors' inference.py, constants and rounding included, since published numbers were made by it: counts
start at 0.001, numbers are rounded to one decimal in percent, F1 is of rounded precision and recall. In the yes/no part the positive
class is "no". Which nouns a description has, and which of two words are alike, are arguments: as published they are nltk's tagger and
spaCy's en_core_web_lg vectors (`wordnet_nouns`, `spacy_similarity`).
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muffin.hallucination import Estimate, divide
from muffin.image_counts import ImageCounts, estimate_counts
from muffin.lemmas import Lemmatizer, MissingResource, simple_lemmas

START = 0.001  # of every denominator
SIMILAR = 0.8
SPACY_MODEL = "en_core_web_lg"

Alike = Callable[[str, str], bool]

# Published names of the yes/no parts -> the annotations' types they pool, and the constant in the denominator of F1.
DIMENSIONS: dict[str, tuple[tuple[str, ...], float]] = {
    "existence": (("discriminative-hallucination",), 0.001),
    "attribute": (("discriminative-attribute-state", "discriminative-attribute-number", "discriminative-attribute-action"), 0.0001),
    "state": (("discriminative-attribute-state",), 0.0001),
    "number": (("discriminative-attribute-number",), 0.0001),
    "action": (("discriminative-attribute-action",), 0.0001),
    "relation": (("discriminative-relation", "relation"), 0.0001),
}
QUESTION_TYPES = tuple(dict.fromkeys(kind for kinds, _ in DIMENSIONS.values() for kind in kinds))
TYPES = ("generative", *QUESTION_TYPES)

GENERATIVE_COUNTS = ("hallucinated", "nouns", "covered", "truths", "cognitive", "traps", "clean", "descriptions")
QUESTION_COUNTS = ("correct", "questions", "found_no", "true_no", "right_no", "said_no")
# Of all answers: those of descriptions, those of every type of question, and words of descriptions.
COUNTS = (*GENERATIVE_COUNTS, *(f"{kind} {name}" for kind in QUESTION_TYPES for name in QUESTION_COUNTS), "words")
PARTS = {"generative": slice(0, 8)} | {kind: slice(8 + 6 * number, 14 + 6 * number) for number, kind in enumerate(QUESTION_TYPES)}


@dataclass(frozen=True)
class Annotation:
    """A row of annotations.json. truth: objects in the picture, or yes / no; hallu: objects that models tend to invent there."""

    id: int
    type: str
    truth: tuple[str, ...] | str
    hallu: tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """relation.json: object -> words that say the same or imply it; safe_words.txt: words that are never counted as hallucinated."""

    associations: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @property
    def words(self) -> set[str]:
        """The nouns that count."""
        return {word for key, values in self.associations.items() for word in (key, *values)}


def read_annotations(path: str | Path) -> dict[int, Annotation]:
    """annotations.json by id. Raises ValueError for a row that does not fit."""
    annotations = {}
    for number, row in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))):
        truth, kind = row.get("truth"), row.get("type")
        if kind not in TYPES or (kind == "generative") != isinstance(truth, list) or (kind != "generative" and truth not in ("yes", "no")):
            raise ValueError(f"--annotations {path}, row {number}: found type {kind!r} with truth {truth!r}; want AMBER's annotations.json")
        listed = tuple(truth) if isinstance(truth, list) else truth
        annotations[row["id"]] = Annotation(row["id"], kind, listed, tuple(row.get("hallu", ())))
    return annotations


def read_lexicon(relation: str | Path, safe_words: str | Path) -> Lexicon:
    """AMBER's files: relation.json (word -> words that name the same or a part of it), safe_words.txt (one per line)."""
    safe = Path(safe_words).read_text(encoding="utf-8").split("\n")
    return Lexicon(json.loads(Path(relation).read_text(encoding="utf-8")), frozenset(filter(None, map(str.strip, safe))))


# --- descriptions


def vocabulary_nouns(lexicon: Lexicon) -> Lemmatizer:
    """Words of the lexicon, plurals reduced, whatever part of speech they are: needs no data, counts the "light" of "light blue" too."""
    known = lexicon.words
    lemmas = simple_lemmas(known)
    return lambda text: [word for word in lemmas(text) if word in known]


def spacy_similarity() -> Alike:
    """Whether spaCy's vectors of two words have a similarity above 0.8. Raises MissingResource without spaCy or its model."""
    try:
        import spacy

        model = spacy.load(SPACY_MODEL)
    except (ImportError, OSError) as error:
        raise MissingResource(
            f"spaCy's vectors cannot be loaded ({error}); install them with: pip install spacy && python -m spacy download {SPACY_MODEL}"
        ) from error
    document = functools.cache(model)
    return functools.cache(lambda first, second: bool(document(first).similarity(document(second)) > SIMILAR))


def same_word(first: str, second: str) -> bool:
    """The rule without vectors."""
    return first == second


def description_counts(nouns: Sequence[str], annotation: Annotation, lexicon: Lexicon, alike: Alike) -> np.ndarray:
    """GENERATIVE_COUNTS of one description (8,).

    A noun covers the first truth (or trap) that it names or is associated with, associations before the truths themselves; only then
    is it compared by `alike`. Safe words count as nouns and are never hallucinated.
    """
    known = lexicon.words
    nouns = [noun for noun in nouns if noun in known]
    truths = _named_by(annotation.truth, lexicon)
    traps = _named_by(annotation.hallu, lexicon)
    covered, cognitive, hallucinated = set(), set(), 0
    for noun in nouns:
        if noun in lexicon.safe:
            continue
        exact = _first(truths, lambda word, noun=noun: word == noun)
        if exact is not None:
            covered.add(exact)
            continue
        cognitive |= {_first(traps, lambda word, noun=noun: word == noun), _first(traps, lambda word, noun=noun: alike(noun, word))}
        similar = _first(truths, lambda word, noun=noun: alike(noun, word))
        if similar is None:
            hallucinated += 1
        else:
            covered.add(similar)
    found = len(cognitive - {None})
    clean = float(hallucinated == 0)
    return np.array([hallucinated, len(nouns), len(covered), len(annotation.truth), found, len(annotation.hallu), clean, 1], dtype=float)


def _named_by(objects: Sequence[str], lexicon: Lexicon) -> list[tuple[str, int]]:
    """(word, position of the object it stands for): associated words of all objects, then the objects."""
    associated = [(word, position) for position, name in enumerate(objects) for word in lexicon.associations[name]]
    return associated + [(name, position) for position, name in enumerate(objects)]


def _first(named: Sequence[tuple[str, int]], holds: Callable[[str], bool]) -> int | None:
    return next((position for word, position in named if holds(word)), None)


def published_generative(sums: np.ndarray) -> dict[str, float]:
    """CHAIR, Cover, Hal, Cog in percent from sums (8,) of GENERATIVE_COUNTS, rounded as published."""
    return {name: round(float(value), 1) for name, value in _generative(sums).items()}


def _generative(sums: np.ndarray) -> dict[str, np.ndarray]:
    hallucinated, nouns, covered, truths, cognitive, traps, clean, descriptions = np.moveaxis(sums, -1, 0)
    return {
        "CHAIR": hallucinated / (nouns + START) * 100,
        "Cover": covered / (truths + START) * 100,
        "Hal": 100 - clean / (descriptions + START) * 100,
        "Cog": cognitive / (traps + START) * 100,
    }


# --- yes/no questions


def exact_answer(answer: str) -> str:
    """As published: only the strings Yes and No are answers, anything else is neither."""
    return answer


def first_word_answer(answer: str) -> str:
    """muffin's own rule for models that go on talking: the first word, in any case and without punctuation, as Yes or No."""
    words = answer.split(maxsplit=1)
    return words[0].strip(".,!:;'\"*").capitalize() if words else ""


def question_counts(answer: str, annotation: Annotation) -> np.ndarray:
    """QUESTION_COUNTS of one yes/no question (6,); `answer` is Yes, No or anything else, which is wrong."""
    true_no, said_no = annotation.truth == "no", answer == "No"
    correct = said_no if true_no else answer == "Yes"
    return np.array([correct, 1, true_no and said_no, true_no, true_no and said_no, said_no], dtype=float)


def published_questions(sums: np.ndarray, pooled: int, constant: float) -> dict[str, float]:
    """accuracy, precision, recall, F1 in percent from sums (6,) of QUESTION_COUNTS, rounded as published.

    pooled: number of types that are pooled, each of which brings its 0.001; constant: in the denominator of F1.
    """
    values = {name: round(float(value), 1) for name, value in _questions(sums, pooled, constant).items() if name != "F1"}
    precision, recall = values["precision"] / 100, values["recall"] / 100
    return values | {"F1": round(2 * precision * recall / (precision + recall + constant) * 100, 1)}


def _questions(sums: np.ndarray, pooled: int, constant: float) -> dict[str, np.ndarray]:
    correct, questions, found_no, true_no, right_no, said_no = np.moveaxis(sums, -1, 0)
    start = START * pooled
    precision, recall = right_no / (said_no + start), found_no / (true_no + start)
    return {
        "accuracy": correct / (questions + start) * 100,
        "precision": precision * 100,
        "recall": recall * 100,
        "F1": divide(2 * precision * recall, precision + recall + constant) * 100,
    }


# --- the whole


def count_answers(
    answers: Sequence[tuple[Annotation, str]],
    images: Sequence[str],
    nouns: Lemmatizer,
    lexicon: Lexicon,
    alike: Alike,
    rule: Callable[[str], str],
) -> ImageCounts:
    """COUNTS of (annotation, answer) pairs; images: what each is about; `rule` reads the answers to yes/no questions."""
    counts = np.zeros((len(answers), len(COUNTS)))
    for number, (annotation, answer) in enumerate(answers):
        if annotation.type == "generative":
            counts[number, PARTS["generative"]] = description_counts(nouns(answer), annotation, lexicon, alike)
            counts[number, -1] = len(answer.split())
        else:
            counts[number, PARTS[annotation.type]] = question_counts(rule(answer), annotation)
    return ImageCounts.of_answers(COUNTS, counts, images)


def amber_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """All numbers, not rounded, of sums (..., 45) of COUNTS; names as in `score_answers`."""
    values = _generative(sums[..., PARTS["generative"]])
    values["words"] = divide(sums[..., -1], sums[..., COUNTS.index("descriptions")])
    for part in ("all", *DIMENSIONS):
        values |= {f"{part} {metric}": value for metric, value in _questions(*_pooled(sums, part)).items()}
    return values | {"score": (100 - values["CHAIR"] + values["all F1"]) / 2}


def score_answers(counts: ImageCounts) -> dict[str, Estimate]:
    """The published numbers by name: CHAIR, Cover, Hal, Cog; "all accuracy", "existence F1", ...; score = (100 - CHAIR + all F1) / 2.

    words: per description. Parts without answers are left out, and the score with them. Values are rounded as published, intervals are not.
    """
    sums = counts.sums
    published: dict[str, float] = {}
    if sums[PARTS["generative"]].any():
        published |= published_generative(sums[PARTS["generative"]])
        published["words"] = float(amber_scores(sums)["words"])
    for part in ("all", *DIMENSIONS):
        questions, pooled, constant = _pooled(sums, part)
        if questions.any():
            published |= {f"{part} {metric}": value for metric, value in published_questions(questions, pooled, constant).items()}
    if "CHAIR" in published and "all F1" in published:
        published["score"] = round((100 - published["CHAIR"] + published["all F1"]) / 2, 2)
    estimates = estimate_counts(counts, amber_scores)
    return {name: Estimate(value, estimates[name].low, estimates[name].high) for name, value in published.items()}


def _pooled(sums: np.ndarray, part: str) -> tuple[np.ndarray, int, float]:
    """Of a yes/no part: sums (..., 6) of QUESTION_COUNTS, number of types that bring a constant each, constant of F1."""
    if part == "all":
        return np.sum([sums[..., PARTS[kind]] for kind in QUESTION_TYPES], axis=0), 1, 0.0001
    kinds, constant = DIMENSIONS[part]
    pooled = 1 if part == "relation" else len(kinds)  # relation has one counter for its two types
    return np.sum([sums[..., PARTS[kind]] for kind in kinds], axis=0), pooled, constant
