"""AI feedback: an answer is split into claims, a labeler is asked about each, and the answer's score counts the rejected ones.

    answer --Splitter--> [Claim, ...] --Labeler--> [Judgement, ...] --> Feedback(score = -rejected claims)

As in RLAIF-V (arXiv:2405.17220, section 3.2): a claim is accepted if P(yes) > P(no), where P(yes) is the probability that the labeler's
first token is "yes" or "Yes". Probabilities are of the full vocabulary, from raw logits. All questions about an image share the image
and the words before them in one packed row, so a claim costs little more than its own tokens.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import torch
from PIL import Image
from torch import nn

from muffin.claims import Claim, Splitter
from muffin.logps import response_logps
from muffin.packing import pack
from muffin.pairs import PromptDataset, RowError
from muffin.policies.base import EncodedResponses, PolicyAdapter
from muffin.provenance import Numerics
from muffin.scoring import batch_by_tokens
from muffin.shards import WorkStream

YES_WORDS = ("yes", "Yes")
NO_WORDS = ("no", "No")
NO_CLAIMS = "no claims: the answer states nothing that can be checked"

FEEDBACK_FEATURES = datasets.Features(
    {
        "claims": datasets.List(datasets.Value("string")),
        "claim_questions": datasets.List(datasets.Value("string")),
        "p_yes": datasets.List(datasets.Value("float64")),
        "p_no": datasets.List(datasets.Value("float64")),
        "score": datasets.Value("int64"),
        "failure": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class Judgement:
    """Probabilities that the labeler's answer to a claim's question begins with yes and with no."""

    p_yes: float
    p_no: float

    @property
    def accepted(self) -> bool:
        """Ties reject (RLAIF-V utils/pair_construction.py:84-87)."""
        return self.p_yes > self.p_no


@dataclass(frozen=True)
class Feedback:
    """What a labeler says about one answer: a judgement per claim (None for a claim without a question), or why there are none."""

    claims: tuple[Claim, ...]
    judgements: tuple[Judgement | None, ...]
    failure: str | None = None

    @property
    def score(self) -> int | None:
        """-(number of rejected claims), not divided by the number of claims (utils/pair_construction.py:105); None for a failure."""
        if self.failure is not None:
            return None
        return -sum(judgement is None or not judgement.accepted for judgement in self.judgements)


def failed(reason: str) -> Feedback:
    """Feedback on an answer that cannot be judged."""
    return Feedback((), (), reason)


def feedback_columns(feedback: Sequence[Feedback]) -> dict[str, list[Any]]:
    """Values of FEEDBACK_FEATURES, one per answer."""
    return {
        "claims": [[claim.text for claim in each.claims] for each in feedback],
        "claim_questions": [[claim.question for claim in each.claims] for each in feedback],
        "p_yes": [[judgement and judgement.p_yes for judgement in each.judgements] for each in feedback],
        "p_no": [[judgement and judgement.p_no for judgement in each.judgements] for each in feedback],
        "score": [each.score for each in feedback],
        "failure": [each.failure for each in feedback],
    }


# --- the labeler: any policy


@dataclass(frozen=True)
class EncodedQuestions:
    """Yes/no questions about one image, ready for packing.

    questions: those that can be encoded; refused: the others, with the reason.
    encoded: prompt = what the prompts of all questions begin with (image included); per question as many responses as there are answer
        tokens, yes before no: the rest of its prompt + [answer token]. Equal inputs share a branch, so those responses are computed as
        one, and the last log-prob of each is that of the answer token. None when every question is refused.
    yes_tokens, no_tokens: how many distinct tokens the words for yes and for no begin with.
    """

    questions: tuple[str, ...]
    refused: dict[str, str]
    encoded: EncodedResponses | None
    yes_tokens: int
    no_tokens: int


def encode_questions(adapter: PolicyAdapter, image: Image.Image, questions: Sequence[str]) -> EncodedQuestions:
    """Encode distinct questions about an image, which is preprocessed once. Raises ValueError when the tokenizer cannot tell yes from no.

    Of an image that the family cannot take every question is refused.
    """
    try:
        seen = adapter.see(image)
    except ValueError as error:
        return EncodedQuestions((), dict.fromkeys(questions, str(error)), None, 0, 0)
    prompts: dict[str, EncodedResponses] = {}
    refused: dict[str, str] = {}
    yes: list[int] = []
    no: list[int] = []
    for question in questions:
        try:
            encoded = adapter.encode_seen(seen, question, () if prompts else (*YES_WORDS, *NO_WORDS))
        except ValueError as error:
            refused[question] = f"{error} (asked: {question!r})"
            continue
        if not prompts:
            yes, no = _answer_tokens(encoded)
        prompts[question] = encoded
    if not prompts:
        return EncodedQuestions((), refused, None, 0, 0)
    ids = [encoded.prompt_ids.tolist() for encoded in prompts.values()]
    shared = len(os.path.commonprefix(ids))
    first = next(iter(prompts.values()))
    together = EncodedResponses(
        prompt_ids=first.prompt_ids[:shared],
        response_ids=tuple(torch.tensor([*prompt[shared:], token]) for prompt in ids for token in (*yes, *no)),
        vision=first.vision,
        vision_key=first.vision_key,
        position_ids=first.position_ids[..., :shared],
    )
    return EncodedQuestions(tuple(prompts), refused, together, len(yes), len(no))


def _answer_tokens(encoded: EncodedResponses) -> tuple[list[int], list[int]]:
    """The distinct tokens that the words for yes, and those for no, begin with after this prompt."""
    starts = [int(response[0]) for response in encoded.response_ids]
    yes, no = sorted(set(starts[: len(YES_WORDS)])), sorted(set(starts[len(YES_WORDS) :]))
    if set(yes) & set(no):
        raise ValueError(
            f"after the labeler's prompt {YES_WORDS} begin with the tokens {yes} and {NO_WORDS} with {no}; want none in common"
        )
    return yes, no


def judge_questions(model: nn.Module, adapter: PolicyAdapter, batch: Sequence[EncodedQuestions]) -> list[dict[str, Judgement]]:
    """P(yes) and P(no) of every question of some images, in one forward under the caller's autocast; none may have `encoded` None.

    Raises ValueError when a probability is not a number.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        logps = response_logps(model, pack([item.encoded for item in batch], adapter).to(device))
    probabilities = logps.token_logps[logps.lengths.cumsum(0) - 1].double().exp()
    if not probabilities.isfinite().all():
        raise ValueError("the labeler's log-probs are not finite; check its weights, or label with --dtype float32")
    values = iter(probabilities.tolist())
    judged = []
    for item in batch:
        judgements = {}
        for question in item.questions:
            p_yes = sum(next(values) for _ in range(item.yes_tokens))
            p_no = sum(next(values) for _ in range(item.no_tokens))
            judgements[question] = Judgement(p_yes, p_no)
        judged.append(judgements)
    return judged


