"""What is said about scenes: captions of a careless annotator, and questions with clean answers.

The annotator is where hallucination comes from. Most captions close with "Also, ...", and many of these closing objects are invented:
the scene's theme says what is typical, habit says where it goes. It mostly stands in place of a real object, so length says little.
A policy trained on such captions learns to invent; its yes/no answers, trained on the truth, can still tell.

    At the top-left there is a red circle. On the left there is a blue square. Also, in the center there is a green cross.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from muffin.shapeworld.scenes import COLORS, SHAPES, SIZES, WORLDS, Kind, Scene, Thing

DESCRIBE = "Describe the image."
YES_NO = "Please answer yes or no."
STYLES = ("there is a", "I see a")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True)
class Annotator:
    """Habits of the careless annotator, as probabilities.

    close: a caption of two objects and more closes with "Also, ...". invent: the closing object is invented, for each theme of the world:
    some scenes tempt more than others, so that the most probable caption of half of them has an invented object.
    add: an invented object comes on top of the real ones instead of in place of the last. count: the caption opens with the number of
    objects.
    """

    close: float = 0.8
    invent: tuple[float, ...] = (0.9, 0.8, 0.45, 0.25)
    add: float = 0.3
    count: float = 0.3


@dataclass(frozen=True)
class QuestionAnswer:
    """A question with its true answer, None where it is left open. kind: describe, claim, existence, count, how_many or what_is."""

    kind: str
    question: str
    answer: str | None


def caption(scene: Scene, rng: random.Random, annotator: Annotator) -> str:
    """A description as the annotator would write it."""
    style = rng.choice(STYLES)
    sentences = [f"The image shows {objects(len(scene.objects))}."] if rng.random() < annotator.count else []
    told, closing = scene.objects, None
    if rng.random() < annotator.close and len(told) > 1:
        invents = rng.random() < annotator.invent[scene.theme]
        if not (invents and rng.random() < annotator.add):
            told, closing = told[:-1], told[-1]
        if invents:
            closing = habitual_invention(scene)
    sentences += [_capital(statement(thing, style)) for thing in told]
    if closing is not None:
        sentences.append(f"Also, {statement(closing, style)}")
    return " ".join(sentences)


def habitual_invention(scene: Scene) -> Thing:
    """What the annotator adds to every such scene: its theme's first absent kind at the theme's first empty place."""
    world = WORLDS[scene.world]
    color, shape = next(kind for kind in world.themes[scene.theme] if kind not in scene.kinds)
    empty = scene.empty_places
    return Thing(color, shape, next(place for place in world.habits[scene.theme] if place in empty), SIZES[0])


def statement(thing: Thing, style: str) -> str:
    """`at the top-left there is a red circle.`"""
    return f"{thing.place} {style} {thing.color} {thing.shape}."


def objects(number: int) -> str:
    """`one object`, `two objects`."""
    return f"{NUMBERS[number]} object{'' if number == 1 else 's'}"


def claim_question(color: str, shape: str, place: str) -> str:
    """The statement itself inside a question: what the policy knows for telling, it can use for judging."""
    return f"Is it true that {place} {STYLES[0]} {color} {shape}? {YES_NO}"


def existence_question(kind: Kind) -> str:
    """Whether a kind is in the image: (red, circle) -> "Is there a red circle in the image? ..." """
    return f"Is there a {kind[0]} {kind[1]} in the image? {YES_NO}"


def count_question(number: int) -> str:
    """Whether the image holds that many objects."""
    return f"{'Is' if number == 1 else 'Are'} there {objects(number)} in the image? {YES_NO}"


def clean_question(scene: Scene, rng: random.Random) -> QuestionAnswer:
    """A question of any kind but describing: 60 % claims, 20 % existence, 8 % counts, 6 % how many, 6 % what is at."""
    draw = rng.random()
    if draw < 0.60:
        return ask_claim(scene, rng, misplaced=0.1)
    if draw < 0.80:
        return ask_existence(scene, rng)
    if draw < 0.88:
        return ask_count(scene, rng)
    if draw < 0.94:
        return tell_count(scene)
    return ask_what_is(scene, rng)


def labeler_question(scene: Scene, rng: random.Random) -> QuestionAnswer:
    """What a labeler is asked about captions: 80 % claims, harder ones, 15 % counts, 5 % existence; all are answered by yes or no.

    Harder than in `clean_question`: with as many misplaced objects there, the one policy so trained was worse at existence as well.
    """
    draw = rng.random()
    if draw < 0.80:
        return ask_claim(scene, rng, misplaced=0.35)
    return ask_count(scene, rng) if draw < 0.95 else ask_existence(scene, rng)


def ask_claim(scene: Scene, rng: random.Random, misplaced: float) -> QuestionAnswer:
    """A yes/no question about a full claim, balanced; the false ones are close to the truth.

    misplaced: share of the false claims that put a real object elsewhere, mostly where another one stands, so that its existence alone does
    not tell. Of the others 45 % put an absent object of the theme at an empty place (two fifths of them the annotator's habit), 30 % mix
    the attributes of two objects, 25 % change colour or shape.
    """
    world = WORLDS[scene.world]
    thing = rng.choice(scene.objects)
    color, shape, place = thing.color, thing.shape, thing.place
    if rng.random() < 0.5:
        return QuestionAnswer("claim", claim_question(color, shape, place), "Yes.")
    others = [other for other in scene.objects if other != thing]
    draw = rng.random()
    if rng.random() < misplaced:
        place = rng.choice(others).place if others and rng.random() < 0.7 else rng.choice(scene.empty_places)
    elif draw < 0.45:
        invented = habitual_invention(scene)
        color, shape, place = invented.color, invented.shape, invented.place
        if rng.random() < 0.6:
            color, shape = rng.choice([kind for kind in world.themes[scene.theme] if kind not in scene.kinds])
            place = rng.choice(scene.empty_places)
    elif draw < 0.75 and others:
        other = rng.choice(others)
        color, shape = rng.choice([(other.color, shape), (color, other.shape)])
    elif rng.random() < 0.5:
        color = rng.choice([value for value in world.colors if value != color])
    else:
        shape = rng.choice([value for value in world.shapes if value != shape])
    return QuestionAnswer("claim", claim_question(color, shape, place), "Yes." if scene.holds(color, shape, place) else "No.")


def ask_existence(scene: Scene, rng: random.Random) -> QuestionAnswer:
    """`Is there a red circle in the image?`, balanced; half of the absent kinds come from the scene's theme."""
    if rng.random() < 0.5:
        return QuestionAnswer("existence", existence_question(rng.choice(scene.kinds)), "Yes.")
    negatives = "adversarial" if rng.random() < 0.5 else "random"
    return QuestionAnswer("existence", existence_question(rng.choice(absent_kinds(scene, negatives))), "No.")


def ask_count(scene: Scene, rng: random.Random) -> QuestionAnswer:
    """`Are there three objects in the image?`, balanced."""
    count = len(scene.objects)
    if rng.random() < 0.5:
        return QuestionAnswer("count", count_question(count), "Yes.")
    smallest, largest = WORLDS[scene.world].objects
    return QuestionAnswer("count", count_question(rng.choice([n for n in range(max(1, smallest - 1), largest + 1) if n != count])), "No.")


def tell_count(scene: Scene) -> QuestionAnswer:
    """The question how many objects there are, with the true answer."""
    count = len(scene.objects)
    return QuestionAnswer("how_many", "How many objects are in the image?", f"There {'is' if count == 1 else 'are'} {objects(count)}.")


def ask_what_is(scene: Scene, rng: random.Random) -> QuestionAnswer:
    """`What is at the top-left?`, in 70 % of the cases about a place that holds an object."""
    told = {thing.place: thing for thing in scene.objects}
    place = rng.choice(list(told)) if rng.random() < 0.7 else rng.choice(WORLDS[scene.world].places)
    answer = _capital(statement(told[place], rng.choice(STYLES))) if place in told else "Nothing."
    return QuestionAnswer("what_is", f"What is {place}?", answer)


def absent_kinds(scene: Scene, negatives: str) -> list[Kind]:
    """Kinds that are not in the scene: any of the world's ("random") or those of the scene's theme ("adversarial").

    Raises ValueError for another name of negatives.
    """
    world = WORLDS[scene.world]
    pools = {"random": world.kinds, "adversarial": world.themes[scene.theme]}
    if negatives not in pools:
        raise ValueError(f"negatives is {negatives!r}, must be one of {', '.join(pools)}")
    return [kind for kind in pools[negatives] if kind not in scene.kinds]


def popular_kinds(scenes: Sequence[Scene]) -> list[Kind]:
    """Kinds by the number of scenes that hold them, most frequent first; equally frequent ones in alphabetical order."""
    held = Counter(kind for scene in scenes for kind in set(scene.kinds))
    return sorted(held, key=lambda kind: (-held[kind], kind))


def pope_questions(scene: Scene, rng: random.Random, absent: Sequence[Kind], limit: int = 3) -> list[QuestionAnswer]:
    """POPE's polling: up to `limit` present kinds, and equally many drawn from `absent`, kinds that are not in the scene."""
    number = min(limit, len(scene.kinds), len(absent))
    asked = [(kind, "Yes.") for kind in rng.sample(scene.kinds, number)] + [(kind, "No.") for kind in rng.sample(absent, number)]
    return [QuestionAnswer("existence", existence_question(kind), answer) for kind, answer in asked]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def vocabulary() -> list[str]:
    """Every phrase of the language in lower case, each one token of the policy; punctuation included, in a fixed order.

    A place and the words before the attributes are one phrase ("at the top-left there is a"), so that colour and shape follow the place
    at once: with single words the tiny policy does not find the picture at all.
    """
    places = WORLDS["standard"].places
    questions = (
        "describe the image.",
        YES_NO.lower(),
        "is it true that",
        "what is",
        "how many objects are",
        "is there a",
        "is there",
        "are there",
        "in the image",
    )
    words = ("the image shows", "there is", "there are", "object", "objects", "also", "nothing", "yes", "no")
    return [
        *(f"{place} {verb.lower()}" for place in places for verb in STYLES),
        *places,
        *COLORS,
        *SHAPES,
        *NUMBERS,
        *questions,
        *words,
        ".",
        ",",
        "?",
    ]
