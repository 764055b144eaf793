"""A judge of answers: a language model that reads. What it does not say is a missing value with a reason, never an exception or a zero.

    prompts --requests.jsonl--> any runner of OpenAI's batch format --replies.jsonl--> replies, in the order of the prompts

`BatchJudge` speaks through files in OpenAI's batch format, which OpenAI's own service, `vllm run-batch` and others run. A request is named
by the hash of its content, so replies are a cache: they serve every later run that asks the same of the same model, and a stored file of
them replays a result without the model.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from muffin.provenance import hash_fields, write_atomically


@dataclass
class JudgeOptions:
    """Who judges; recipes take them as flags."""

    judge_model: str = field(default="judge", metadata={"help": "Name of the judge, as its server calls it; part of every request."})
    judge_replies: str | None = field(
        default=None,
        metadata={"help": "JSON lines of the judge's replies, OpenAI's batch output; default: beside --output, *.replies.jsonl."},
    )
    judge_temperature: float = field(default=0.0, metadata={"help": "Of the judge's sampling; 0 is greedy."})
    judge_seed: int | None = field(
        default=None, metadata={"help": "Of the judge's sampling, for servers that take one: several runs of a judge that samples."}
    )
    judge_max_tokens: int = field(default=1024, metadata={"help": "Limit on a reply, in tokens."})

    def flags(self) -> list[str]:
        """The options that were given, as command-line words."""
        return [word for name, value in vars(self).items() if value is not None for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Reply:
    """What a judge said, or why there is nothing."""

    text: str | None
    failure: str | None = None


class Judge(Protocol):
    """name: the model, as results are compared by. ask: a reply per prompt, in order. describe: what a result tells about the judge."""

    name: str

    def ask(self, prompts: Sequence[str]) -> list[Reply]: ...

    def describe(self) -> dict[str, Any]: ...


class RepliesMissing(ValueError):
    """Requests wait for the judge; the message says where they are and how they are run."""


class BatchJudge:
    """A judge behind files: replies that are there are taken, requests without a reply are written down."""

    def __init__(self, options: JudgeOptions, replies: Path) -> None:
        self.name = options.judge_model
        self.replies = replies
        self.requests = replies.with_name(replies.name.removesuffix(".jsonl").removesuffix(".replies") + ".requests.jsonl")
        settings = {"temperature": options.judge_temperature, "max_tokens": options.judge_max_tokens, "seed": options.judge_seed}
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._stored = _read_batch(replies) if replies.is_file() else {}
        self._used: dict[str, Mapping[str, Any]] = {}

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """Raises RepliesMissing, after writing the requests, when there are prompts that the file of replies does not know."""
        bodies = [self._body(prompt) for prompt in prompts]
        names = [hash_fields([json.dumps(body, sort_keys=True)])[:32] for body in bodies]
        requests = dict(zip(names, bodies, strict=True))
        waiting = {name: body for name, body in requests.items() if name not in self._stored}
        if waiting:
            lines = [{"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body} for name, body in waiting.items()]
            self.requests.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.requests, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            raise RepliesMissing(
                f"{len(waiting)} of {len(requests)} prompts wait for the judge {self.name}; they are in {self.requests}, in OpenAI's batch "
                f"format. Run them (vllm run-batch --model {self.name} -i {self.requests} -o OUT, or a batch at OpenAI), append OUT to "
                f"{self.replies}, and give this command again"
            )
        self._used |= {name: self._stored[name] for name in requests}
        return [_reply_of(self._stored[name]) for name in names]

    def describe(self) -> dict[str, Any]:
        """Asked by name, and what the replies say about themselves: models and days."""
        bodies = [line["response"]["body"] for line in self._used.values() if _reply_of(line).text is not None]
        days = sorted({datetime.fromtimestamp(body["created"], UTC).date().isoformat() for body in bodies if body.get("created")})
        found = {"model": self.name, "answered_as": sorted({str(body["model"]) for body in bodies if body.get("model")})}
        return found | {"date": " to ".join(days[:: max(1, len(days) - 1)]) or "not stored", **self._settings}

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"model": self.name, "messages": [{"role": "user", "content": prompt}], **self._settings}


def load_judge(options: JudgeOptions, output: str | Path) -> Judge:
    """The judge that the options name; its files are beside the result, `output`."""
    return BatchJudge(options, Path(options.judge_replies or Path(output).with_suffix(".replies.jsonl")))


class StoredReviews:
    """Reviews that somebody made under a prompt of his own, one per prompt and in the order of the prompts.

    path: JSON or JSON lines of texts, of rows with `review`, `text` or `content`, or of whole chat completions, as MMHal-Bench's own
    script stores them. A null is a failed request.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        text = self.path.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        self._rows = content if isinstance(content, list) else [content]
        models = {str(row["model"]) for row in self._rows if isinstance(row, dict) and row.get("model")}
        self.name = ", ".join(sorted(models)) or "not stored"

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """Raises ValueError when there are more or fewer reviews than prompts."""
        if len(self._rows) != len(prompts):
            raise ValueError(f"{self.path} holds {len(self._rows)} reviews of {len(prompts)} answers; want one each, in the same order")
        return [self._reply(row) for row in self._rows]

    def describe(self) -> dict[str, Any]:
        return {"model": self.name, "date": "not stored", "reviews": str(self.path)}

    @staticmethod
    def _reply(row: Any) -> Reply:
        if isinstance(row, dict):
            text = next((row[name] for name in ("review", "text", "content") if isinstance(row.get(name), str)), None)
            return Reply(text) if text is not None else _reply_of({"response": {"body": row}})
        return Reply(row) if isinstance(row, str) else Reply(None, "request failed: no review is stored")


def _read_batch(path: Path) -> dict[str, Mapping[str, Any]]:
    """Lines by custom_id; of several with one name the first that holds a reply counts, so that failures can be asked again."""
    found: dict[str, Mapping[str, Any]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            name = line["custom_id"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: want a line of OpenAI's batch output, with custom_id ({error!r})") from error
        if name not in found or _reply_of(found[name]).text is None:
            found[name] = line
    return found


def _reply_of(line: Mapping[str, Any]) -> Reply:
    """The text of a line of batch output; the reason where there is none, or where the reply was cut."""
    response = line.get("response") or {}
    body = response.get("body") or {}
    choices = body.get("choices") or [{}]
    text = (choices[0].get("message") or {}).get("content")
    if response.get("status_code", 200) != 200 or not isinstance(text, str):
        error = line.get("error") or body.get("error") or {}
        message = error.get("message") if isinstance(error, Mapping) else error
        return Reply(None, f"request failed: {message or response.get('status_code', 'no reply')}")
    if choices[0].get("finish_reason") == "length":
        return Reply(None, "reply was cut at --judge_max_tokens")
    return Reply(text)


def describe_missing(replies: Sequence[Reply], values: Sequence[Any], unreadable: str) -> dict[str, int]:
    """How many replies gave no value, by reason; `unreadable` is the reason where there was a reply."""
    reasons = [
        reply.failure or "no reply" if reply.text is None else unreadable
        for reply, value in zip(replies, values, strict=True)
        if value is None
    ]
    return dict(Counter(reasons).most_common())
