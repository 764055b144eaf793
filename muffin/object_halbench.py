"""Object HalBench (Yu et al. 2023, arXiv:2312.00849) with a judge: it lists the objects that an answer says are there, CHAIR counts them.

    answer --extraction_prompt--> judge --parse_objects--> ["a puppy", "dining table"] --objects_named--> [dog, dining table]

As in RLAIF-V's script (eval_gpt_obj_halbench.py) an object counts once per answer, and an answer of three words and fewer names none. The
prompt is muffin's own, with a version. Without a judge, eval/chair.py counts by rules.
"""

import json
import re

from muffin.chair import Vocabulary
from muffin.lemmas import Lemmatizer

PROMPT_VERSION = "muffin-objects-1"
PUBLISHED_WITH = "gpt-3.5-turbo-0613, the authors' prompt and spaCy's en_core_web_trf"
SHORT_ANSWER = 3  # words; shorter answers are not sent to the judge

_PROMPT = """\
Below is a text about a picture. List every thing that the text says can be seen in the picture: people, animals, vehicles, \
furniture, food, objects of any kind. Give each as the noun that the text uses, with the words that make it another kind of \
thing ("hot dog", "traffic light") and without those that only describe it. Leave out what the text says is not there, what it \
only supposes or suggests, and moods, places and parts of the picture itself ("scene", "background").

Text: {answer}

Reply with a JSON list of strings and nothing else; [] if nothing can be seen."""

_LIST = re.compile(r"\[[^\[\]]*\]", re.DOTALL)


def is_short(answer: str) -> bool:
    """Whether an answer is too short to be asked about (its script skips those of up to three words)."""
    return len(answer.split()) <= SHORT_ANSWER


def extraction_prompt(answer: str) -> str:
    """What the judge is asked."""
    return _PROMPT.format(answer=answer)


def parse_objects(reply: str) -> list[str] | None:
    """The list in a reply, whatever stands around it; None when there is none, more than one, or one of other things than texts."""
    lists = _LIST.findall(reply)
    if len(lists) != 1:
        return None
    try:
        objects = json.loads(lists[0])
    except json.JSONDecodeError:
        return None
    return objects if all(isinstance(each, str) for each in objects) else None


def objects_named(listed: list[str], vocabulary: Vocabulary, lemmas: Lemmatizer) -> list[str]:
    """The objects of the vocabulary that a list of phrases names, each once, in order."""
    return list(dict.fromkeys(each for phrase in listed for each in vocabulary.objects(lemmas(phrase))))


def comparable_with(judge: str) -> str:
    """Which published numbers a result may be set beside."""
    return f"lists by {judge} under the prompt {PROMPT_VERSION} only; published Object HalBench numbers are by {PUBLISHED_WITH}"
