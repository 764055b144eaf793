"""Feedback from models behind a chat protocol: claims by a language model, P(yes) by a vision-language model behind a server.

    (question, answer) --split_prompt--> statements --questions_prompt--> a yes/no question each --> Claim, ...
    (image, claim's question) --logprobs of the first token--> Judgement

The two steps are RLAIF-V's (arXiv:2405.17220, section 3.2) with prompts of our own. A reply that cannot be read, or that has more or fewer
questions than there are statements, fails that answer alone, with the reason.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from muffin.chat import Body, Line, choice_of, image_message, image_url
from muffin.claims import ANSWER_YES_OR_NO, Claim
from muffin.feedback import NO_WORDS, YES_WORDS, Feedback, Judgement, failed
from muffin.judge import Judge, StoringJudge
from muffin.pairs import PromptDataset

PROMPT_VERSION = "muffin-claims-1"
NOTHING = "NONE"

_ITEM = re.compile(r"^\s*(?:[-*\u2022]|\(?\d+[.):])\s*(.*\S)\s*$")


def split_prompt(question: str, answer: str) -> str:
    """Asks for the statements that an answer makes about a picture, one per line."""
    return (
        "Below are a question about a picture and an answer to it. List every statement that the answer makes about what can be seen in "
        "the picture, as a numbered list. Each item states one thing, is a full sentence that can be understood without the others (write "
        "names in place of pronouns), and uses the answer's own words where it can. Leave out opinions, guesses about feelings and "
        f"anything that cannot be checked by looking. Add nothing. If there is no such statement, reply {NOTHING}.\n\n"
        f"Question: {question}\nAnswer: {answer}"
    )


def questions_prompt(statements: Sequence[str]) -> str:
    """Asks for one yes/no question per statement, in their order."""
    listed = "\n".join(f"{number}. {statement}" for number, statement in enumerate(statements, 1))
    return (
        "Turn each statement about a picture into a yes/no question whose answer is yes exactly if the statement is true. Keep its "
        f"words, its tense and any negation; add nothing. Reply with a numbered list of {len(statements)} questions, in the same order."
        f"\n\n{listed}"
    )


def parse_list(text: str) -> list[str]:
    """Items of a numbered or bulleted list; lines around it are passed over. Raises ValueError when there is none."""
    items = [match[1] for line in text.splitlines() if (match := _ITEM.match(line))]
    if not items:
        raise ValueError(f"the reply holds no list: {text[:80]!r}")
    return items


class ChatSplitter:
    """A `Splitter` of answers that were given to it before: all are split in two rounds, so that many requests run at a time."""

    def __init__(self, judge: Judge, answers: Sequence[tuple[str, str]]) -> None:
        """answers: (question, answer) of those that will be asked for."""
        self._claims: dict[tuple[str, str], list[Claim] | str] = {}
        distinct = [(question, answer) for question, answer in dict.fromkeys(answers) if answer.strip()]
        statements: dict[tuple[str, str], list[str]] = {}
        for key, reply in zip(distinct, judge.ask([split_prompt(*key) for key in distinct]), strict=True):
            if reply.text is not None and reply.text.strip().strip(".").upper() == NOTHING:
                self._claims[key] = []
                continue
            try:
                statements[key] = parse_list(_text(reply.text, reply.failure))
            except ValueError as error:
                self._claims[key] = f"claims: {error}"
        replies = judge.ask([questions_prompt(each) for each in statements.values()])
        for (key, found), reply in zip(statements.items(), replies, strict=True):
            try:
                questions = parse_list(_text(reply.text, reply.failure))
                if len(questions) != len(found):
                    raise ValueError(f"{len(found)} statements have {len(questions)} questions")
            except ValueError as error:
                self._claims[key] = f"questions: {error}"
            else:
                pairs = zip(found, questions, strict=True)
                self._claims[key] = [Claim(statement, f"{question} {ANSWER_YES_OR_NO}") for statement, question in pairs]

    def __call__(self, question: str, answer: str) -> list[Claim]:
        claims = self._claims.get((question, answer), [])  # an empty answer states nothing
        if isinstance(claims, str):
            raise ValueError(claims)
        return claims


def _text(text: str | None, failure: str | None) -> str:
    if text is None:
        raise ValueError(failure)
    return text


class ChatLabeler:
    """A `Labeler` behind a server: log-probs of the first token. Servers give the 20 most probable; a word not among them counts 0."""

    def __init__(self, judge: StoringJudge, prompts: PromptDataset) -> None:
        self.judge = judge
        self.prompts = prompts

    def __call__(self, claims: Mapping[int, Sequence[Claim]]) -> Iterator[tuple[int, Feedback]]:
        asked: dict[tuple[int, str], Body] = {}
        unusable: dict[int, str] = {}
        for row, split in claims.items():
            try:
                prompt = self.prompts[row]
                url = image_url(prompt.image_bytes, prompt.image)
            except ValueError as error:  # of the row, or of its image
                unusable[row] = str(error)
                continue
            asked |= {(row, claim.question): self._body(url, claim.question) for claim in split if claim.question is not None}
        lines = dict(zip(asked, self.judge.complete(list(asked.values())), strict=True))
        for row, split in claims.items():
            yield row, failed(unusable[row]) if row in unusable else self._feedback(row, split, lines)

    def _feedback(self, row: int, split: Sequence[Claim], lines: Mapping[tuple[int, str], Line]) -> Feedback:
        try:
            judgements = [None if claim.question is None else judgement_of(lines[row, claim.question]) for claim in split]
        except ValueError as error:
            return failed(str(error))
        return Feedback(tuple(split), tuple(judgements))

    def _body(self, url: str, question: str) -> dict[str, Any]:
        first_token = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        return {"model": self.judge.name, "messages": [image_message(url, question)], **first_token}


def judgement_of(line: Line) -> Judgement:
    """P(yes) and P(no) of a stored reply. Raises ValueError when the request failed, or when its server gave no log-probs."""
    tokens = (choice_of(line).get("logprobs") or {}).get("content") or []
    if not tokens or not tokens[0].get("top_logprobs"):
        raise ValueError("the labeler's server gave no log-probs; want one that answers logprobs and top_logprobs, such as vLLM")
    probabilities = [(entry["token"].strip(), math.exp(entry["logprob"])) for entry in tokens[0]["top_logprobs"]]
    p_yes, p_no = (sum(p for token, p in probabilities if token in words) for words in (YES_WORDS, NO_WORDS))
    return Judgement(p_yes, p_no)
