"""The judge behind files: requests go out once, replies come back by content, failures are values."""

import json

import pytest

from muffin.judge import JudgeOptions, RepliesMissing, Reply, describe_missing, load_judge

CREATED = 1_767_225_600  # 2026-01-01, midnight UTC


def reply_line(request, text, **changes):
    """A line of batch output as OpenAI and vLLM write it."""
    message = {"role": "assistant", "content": text}
    body = {"model": "m-2026", "created": CREATED, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    line = {"id": "x", "custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}
    return line | changes


def write_lines(path, lines, mode="w"):
    with path.open(mode) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def requests_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "result.requests.jsonl").read_text().splitlines()]


def test_requests_go_out_and_replies_come_back(tmp_path):
    options, output = JudgeOptions(judge_model="m"), tmp_path / "result.json"
    with pytest.raises(RepliesMissing, match="2 of 2 prompts wait for the judge m; they are in .*result.requests.jsonl"):
        load_judge(options, output, {}).ask(["one", "t\u00e9 two", "one"])  # equal prompts are one request
    requests = requests_of(tmp_path)
    assert [request["body"]["messages"][0]["content"] for request in requests] == ["one", "t\u00e9 two"]
    assert requests[0]["url"] == "/v1/chat/completions" and requests[0]["method"] == "POST"
    assert requests[0]["body"] | {"messages": 0} == {"model": "m", "messages": 0, "temperature": 0.0, "max_tokens": 1024}

    write_lines(tmp_path / "result.replies.jsonl", [reply_line(requests[1], "B"), reply_line(requests[0], "A")])
    judge = load_judge(options, output, {})
    assert judge.ask(["one", "t\u00e9 two", "one"]) == [Reply("A"), Reply("B"), Reply("A")]
    assert judge.describe() == {"model": "m", "answered_as": ["m-2026"], "date": "2026-01-01", "temperature": 0.0, "max_tokens": 1024}
    with pytest.raises(RepliesMissing, match="1 of 2 prompts wait"):  # only what is new goes out
        judge.ask(["one", "three"])
    assert [request["body"]["messages"][0]["content"] for request in requests_of(tmp_path)] == ["three"]
    for other in (
        JudgeOptions(judge_model="n"),
        JudgeOptions(judge_model="m", judge_temperature=0.2),
        JudgeOptions(judge_model="m", judge_seed=1),
    ):
        with pytest.raises(RepliesMissing, match="1 of 1 prompts wait"):  # another judge's replies are not taken
            load_judge(other, output, {}).ask(["one"])


def test_failures_are_values_and_may_be_asked_again(tmp_path):
    options, output, replies = JudgeOptions(), tmp_path / "result.json", tmp_path / "result.replies.jsonl"
    with pytest.raises(RepliesMissing):
        load_judge(options, output, {}).ask(list("abcd"))
    requests = requests_of(tmp_path)
    cut = reply_line(requests[3], "half a sen")
    cut["response"]["body"]["choices"][0]["finish_reason"] = "length"
    lines = [
        reply_line(requests[0], "fine"),
        reply_line(requests[1], "", response=None, error={"message": "overloaded"}),
        reply_line(requests[2], "", response={"status_code": 503, "body": {}}),
        cut,
    ]
    write_lines(replies, lines)
    found = load_judge(options, output, {}).ask(list("abcd"))
    failures = ["request failed: overloaded", "request failed: 503", "reply was cut at --judge_max_tokens"]
    assert found == [Reply("fine"), *(Reply(None, failure) for failure in failures)]
    missing = describe_missing([*found, Reply("x")], ["fine", None, None, None, None], "not read")
    assert missing == {**dict.fromkeys(failures, 1), "not read": 1}
    write_lines(replies, [reply_line(requests[1], "second try"), reply_line(requests[0], "too late")], mode="a")
    assert load_judge(options, output, {}).ask(["a", "b"]) == [Reply("fine"), Reply("second try")]
    write_lines(replies, [{"id": "no name"}], mode="a")
    with pytest.raises(ValueError, match=r"replies.jsonl, line 7: want a line of OpenAI's batch output"):
        load_judge(options, output, {})
