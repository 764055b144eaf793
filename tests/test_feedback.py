"""P(yes) and P(no) against the softmax of a plain forward, scores by hand, and answers that cannot be judged."""

import io
import random
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from torch import nn

from muffin.claims import Claim
from muffin.feedback import (
    FEEDBACK_FEATURES,
    NO_CLAIMS,
    Feedback,
    Judgement,
    PolicyLabeler,
    encode_questions,
    failed,
    feedback_columns,
    give_feedback,
    judge_questions,
)
from muffin.packing import pack
from muffin.pairs import PromptDataset
from muffin.policies import Checkpoint, PolicyOptions, generation_inputs, load_adapter, load_policy
from muffin.provenance import Numerics
from tests import tiny

FP32 = Numerics("float32", None, None, "sdpa")
QUESTIONS = (
    "Is there a red circle? Please answer yes or no.",
    "Is there a red ring? Please answer yes or no.",
    "Are there 12 dogs, all of them at the table? Please answer yes or no.",
    "Is it true that 红色的猫坐在车上? Please answer yes or no.",
    "Is there a red circle",
)


@pytest.fixture(scope="module")
def adapter(tiny_llava_path):
    return load_adapter(Checkpoint(tiny_llava_path), PolicyOptions())


@pytest.fixture(scope="module")
def model(tiny_llava_path, adapter) -> nn.Module:
    """In float64, and with yes and no made probable: a random model gives its 2,064 words 0.0005 each."""
    model = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float64).eval()
    head = model.lm_head.weight
    words = sorted({adapter.tokenizer(f"ASSISTANT: {word}").input_ids[-1] for word in ("yes", "Yes", "no", "No")})
    with torch.no_grad():
        head[words] *= 4
    return model


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    rng = random.Random(0)
    return [tiny.draw_image(rng)[0] for _ in range(3)]


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


@torch.no_grad()
def plain_judgement(model, adapter, image: Image.Image, question: str) -> Judgement:
    """From one forward of the stock model on the whole prompt: the softmax of its last logits, by the tokens of the four words."""
    inputs = generation_inputs(adapter, [adapter.encode(image, question, ())])
    probabilities = model(**inputs).logits[0, -1].softmax(-1)
    prompt = f"USER: <image>\n{question} ASSISTANT:"
    ids = {
        word: adapter.tokenizer(f"{prompt} {word}").input_ids[len(adapter.tokenizer(prompt).input_ids)] for word in "yes Yes no No".split()
    }
    assert len(set(ids.values())) == 4
    return Judgement(
        float(probabilities[ids["yes"]] + probabilities[ids["Yes"]]), float(probabilities[ids["no"]] + probabilities[ids["No"]])
    )


def close(judgement: Judgement) -> Judgement:
    return Judgement(pytest.approx(judgement.p_yes, rel=1e-9), pytest.approx(judgement.p_no, rel=1e-9))


# --- probabilities


