"""Answers of the tiny world taken apart: one claim per sentence, a yes/no question for each, its truth, and the objects it names.

The rules stand where real data needs a language model (`muffin.feedback`); what they return has the same form.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from muffin.hallucination import Ratio, chair_ratios, mean_words, wrong_claims
from muffin.shapeworld.language import NUMBERS, claim_question, count_question
from muffin.shapeworld.scenes import COLORS, PLACES, SHAPES, Kind, Scene

_SENTENCE_END = re.compile(r"(?<=\.)\s*")
_OBJECT = re.compile(
    rf"(?:also, )?({'|'.join(sorted(PLACES, key=len, reverse=True))}) (?:there is|i see) a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\."
)
_COUNT = re.compile(rf"(?:the image shows|there are|there is) ({'|'.join(NUMBERS)}) objects?\.")


@dataclass(frozen=True)
class Claim:
    """One sentence of an answer. `kind` with `place`, or `count`, is set; all are None for a sentence that is no statement."""

    sentence: str
    kind: Kind | None = None
    place: str | None = None
    count: int | None = None


def split_claims(answer: str) -> list[Claim]:
    """The answer's sentences in order, each one claim; case and spacing do not matter."""
    claims = []
    for sentence in filter(None, (part.strip() for part in _SENTENCE_END.split(answer))):
        plain = " ".join(sentence.lower().split())
        if match := _OBJECT.fullmatch(plain):
            claims.append(Claim(sentence, kind=(match[2], match[3]), place=match[1]))
        elif match := _COUNT.fullmatch(plain):
            claims.append(Claim(sentence, count=NUMBERS.index(match[1])))
        else:
            claims.append(Claim(sentence))
    return claims


def question_of(claim: Claim) -> str | None:
    """The yes/no question that verifies a claim; None where the sentence states nothing, which counts as a wrong claim."""
    if claim.kind is not None and claim.place is not None:
        return claim_question(*claim.kind, claim.place)
    return None if claim.count is None else count_question(claim.count)


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether the whole claim holds: colour, shape and place together, or the exact number."""
    if claim.kind is not None and claim.place is not None:
        return scene.holds(*claim.kind, claim.place)
    return claim.count == len(scene.objects)


def mentioned_objects(answer: str) -> list[Kind]:
    """The objects an answer names, wherever it puts them, once per mention."""
    return [claim.kind for claim in split_claims(answer) if claim.kind is not None]


def answer_ratios(answers: Sequence[str], scenes: Sequence[Scene]) -> dict[str, Ratio]:
    """What the demo reports about N descriptions of N scenes: chair_s, chair_i, recall, claim_error (in %) and words."""
    claims = [split_claims(answer) for answer in answers]
    truths = [[is_true(claim, scene) for claim in split] for split, scene in zip(claims, scenes, strict=True)]
    ratios = chair_ratios([mentioned_objects(answer) for answer in answers], [scene.kinds for scene in scenes])
    return {**ratios, "claim_error": wrong_claims(truths), "words": mean_words(answers)}
