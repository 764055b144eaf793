"""A live judge: a server's replies are stored as they come, failures are values with a cap on tries, a local model answers its template."""

import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from muffin.chat import Endpoint, LocalModel
from muffin.judge import JudgeOptions, Reply, load_judge
from tests.openai_server import serve


def options_for(server, **changes):
    return JudgeOptions(judge="endpoint", judge_base_url=server.url, judge_model="m", judge_timeout=5.0, **changes)


def prompt_of(body):
    return body["messages"][0]["content"]


def test_replies_of_a_server_are_stored_and_asked_once(tmp_path):
    with serve(lambda body: prompt_of(body).upper()) as server:
        options, output = options_for(server, judge_seed=3), tmp_path / "result.json"
        judge = load_judge(options, output, {"OPENAI_API_KEY": "secret"})
        assert judge.ask(["one", "two", "one"]) == [Reply("ONE"), Reply("TWO"), Reply("ONE")]
        assert judge.describe() == {
            "model": "m",
            "answered_as": ["m-2026"],
            "date": "2026-01-01",
            "temperature": 0.0,
            "max_tokens": 1024,
            "seed": 3,
        }
        assert server.keys == ["Bearer secret"] * 2
        assert {json.dumps(body, sort_keys=True) for body in server.requests} == {
            json.dumps(
                {
                    "model": "m",
                    "messages": [{"role": "user", "content": text}],
                    "temperature": 0.0,
                    "max_tokens": 1024,
                    "seed": 3,
                },
                sort_keys=True,
            )
            for text in ("one", "two")
        }
        assert load_judge(options, output, {}).ask(["two", "three"]) == [Reply("TWO"), Reply("THREE")]
        assert [prompt_of(body) for body in server.requests[2:]] == ["three"]
        assert load_judge(options_for(server, judge_seed=4), output, {}).ask(["two"]) == [Reply("TWO")]  # another request
        assert len(server.requests) == 4
    replay = JudgeOptions(judge_model="m", judge_seed=3)  # the server is gone, its replies are not
    assert load_judge(replay, output, {}).ask(["one", "three"]) == [Reply("ONE"), Reply("THREE")]
    assert "secret" not in (tmp_path / "result.replies.jsonl").read_text()


def test_a_request_that_fails_is_a_value_and_tries_have_a_cap(tmp_path):
    busy = Counter()

    def answer(body):
        prompt = prompt_of(body)
        busy[prompt] += 1
        if prompt == "busy once" and busy[prompt] == 1:
            return 429, "{}"
        failures = {
            "refused": (400, '{"error": {"message": "too long"}}'),
            "down": (500, "{}"),
            "html": (200, "<html>"),
            "odd": (200, "[]"),
        }
        return failures.get(prompt, "fine")

    prompts = ["busy once", "refused", "down", "html", "odd", "good"]
    with serve(answer) as server:
        options, output = options_for(server, judge_retries=1), tmp_path / "result.json"
        found = dict(zip(prompts, load_judge(options, output, {}).ask(prompts), strict=True))
        assert found["busy once"] == found["good"] == Reply("fine")
        assert busy == {"busy once": 2, "refused": 1, "down": 2, "html": 1, "odd": 1, "good": 1}
        assert all(found[prompt].text is None for prompt in ("refused", "down", "html", "odd"))
        assert "too long" in found["refused"].failure and "500" in found["down"].failure
        assert "no JSON" in found["html"].failure and "no choices" in found["odd"].failure
        assert len((tmp_path / "result.replies.jsonl").read_text().splitlines()) == 6
        again = load_judge(options, output, {}).ask(prompts)  # what failed is asked again, what was answered is not
        assert busy == {"busy once": 2, "refused": 2, "down": 4, "html": 2, "odd": 2, "good": 1}
        assert [reply.text for reply in again] == ["fine", None, None, None, None, "fine"]


def test_a_server_that_is_not_there_stops_the_run_and_loses_nothing(tmp_path):
    """Missing values are for requests that fail among others; with nobody there every row would be one."""
    with serve(lambda body: (503, "{}") if prompt_of(body) == "busy" else "fine") as server:
        options, output = options_for(server, judge_retries=0), tmp_path / "result.json"
        with pytest.raises(ValueError, match="m answered none of 1 requests; request failed: Error code: 503"):
            load_judge(options, output, {}).ask(["busy"])
        assert [reply.text for reply in load_judge(options, output, {}).ask(["x", "busy"])] == ["fine", None]
    with pytest.raises(ValueError, match="m answered none of 2 requests; request failed: APIConnectionError.*same command again"):
        load_judge(options, output, {}).ask(["y", "z"])
    assert load_judge(options, output, {}).ask(["x"]) == [Reply("fine")]
    assert [reply.text for reply in load_judge(options, output, {}).ask(["x", "y"])] == ["fine", None]