class FlattenedRows(nn.Module):
    """The stock LLaVA standing in for a family without prefix sharing, whose forward keeps rows of the flattened batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, logits_to_keep, **inputs):
        outputs = self.model(**inputs)
        outputs.logits = outputs.logits.flatten(0, 1)[logits_to_keep][None]
        return outputs


@pytest.mark.parametrize("sharing", [True, False])
def test_probabilities_are_those_of_a_plain_forward(model, adapter, images, sharing):
    family = SimpleNamespace(spec=replace(adapter.spec, prefix_sharing=sharing), cat_vision=adapter.cat_vision)
    asked = [QUESTIONS, QUESTIONS[1:3], QUESTIONS[3:4]]
    batch = [encode_questions(adapter, opened(png), questions) for png, questions in zip(images, asked, strict=True)]
    judged = judge_questions(model if sharing else FlattenedRows(model), family, batch)
    assert [tuple(judgements) for judgements in judged] == asked
    spread = []
    for png, judgements in zip(images, judged, strict=True):
        for question, judgement in judgements.items():
            expected = plain_judgement(model, adapter, opened(png), question)
            assert judgement == close(expected)
            spread.append(expected.p_yes / expected.p_no)
    assert max(spread) > 2 * min(spread) and any(value > 1 for value in spread) and any(value < 1 for value in spread)


def test_questions_share_the_image_and_the_words_before_them(model, adapter, images):
    questions = encode_questions(adapter, opened(images[0]), QUESTIONS[:2])
    prompts = [adapter.encode(opened(images[0]), question, ()).prompt_ids for question in QUESTIONS[:2]]
    shared = len(questions.encoded.prompt_ids)
    assert torch.equal(prompts[0][:shared], prompts[1][:shared]) and prompts[0][shared] != prompts[1][shared]
    assert adapter.tokenizer.decode(prompts[0][shared - 3 : shared]) == "is there a red"[-len("there a red") :]
    assert (questions.encoded.prompt_ids == adapter.image_token_id).sum() == 16
    computed = pack([questions.encoded], adapter).num_tokens
    assert computed == shared + sum(len(prompt) - shared for prompt in prompts), "four answer tokens are read off one row"


def test_words_that_begin_with_one_token_count_once(model, adapter, images):
    """With "yes" and "Yes" one token (a lower-casing tokenizer), P(yes) is its probability and not twice that."""
    ids = {word: adapter.tokenizer(f"ASSISTANT: {word}").input_ids[-1] for word in ("yes", "no")}

    def encode_seen(seen, question, responses):
        encoded = adapter.encode_seen(seen, question, responses)
        return replace(encoded, response_ids=tuple(torch.tensor([ids[response.lower()], 2]) for response in responses))

    questions = encode_questions(SimpleNamespace(see=adapter.see, encode_seen=encode_seen), opened(images[0]), QUESTIONS[:1])
    assert (questions.yes_tokens, questions.no_tokens) == (1, 1)
    (judged,) = judge_questions(model, adapter, [questions])
    with torch.no_grad():
        inputs = generation_inputs(adapter, [adapter.encode(opened(images[0]), QUESTIONS[0], ())])
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    assert judged[QUESTIONS[0]] == close(Judgement(float(probabilities[ids["yes"]]), float(probabilities[ids["no"]])))


def test_tokenizer_that_cannot_tell_yes_from_no(adapter, images):
    def encode_seen(seen, question, responses):
        return replace(adapter.encode_seen(seen, question, ()), response_ids=tuple(torch.tensor([0, 2]) for _ in responses))

    with pytest.raises(ValueError, match="want none in common"):
        encode_questions(SimpleNamespace(see=adapter.see, encode_seen=encode_seen), opened(images[0]), QUESTIONS[:1])


def test_an_image_that_the_labeler_cannot_take_refuses_every_question(images):
    def see(image):
        raise ValueError("too wide")

    questions = encode_questions(SimpleNamespace(see=see), opened(images[0]), QUESTIONS[:2])
    assert questions.encoded is None and questions.refused == dict.fromkeys(QUESTIONS[:2], "too wide")


def test_nan_stops(tiny_llava_path, adapter, images):
    broken = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        judge_questions(broken, adapter, [encode_questions(adapter, opened(images[0]), QUESTIONS)])


# --- scores


def test_score_counts_rejected_claims():
    yes, no, tie = Judgement(0.5, 0.4), Judgement(0.1, 0.2), Judgement(0.3, 0.3)
    claims = tuple(Claim(text, text) for text in "abcd")
    assert [judgement.accepted for judgement in (yes, no, tie)] == [True, False, False]
    assert Feedback(claims[:2], (yes, yes)).score == 0
    assert Feedback(claims[:3], (yes, no, tie)).score == -2
    assert Feedback(claims, (yes, None, None, no)).score == -3, "claims without a question are rejected"
    assert failed("no claims").score is None


def test_columns():
    feedback = [Feedback((Claim("a", "A?"), Claim("b", None)), (Judgement(0.0, 1.0), None)), failed("why")]
    columns = feedback_columns(feedback)
    assert columns == {
        "claims": [["a", "b"], []],
        "claim_questions": [["A?", None], []],
        "p_yes": [[0.0, None], []],
        "p_no": [[1.0, None], []],
        "score": [-2, None],
        "failure": [None, "why"],
    }
    assert datasets.Dataset.from_dict(columns, features=FEEDBACK_FEATURES)[0]["p_no"] == [1.0, None]


# --- a policy as labeler


def split_at_bars(question: str, answer: str) -> list[Claim]:
    """Claims between bars; "!" stands for a claim without a question, "?" cannot be split."""
    if answer == "?":
        raise ValueError("cannot be split")
    return [Claim(part, None if part == "!" else f"Is there {part}?") for part in answer.split("|") if part]


@pytest.fixture
def prompts(images) -> PromptDataset:
    """Rows 0, 1 and 4 show the same image, 3 shows none that decodes."""
    shown = [images[0], images[0], images[1], b"no image", images[0], None]
    rows = [{"image": {"bytes": png, "path": None}, "question": f"What is it, {number}?"} for number, png in enumerate(shown)]
    return PromptDataset(datasets.Dataset.from_list(rows))


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_policy_labels_answers(model, adapter, images, prompts, batch_tokens):
    labeler = PolicyLabeler(model, adapter, FP32, prompts, batch_tokens=batch_tokens, num_workers=0)
    answers = {0: "a dog|a cat|!|a dog", 1: "a cat|12 cars", 2: "a dog", 3: "a dog", 4: "a </s> dog|a cat", 5: "a dog"}
    asked = {row: ("What is it?", answer) for row, answer in answers.items()} | {6: ("", ""), 7: ("", "?")}
    feedback = dict(give_feedback(asked, split_at_bars, labeler))
    assert sorted(feedback) == list(range(8))

    for row, png, answer in ((0, images[0], answers[0]), (1, images[0], answers[1]), (2, images[1], answers[2])):
        expected = [
            plain_judgement(model, adapter, opened(png), f"Is there {part}?") if part != "!" else None for part in answer.split("|")
        ]
        assert feedback[row].claims == tuple(split_at_bars("", answer))
        assert feedback[row].judgements == tuple(judgement and close(judgement) for judgement in expected)
        assert feedback[row].score == -sum(judgement is None or judgement.p_yes <= judgement.p_no for judgement in expected)
    assert {row: feedback[row].failure.partition(":")[0].partition(",")[0].partition(" (")[0] for row in (3, 4, 5, 6, 7)} == {
        3: "image does not decode",
        4: "the question holds '</s>'",
        5: "image has neither bytes nor a path",
        6: "no claims",
        7: "cannot be split",
    }
    assert feedback[6].failure == NO_CLAIMS
    assert all(feedback[row].score is None for row in (3, 4, 5, 6, 7))


def test_a_question_is_asked_once_per_image(model, adapter, prompts, monkeypatch):
    computed = []
    monkeypatch.setattr("muffin.feedback.pack", lambda encoded, family: computed.append(encoded) or pack(encoded, family))
    labeler = PolicyLabeler(model, adapter, FP32, prompts, batch_tokens=100_000, num_workers=0)
    claims = [Claim("a dog", "Is there a dog?"), Claim("a cat", "Is there a cat?")]
    dict(labeler({0: claims, 1: claims * 2, 2: claims, 4: claims[:1]}))
    assert [[len(item.response_ids) for item in encoded] for encoded in computed] == [[8, 8]]


def test_workers_give_the_same(model, adapter, prompts):
    claims = {row: [Claim("a", question) for question in QUESTIONS] for row in (0, 2, 3)}
    here, there = (dict(PolicyLabeler(model, adapter, FP32, prompts, batch_tokens=300, num_workers=workers)(claims)) for workers in (0, 1))
    assert here == there and here[3].failure
