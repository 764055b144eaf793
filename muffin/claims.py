"""Claims: what an answer states, one statement at a time, each with the yes/no question that verifies it.

`split_by_rules` needs no model and is a rough stand-in for a language model on real answers.
"""

import re
from dataclasses import dataclass
from typing import Protocol

ANSWER_YES_OR_NO = "Please answer yes or no."


@dataclass(frozen=True)
class Claim:
    """One statement of an answer, and the yes/no question that verifies it as it is put to the labeler.

    Without a question the claim counts as rejected: the answer says something that cannot be meant.
    """

    text: str
    question: str | None


class Splitter(Protocol):
    """Takes the answer to a question apart. Raises ValueError with the reason when it cannot; an answer that states nothing gives []."""

    def __call__(self, question: str, answer: str) -> list[Claim]: ...


_LIST_MARK = re.compile(r"^\s*(?:[-*•#]+|\d+[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_ABBREVIATION = re.compile(r"(?:^|\s)(?:Mr|Mrs|Ms|Dr|St|vs|approx|e\.g|i\.e)\.$")
_REPLY = re.compile(r"(?:yes|no), ", re.IGNORECASE)
_DETERMINERS = "the|a|an|one|two|three|some|another|he|she|it|they|his|her|its|their|this|that|these|those|both|all"
_RELATIVE = "who|which|that|where|while|as"
# "; the dog is asleep", ", and the dog is asleep": a subject follows, with a verb of its own before any relative clause
_CLAUSE = re.compile(
    rf"(?:;\s+(?:and\s+|but\s+)?|,\s+(?:and|but|while|whereas)\s+)(?=there\s+(?:is|are)\b"
    rf"|(?:{_DETERMINERS})\s+(?:(?!(?:{_RELATIVE})\b)[\w'-]+\s+){{0,4}}?(?:is|are|was|were|has|have|can|appears?|seems?|looks?)\b)",
    re.IGNORECASE,
)
_THERE = re.compile(r"there (is|are|was|were) (.+)", re.IGNORECASE)
_SHOWN = re.compile(
    r"(?:the|this) (image|picture|photo|photograph|scene) (show|depict|feature|contain|capture|display|include)s (.+)", re.IGNORECASE
)
_STATEMENT = re.compile(
    rf"((?:{_DETERMINERS})(?: (?!(?:{_RELATIVE})\b)[\w'-]+){{0,7}}?) (is|are|was|were|can|has been|have been) (.+)", re.IGNORECASE
)
_LOWERED = re.compile(rf"(?:{_DETERMINERS}|there|in|on|at|to)\b", re.IGNORECASE)


def split_by_rules(question: str, answer: str) -> list[Claim]:
    """English sentences, and clauses with verbs of their own, each turned into a yes/no question with as few changes as possible.

        "The image shows a dog, and a man is behind it."  ->  "Does the image show a dog?", "Is a man behind it?"

    Pronouns keep pointing to other sentences, and opinions count as claims. A short answer ("Red.") is asked about with its question.
    """
    claims = []
    for line in answer.splitlines():
        line = _LIST_MARK.sub("", line).strip()
        if line.endswith(":"):
            continue  # a heading
        for sentence in _sentences(line):
            claims += [_claim(question, clause) for clause in _CLAUSE.split(sentence)]
    return [claim for claim in claims if re.search(r"\w", claim.text)]


def _sentences(line: str) -> list[str]:
    """The sentences of a line, without those that ask."""
    sentences: list[str] = []
    for part in _SENTENCE_END.split(line):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += f" {part}"
        else:
            sentences.append(part)
    return [sentence for sentence in sentences if sentence and not sentence.endswith("?")]


def _claim(question: str, text: str) -> Claim:
    text = text.strip()
    statement = _REPLY.sub("", text.rstrip(".!"), count=1)
    if match := _THERE.fullmatch(statement):
        asked = f"{match[1].capitalize()} there {match[2]}?"
    elif match := _SHOWN.fullmatch(statement):
        asked = f"Does the {match[1].lower()} {match[2].lower()} {match[3]}?"
    elif match := _STATEMENT.fullmatch(statement):
        verb, *more = match[2].split()
        asked = " ".join([verb.capitalize(), _lowered(match[1]), *more, match[3]]) + "?"
    elif len(statement.split()) <= 3:
        asked = f'Is "{statement}" the right answer to the question "{question}"?'
    else:
        asked = f"Is it true that {_lowered(statement)}?"
    return Claim(text, f"{asked} {ANSWER_YES_OR_NO}")


def _lowered(text: str) -> str:
    """Without its capital, where that only marks the beginning of a sentence."""
    return text[0].lower() + text[1:] if _LOWERED.match(text) else text