@pytest.mark.parametrize("end", ['{"custom_id": "half a li', '{"custom_id": "of another program", "response": null}'])
def test_a_line_that_was_not_ended(end, tmp_path):
    """What a kill cut off is dropped and asked again; a whole last line without a line end stays, and new ones go below it."""
    with serve(lambda body: "one\u2028line\x85" + prompt_of(body)) as server:  # characters that are line ends to str.splitlines
        options, output, replies = options_for(server), tmp_path / "result.json", tmp_path / "result.replies.jsonl"
        first = load_judge(options, output, {}).ask(["a"])
        with replies.open("a") as file:
            file.write(end)
        assert load_judge(options, output, {}).ask(["a", "b"]) == [*first, Reply("one\u2028line\x85b")]
        assert len(server.requests) == 2
        names = [json.loads(line)["custom_id"] for line in replies.read_text().split("\n") if line]
        assert len(names) == 2 + ("another" in end)
        load_judge(options, output, {}).ask(["a", "b"])
        assert len(server.requests) == 2


def test_a_kill_between_replies_loses_none(tmp_path):
    with serve(lambda body: "fine") as server:
        endpoint = Endpoint(server.url, api_key="x", concurrency=1, retries=0, timeout=5.0)
        requests = {name: {"model": "m", "messages": [{"role": "user", "content": name}]} for name in "abcdefgh"}
        lines = endpoint(requests)
        first = next(lines)
        lines.close()  # the caller dies: what has not begun is not asked
        assert first["response"]["status_code"] == 200 and len(server.requests) < len(requests)


def test_contradicting_options_and_a_missing_key_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--judge endpoint with --judge_base_url None"):
        JudgeOptions(judge="endpoint")
    with pytest.raises(ValueError, match="--judge files with --judge_base_url http://x"):
        JudgeOptions(judge_base_url="http://x")
    with pytest.raises(ValueError, match="--judge_concurrency 0"):
        JudgeOptions(judge_concurrency=0)
    options = JudgeOptions(judge="endpoint", judge_base_url="https://example.org/v1", judge_api_key_env="MY_KEY")
    with pytest.raises(ValueError, match="wants a key, and the environment variable MY_KEY is not set"):
        load_judge(options, tmp_path / "result.json", {})


# --- a local model


@pytest.fixture(scope="module")
def chat_model(tiny_llava_path, tmp_path_factory):
    """A random GPT-2 with the tiny tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("chat_model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny_llava_path / "tokenizer.json"), eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2, eos_token_id=2, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_local_model_answers_as_plain_greedy_decoding_does(chat_model, tmp_path):
    prompts = ["Which one?", "A longer question about the red circle and the blue square?", "Yes or no"]
    options = JudgeOptions(judge="local", judge_model=str(chat_model), judge_max_tokens=6)
    replies = load_judge(options, tmp_path / "result.json", {}).ask(prompts)

    bodies = [json.loads(line)["response"]["body"] for line in (tmp_path / "result.replies.jsonl").read_text().splitlines()]
    assert {body["model"] for body in bodies} == {str(chat_model)}
    stored = [body["choices"][0]["message"]["content"] for body in bodies]

    tokenizer, model = AutoTokenizer.from_pretrained(chat_model), AutoModelForCausalLM.from_pretrained(chat_model).eval()
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = tokenizer(f"user: {prompt}\nassistant:", add_special_tokens=False).input_ids
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != 2:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = tokenizer.decode([token for token in ids[start:] if token != 2], skip_special_tokens=True).strip()
        assert expected in stored and len(expected) > 3
        assert reply == (Reply(expected) if ids[-1] == 2 else Reply(None, "reply was cut at --judge_max_tokens"))


def test_sampling_depends_on_the_seed_alone(chat_model):
    model = LocalModel(str(chat_model))

    def texts(seed, *prompts):
        settings = {"max_tokens": 8, "temperature": 1.0, "seed": seed}
        requests = {prompt: {"messages": [{"role": "user", "content": prompt}], **settings} for prompt in prompts}
        return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in model(requests)}

    together, alone = texts(1, "one", "two"), texts(1, "two")
    assert together["two"] == alone["two"] and texts(2, "two")["two"] != alone["two"]


def test_a_model_without_chat_template_is_refused(tiny_llava_path, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny_llava_path / "tokenizer.json"), eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        LocalModel(str(tmp_path))
