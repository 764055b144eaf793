"""A judge of answers: a language model that reads. What it does not say is a missing value with a reason, never an exception or a zero.

    prompts --> requests that no stored reply answers --a runner--> replies.jsonl --> replies, in the order of the prompts

Who answers is chosen by `--judge`: a server that speaks OpenAI's protocol, an instruct model loaded here, or somebody else: `files` writes
the requests down in OpenAI's batch format, which OpenAI's own service, `vllm run-batch` and others run. A request is named by the hash of
its content and every reply is stored as it comes, so replies are a cache: a killed run loses none, they serve every later run that asks the
same of the same model, and a stored file of them replays a result without the model.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from muffin.chat import Body, Endpoint, Line, LocalModel, Runner, choice_of, unreachable
from muffin.provenance import hash_fields, write_atomically

CUT = "reply was cut at --judge_max_tokens"


@dataclass
class JudgeOptions:
    """Who judges; recipes take them as flags."""

    judge: Literal["files", "endpoint", "local"] = field(
        default="files",
        metadata={"help": "Who answers requests: whoever runs a file of them, a server (--judge_base_url), or --judge_model loaded here."},
    )
    judge_base_url: str | None = field(
        default=None, metadata={"help": "Server that speaks OpenAI's chat completions: http://localhost:8000/v1. For --judge endpoint."}
    )
    judge_api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the server's key; local servers need none."}
    )
    judge_concurrency: int = field(default=8, metadata={"help": "Requests that a server is asked at a time, 1 to 64."})
    judge_retries: int = field(default=4, metadata={"help": "Further tries of a request that failed for now; then it counts as missing."})
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds that one try of a request may take."})
    judge_model: str = field(
        default="judge",
        metadata={"help": "Name of the judge, as its server calls it, or its folder or hub id (local); part of every request."},
    )
    judge_replies: str | None = field(
        default=None,
        metadata={"help": "JSON lines of the judge's replies, OpenAI's batch output; default: beside --output, *.replies.jsonl."},
    )
    judge_temperature: float = field(default=0.0, metadata={"help": "Of the judge's sampling; 0 is greedy."})
    judge_seed: int | None = field(
        default=None, metadata={"help": "Of the judge's sampling, for servers that take one: several runs of a judge that samples."}
    )
    judge_max_tokens: int = field(default=1024, metadata={"help": "Limit on a reply, in tokens."})

    def __post_init__(self) -> None:
        if (self.judge == "endpoint") != (self.judge_base_url is not None):
            raise ValueError(
                f"--judge {self.judge} with --judge_base_url {self.judge_base_url}: --judge endpoint has one, as http://localhost:8000/v1, "
                "the others have none"
            )
        if self.judge_concurrency < 1 or self.judge_retries < 0 or self.judge_timeout <= 0 or self.judge_max_tokens < 1:
            raise ValueError(
                f"--judge_concurrency {self.judge_concurrency} and --judge_max_tokens {self.judge_max_tokens} must be at least 1, "
                f"--judge_retries {self.judge_retries} at least 0, --judge_timeout {self.judge_timeout} more than 0"
            )

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

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """A reply per prompt, in order; one that failed says why."""
        ...

    def describe(self) -> dict[str, Any]:
        """Who replied, as JSON values that results keep."""
        ...


class RepliesMissing(ValueError):
    """Requests wait for the judge; the message says where they are and how they are run."""


class StoringJudge:
    """A judge with a file of replies: those that are there are taken, the others come from `runner` and are stored one by one.

    Without a runner, requests that wait for a reply are written down beside the file.
    """

    def __init__(self, options: JudgeOptions, replies: Path, runner: Callable[[], Runner] | None = None) -> None:
        """runner: called when there is something to ask; an expensive one (a model) costs nothing for a replay."""
        self._runner = runner
        self.name = options.judge_model
        self.replies = replies
        self.requests = replies.with_name(replies.name.removesuffix(".jsonl").removesuffix(".replies") + ".requests.jsonl")
        settings = {"temperature": options.judge_temperature, "max_tokens": options.judge_max_tokens, "seed": options.judge_seed}
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._stored = _read_batch(replies) if replies.is_file() else {}
        self._used: dict[str, Line] = {}

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """Replies to texts. Errors as for `complete`."""
        return [reply_of(line) for line in self.complete([self._body(prompt) for prompt in prompts])]

    def complete(self, bodies: Sequence[Body]) -> list[Line]:
        """The stored line of every request, in order. A runner is asked again what has failed before.

        Raises ValueError when nobody is there to answer: missing values are for requests, not for a server. Without a runner raises
        RepliesMissing, after writing the requests, when the file of replies does not know one.
        """
        names = [hash_fields([json.dumps(body, sort_keys=True)])[:32] for body in bodies]
        requests = dict(zip(names, bodies, strict=True))
        if self._runner is None:
            self._write_down(requests)
        else:
            self._run(self._runner, requests)
        self._used |= {name: self._stored[name] for name in requests}
        return [self._stored[name] for name in names]

    def _run(self, runner: Callable[[], Runner], requests: Mapping[str, Body]) -> None:
        known = {name for name in requests if name in self._stored and _answered(self._stored[name])}
        waiting = {name: body for name, body in requests.items() if name not in known}
        if not waiting:
            return
        self.replies.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(self.replies)
        with self.replies.open("a", encoding="utf-8") as file:
            for line in runner()(waiting):
                file.write(json.dumps(line) + "\n")
                file.flush()
                self._stored[line["custom_id"]] = line
        if all(unreachable(self._stored[name]) for name in requests):
            raise ValueError(
                f"{self.name} answered none of {len(requests)} requests; {reply_of(self._stored[next(iter(requests))]).failure}. "
                "Mend that and give the same command again: what is finished is kept"
            )

    def _write_down(self, requests: Mapping[str, Body]) -> None:
        waiting = {name: body for name, body in requests.items() if name not in self._stored}
        if waiting:
            lines = [{"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body} for name, body in waiting.items()]
            self.requests.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.requests, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            raise RepliesMissing(
                f"{len(waiting)} of {len(requests)} prompts wait for the judge {self.name}; they are in {self.requests}, in OpenAI's batch "
                f"format. Run them (vllm run-batch --model {self.name} -i {self.requests} -o OUT, or a batch at OpenAI), append OUT to "
                f"{self.replies}, and give this command again; or have a server asked: --judge endpoint --judge_base_url URL"
            )

    def describe(self) -> dict[str, Any]:
        """Asked by name, and what the replies say about themselves: models and days."""
        bodies = [line["response"]["body"] for line in self._used.values() if reply_of(line).text is not None]
        days = sorted({datetime.fromtimestamp(body["created"], UTC).date().isoformat() for body in bodies if body.get("created")})
        found = {"model": self.name, "answered_as": sorted({str(body["model"]) for body in bodies if body.get("model")})}
        return found | {"date": " to ".join(days[:: max(1, len(days) - 1)]) or "not stored", **self._settings}

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"model": self.name, "messages": [{"role": "user", "content": prompt}], **self._settings}


def load_judge(options: JudgeOptions, output: str | Path, environment: Mapping[str, str]) -> Judge:
    """The judge that the options name; its files are beside the result, `output`. Errors as for `choose_runner`."""
    return StoringJudge(
        options, Path(options.judge_replies or Path(output).with_suffix(".replies.jsonl")), choose_runner(options, environment)
    )


def choose_runner(options: JudgeOptions, environment: Mapping[str, str]) -> Callable[[], Runner] | None:
    """What makes the runner, once, when it is first needed; None for files. environment: where the server's key is looked up.

    Raises ValueError when the key of a server on the net is not there.
    """
    if options.judge == "files":
        return None
    if options.judge == "local":
        return cache(lambda: LocalModel(options.judge_model))
    base_url = str(options.judge_base_url)
    key = environment.get(options.judge_api_key_env)
    if key is None and base_url.startswith("https:"):
        raise ValueError(
            f"{base_url} wants a key, and the environment variable {options.judge_api_key_env} is not set; set it, or name another"
        )
    settings = {"concurrency": options.judge_concurrency, "retries": options.judge_retries, "timeout": options.judge_timeout}
    return cache(lambda: Endpoint(base_url, api_key=key or "none", **settings))


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
            content = [json.loads(line) for line in text.split("\n") if line.strip()]
        self._rows = content if isinstance(content, list) else [content]
        models = {str(row["model"]) for row in self._rows if isinstance(row, dict) and row.get("model")}
        self.name = ", ".join(sorted(models)) or "not stored"

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """Raises ValueError when there are more or fewer reviews than prompts."""
        if len(self._rows) != len(prompts):
            raise ValueError(f"{self.path} holds {len(self._rows)} reviews of {len(prompts)} answers; want one each, in the same order")
        return [self._reply(row) for row in self._rows]

    def describe(self) -> dict[str, Any]:
        """The judge's name and the file; the day is not known."""
        return {"model": self.name, "date": "not stored", "reviews": str(self.path)}

    @staticmethod
    def _reply(row: Any) -> Reply:
        if isinstance(row, dict):
            text = next((row[name] for name in ("review", "text", "content") if isinstance(row.get(name), str)), None)
            return Reply(text) if text is not None else reply_of({"response": {"body": row}})
        return Reply(row) if isinstance(row, str) else Reply(None, "request failed: no review is stored")


