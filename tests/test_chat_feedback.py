"""Claims by a language model and P(yes) by a server: what is asked, what is read off the replies, and which answers fail alone."""

import base64
import io
import json
import math

import datasets
import pytest
from PIL import Image

from muffin.chat import answered, image_url
from muffin.chat import failed as failed_line
from muffin.chat_feedback import ChatLabeler, ChatSplitter, judgement_of, parse_list
from muffin.claims import Claim
from muffin.feedback import Judgement
from muffin.judge import JudgeOptions, Reply, load_judge
from muffin.pairs import PromptDataset
from tests.openai_server import CREATED, serve


def test_lists_are_read_out_of_what_models_write():
    assert parse_list("Sure!\n1. A cat sleeps.\n 2) The cat is red. \n- A dog.\n* It runs\n\u2022 x\n(3) y\nDone.") == [
        *("A cat sleeps.", "The cat is red.", "A dog.", "It runs", "x", "y")
    ]
    for text in ("", "A cat sleeps.", "1.\n-"):
        with pytest.raises(ValueError, match="no list"):
            parse_list(text)


class ScriptedJudge:
    """Statements by answer, questions by their number."""

    name = "scripted"

    def __init__(self, statements, questions):
        self.statements, self.questions, self.rounds = statements, questions, []

    def ask(self, prompts):
        self.rounds.append(len(prompts))
        if len(self.rounds) == 1:
            return [self.statements[prompt.rpartition("Answer: ")[2]] for prompt in prompts]
        return [self.questions[prompt.rpartition("1. ")[2].splitlines()[0]] for prompt in prompts]

    def describe(self):
        return {}


def test_every_answer_is_split_or_fails_alone():
    statements = {
        "two": Reply("1. A cat.\n2. A dog."),
        "nothing": Reply("None."),
        "odd": Reply("I see a cat"),
        "broken": Reply(None, "request failed: 500"),
        "uneven": Reply("1. A bird.\n2. A bird."),
        "mute": Reply("- A fish."),
    }
    questions = {
        "A cat.": Reply("1. Is there a cat?\n2. Is there a dog?"),
        "A bird.": Reply("1. Is there a bird?"),
        "A fish.": Reply(None, "request failed: x"),
    }
    judge = ScriptedJudge(statements, questions)
    splitter = ChatSplitter(judge, [("Q", answer) for answer in [*statements, "two", " "]])
    assert judge.rounds == [6, 3], "equal answers are asked about once, empty ones not at all"
    assert splitter("Q", "two") == [
        Claim("A cat.", "Is there a cat? Please answer yes or no."),
        Claim("A dog.", "Is there a dog? Please answer yes or no."),
    ]
    assert splitter("Q", "nothing") == splitter("Q", " ") == []
    for answer, reason in {
        "odd": "claims: the reply holds no list",
        "broken": "claims: request failed: 500",
        "uneven": "questions: 2 statements have 1 questions",
        "mute": "questions: request failed: x",
    }.items():
        with pytest.raises(ValueError, match=reason):
            splitter("Q", answer)


def line_with(top):
    logprobs = None if top is None else {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": top}]}
    choice = {"message": {"content": "Yes"}, "finish_reason": "length", "logprobs": logprobs}
    return answered("n", {"model": "m", "choices": [choice]})


def test_probabilities_are_summed_over_the_words_for_yes_and_no():
    chances = {"yes": 0.1, " Yes": 0.2, "Yes": 0.3, "no": 0.05, "No": 0.15, "YES": 0.01, "Yesterday": 0.02}
    line = line_with([{"token": token, "logprob": math.log(p)} for token, p in chances.items()])
    assert judgement_of(line) == Judgement(pytest.approx(0.6), pytest.approx(0.2))
    assert judgement_of(line_with([{"token": "Maybe", "logprob": -0.1}])) == Judgement(0, 0)  # no mass on either: rejected
    for line in (line_with(None), line_with([])):
        with pytest.raises(ValueError, match="gave no log-probs"):
            judgement_of(line)
    with pytest.raises(ValueError, match="request failed: busy"):
        judgement_of(failed_line("n", 503, "busy"))


def picture(kind, color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(buffer, kind)
    return buffer.getvalue()


def test_pictures_go_out_as_they_are_or_as_png():
    for kind, sent in (("JPEG", "image/jpeg"), ("PNG", "image/png"), ("BMP", "image/png")):
        encoded = picture(kind, "red")
        head, _, data = image_url(encoded, Image.new("RGB", (4, 3), "red")).partition(",")
        assert head == f"data:{sent};base64"
        assert (base64.b64decode(data) == encoded) == (kind != "BMP")
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (4, 3)


def test_a_server_labels_claims(tmp_path):
    """Red pictures have red things; the question that the server cannot take fails its answer alone."""

    def answer(body):
        image, text = body["messages"][0]["content"]
        color = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))).getpixel((0, 0))
        if "broken" in text["text"]:
            return 400, "{}"
        right = ("red" in text["text"]) == (color == (255, 0, 0))
        top = [{"token": "Yes", "logprob": math.log(0.9 if right else 0.2)}, {"token": "No", "logprob": math.log(0.1 if right else 0.7)}]
        choice = {"index": 0, "message": {"role": "assistant", "content": "Yes"}, "finish_reason": "length"}
        logprobs = {"content": [{"token": "Yes", "logprob": -1.0, "top_logprobs": top}]}
        return 200, json.dumps({"model": "m", "created": CREATED, "choices": [choice | {"logprobs": logprobs}]})

    shown = [picture("PNG", "red"), picture("PNG", "blue"), b"no image", picture("PNG", "red")]
    prompts = PromptDataset(datasets.Dataset.from_list([{"image": {"bytes": b, "path": None}, "question": "Q"} for b in shown]))
    red, blue, none = Claim("r", "Is it red?"), Claim("b", "Is it blue?"), Claim("?", None)
    asked = {0: [red, blue, none], 1: [red], 2: [red], 3: [red, Claim("x", "Is it broken?")]}
    with serve(answer) as server:
        options = JudgeOptions(judge="endpoint", judge_base_url=server.url, judge_model="m", judge_retries=0)
        labeler = ChatLabeler(load_judge(options, tmp_path / "out.json", {}), prompts)
        feedback = dict(labeler(asked))
        assert len(server.requests) == 4, "row 3 shows the picture of row 0: the same question about it is one request"
        assert server.requests[0] | {"messages": 0} == {
            "model": "m",
            "messages": 0,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": 20,
        }
    yes, no = Judgement(pytest.approx(0.9), pytest.approx(0.1)), Judgement(pytest.approx(0.2), pytest.approx(0.7))
    assert feedback[0].judgements == (yes, no, None) and feedback[0].score == -2
    assert feedback[1].judgements == (no,) and feedback[1].score == -1
    assert feedback[2].score is None and "does not decode" in feedback[2].failure
    assert feedback[3].score is None and "request failed" in feedback[3].failure