class Labeler(Protocol):
    """Judges claims: {row: its claims} -> (row, feedback) of every row, in any order."""

    def __call__(self, claims: Mapping[int, Sequence[Claim]]) -> Iterator[tuple[int, Feedback]]: ...


class PolicyLabeler:
    """A policy as `Labeler`: images are decoded and questions encoded in worker processes, in batches of `batch_tokens`.

    A question that several answers to the same image raise is asked once.
    """

    def __init__(
        self, model: nn.Module, adapter: PolicyAdapter, numerics: Numerics, prompts: PromptDataset, *, batch_tokens: int, num_workers: int
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.numerics = numerics
        self.prompts = prompts
        self.batch_tokens = batch_tokens
        self._stream = WorkStream(_QuestionEncoder(prompts, adapter), num_workers)

    def __call__(self, claims: Mapping[int, Sequence[Claim]]) -> Iterator[tuple[int, Feedback]]:
        images: dict[bytes, list[int]] = {}
        for row in claims:
            try:
                image = hashlib.blake2b(self.prompts[row].image_bytes, digest_size=16).digest()
            except RowError as error:
                yield row, failed(error.reason)
            else:
                images.setdefault(image, []).append(row)
        asked = [(rows, _distinct_questions(claims[row] for row in rows)) for rows in images.values()]
        refused: list[_AskedImage] = []
        device = next(self.model.parameters()).device
        for batch in batch_by_tokens(_askable(self._stream.results(asked), refused), self.batch_tokens, self.adapter):
            with self.numerics.autocast(device.type):
                judged = judge_questions(self.model, self.adapter, [image.questions for image in batch])
            for image, judgements in zip(batch, judged, strict=True):
                yield from ((row, _feedback(claims[row], judgements, image.questions.refused)) for row in image.rows)
        for image in refused:
            yield from ((row, _feedback(claims[row], {}, image.questions.refused)) for row in image.rows)


@dataclass(frozen=True)
class _AskedImage:
    """An image's questions, and the rows whose answers raise them."""

    rows: list[int]
    questions: EncodedQuestions

    @property
    def encoded(self) -> EncodedResponses | None:
        return self.questions.encoded


class _QuestionEncoder:
    """(rows of an image, questions) -> _AskedImage, in worker processes."""

    def __init__(self, prompts: PromptDataset, adapter: PolicyAdapter) -> None:
        self.prompts = prompts
        self.adapter = adapter

    def __call__(self, item: tuple[list[int], list[str]]) -> _AskedImage:
        rows, questions = item
        try:
            image = self.prompts[rows[0]].image
        except ValueError as error:
            return _AskedImage(rows, EncodedQuestions((), dict.fromkeys(questions, str(error)), None, 0, 0))
        return _AskedImage(rows, encode_questions(self.adapter, image, questions))


def _distinct_questions(claims: Iterable[Sequence[Claim]]) -> list[str]:
    return list(dict.fromkeys(claim.question for split in claims for claim in split if claim.question is not None))


def _askable(images: Iterable[_AskedImage], refused: list[_AskedImage]) -> Iterator[_AskedImage]:
    """The images with something to ask; the others are put into `refused`."""
    for image in images:
        if image.encoded is None:
            refused.append(image)
        else:
            yield image


def _feedback(claims: Sequence[Claim], judgements: Mapping[str, Judgement], refused: Mapping[str, str]) -> Feedback:
    reasons = [refused[claim.question] for claim in claims if claim.question in refused]
    if reasons:
        return failed(reasons[0])
    return Feedback(tuple(claims), tuple(claim.question and judgements[claim.question] for claim in claims))


def give_feedback(answers: Mapping[int, tuple[str, str]], splitter: Splitter, labeler: Labeler) -> Iterator[tuple[int, Feedback]]:
    """{row: (question, answer)} -> (row, feedback) of every row, in any order."""
    claims: dict[int, list[Claim]] = {}
    for row, (question, answer) in answers.items():
        try:
            split = splitter(question, answer)
        except ValueError as error:
            yield row, failed(str(error))
            continue
        if split:
            claims[row] = split
        else:
            yield row, failed(NO_CLAIMS)
    yield from labeler(claims)