def _read_batch(path: Path) -> dict[str, Line]:
    """Lines by custom_id; of several with one name the first that holds a reply counts, so that failures can be asked again."""
    found: dict[str, Line] = {}
    lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other characters that str.splitlines takes for line ends
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            name = line["custom_id"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                continue  # without its line end: what a killed run was writing
            raise ValueError(f"{path}, line {number}: want a line of OpenAI's batch output, with custom_id ({error!r})") from error
        if name not in found or not _answered(found[name]):
            found[name] = line
    return found


def _end_last_line(path: Path) -> None:
    """Make room for lines behind what another program wrote without a line end; what a killed run was writing is dropped."""
    content = path.read_bytes() if path.is_file() else b""
    last = content[content.rfind(b"\n") + 1 :]
    if last.strip():
        try:
            json.loads(last)
        except ValueError:
            os.truncate(path, len(content) - len(last))
        else:
            with path.open("ab") as file:
                file.write(b"\n")


def _answered(line: Mapping[str, Any]) -> bool:
    """Whether a reply came, be it cut: asked again it would be cut again."""
    try:
        choice_of(line)
    except ValueError:
        return False
    return True


def reply_of(line: Mapping[str, Any]) -> Reply:
    """The text of a line of batch output; the reason where there is none, or where the reply was cut."""
    try:
        choice = choice_of(line)
    except ValueError as error:
        return Reply(None, str(error))
    return Reply(None, CUT) if choice.get("finish_reason") == "length" else Reply(choice["message"]["content"])


def describe_missing(replies: Sequence[Reply], values: Sequence[Any], unreadable: str) -> dict[str, int]:
    """How many replies gave no value, by reason; `unreadable` is the reason where there was a reply."""
    reasons = [
        reply.failure or "no reply" if reply.text is None else unreadable
        for reply, value in zip(replies, values, strict=True)
        if value is None
    ]
    return dict(Counter(reasons).most_common())
