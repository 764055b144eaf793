"""Words of a caption in base form, by the rules that published hallucination scores were made with.

    "Two dogs, seated."  ->  [two, dog, ",", seated, "."]

nltk's data are downloads and so is spaCy's model: nothing here fetches them, what is missing is named. The rules without downloads
need to know which words count: a form is reduced only if that gives a known word, so "glasses" becomes "glass" and "bus" stays.
"""

import re
from collections.abc import Callable, Collection

Lemmatizer = Callable[[str], list[str]]

NLTK_COMMAND = "python -m nltk.downloader punkt_tab wordnet averaged_perceptron_tagger_eng"

_TOKEN = re.compile(r"\w+(?:-\w+)*|[^\w\s]")
# (ending of the plural, what it becomes); -es is dropped after a sibilant or o only: "skies" must not become "ski".
_ENDINGS = (
    *((re.compile("ies$"), "y"), (re.compile("ves$"), "f"), (re.compile("ves$"), "fe"), (re.compile("men$"), "man")),
    *((re.compile("(?<=[sxzo])es$|(?<=[cs]h)es$"), ""), (re.compile("s$"), "")),
)
_IRREGULAR = {
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
    "feet": "foot",
    "teeth": "tooth",
    "cacti": "cactus",
}


class MissingResource(ValueError):
    """A package or model that a rule needs is not installed; the message says how to get it."""


def tokens(text: str) -> list[str]:
    """Words (with their hyphens) and punctuation marks, in lower case."""
    return _TOKEN.findall(text.lower())


def known_singular(word: str, known: Collection[str]) -> str:
    """`word` if it is known, else its singular if that is known, else `word`."""
    if word in known:
        return word
    forms = [_IRREGULAR.get(word, word), *(plural.sub(singular, word) for plural, singular in _ENDINGS)]
    return next((form for form in forms if form in known), word)


def simple_lemmas(known: Collection[str]) -> Lemmatizer:
    """Regular and a few irregular plurals of known words; no package, no data."""
    return lambda text: [known_singular(token, known) for token in tokens(text)]


def wordnet_noun_lemmas() -> Lemmatizer:
    """nltk's tokens of the lower-case text, each lemmatised as a noun: RLAIF-V (eval_gpt_obj_halbench.py:209-211)."""
    nltk = load_nltk()
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
    return lambda text: [lemmatize(token) for token in nltk.word_tokenize(text.lower())]


def wordnet_pos_lemmas() -> Lemmatizer:
    """The same, lemmatised as the part of speech that nltk's tagger sees, so that "seated" becomes "seat"."""
    nltk = load_nltk()
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
    parts = {"J": "a", "V": "v", "N": "n", "R": "r"}
    return lambda text: [lemmatize(token, parts.get(tag[0], "n")) for token, tag in nltk.pos_tag(nltk.word_tokenize(text.lower()))]


def pattern_singulars() -> Lemmatizer:
    """nltk's tokens of the lower-case text through pattern.en.singularize: the original CHAIR (LisaAnne/Hallucination utils/chair.py)."""
    try:
        from pattern.en import singularize
    except ImportError as error:
        raise MissingResource(f"pattern.en cannot be imported ({error}); install it with: pip install pattern") from error
    nltk = load_nltk()
    return lambda text: [singularize(token) for token in nltk.word_tokenize(text.lower())]


def wordnet_nouns() -> Lemmatizer:
    """Lemmas of what nltk's tagger takes for nouns, case kept: AMBER (inference.py)."""
    nltk = load_nltk()
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
    return lambda text: [lemmatize(token) for token, tag in nltk.pos_tag(nltk.word_tokenize(text)) if tag.startswith("NN")]


def load_nltk():
    """The nltk module. Raises MissingResource when it, or one of the data packages used here, is not installed."""
    try:
        import nltk
    except ImportError as error:
        raise MissingResource(f"nltk cannot be imported ({error}); install it with: pip install nltk") from error
    try:
        nltk.pos_tag(nltk.word_tokenize("Two dogs."))
        nltk.stem.WordNetLemmatizer().lemmatize("dogs")
    except LookupError as error:
        raise MissingResource(f"nltk's data are not installed; download them once with: {NLTK_COMMAND}") from error
    return nltk
