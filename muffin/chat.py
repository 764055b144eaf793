"""What answers chat requests: a server that speaks OpenAI's protocol, or an instruct model loaded here.

    {name: body of a chat completion} --runner--> a line of OpenAI's batch output each, in any order --choice_of--> its first choice

A runner answers every request once. One that finally fails is a line with the reason, not an exception: what others said is not lost.
"""

import base64
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

Body = Mapping[str, Any]  # model, messages, temperature, max_tokens, seed, ...: the JSON that /chat/completions takes
Line = dict[str, Any]  # {"custom_id", "response": {"status_code", "body"}, "error"}

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP", "GIF")  # what servers read
NOT_NOW = (429, 502, 503, 504)  # HTTP statuses of a server that is busy, or that a proxy does not find


class Runner(Protocol):
    """Answers requests, named by the caller; lines come as they are ready and may be stopped taking at any time."""

    def __call__(self, requests: Mapping[str, Body]) -> Iterator[Line]: ...


def answered(name: str, body: Mapping[str, Any]) -> Line:
    """The line of a request that was answered with `body`, a chat completion."""
    return {"custom_id": name, "response": {"status_code": 200, "body": dict(body)}, "error": None}


def failed(name: str, status: int | None, message: str) -> Line:
    """The line of a request that finally failed; status: HTTP's, None when nothing came back."""
    response = None if status is None else {"status_code": status, "body": {}}
    return {"custom_id": name, "response": response, "error": {"message": message}}


def choice_of(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first choice of a completion: message with its text in content, finish_reason, logprobs. Raises ValueError with the reason."""
    response = line.get("response") or {}
    body = response.get("body") or {}
    choice = (body.get("choices") or [{}])[0]
    if response.get("status_code", 200) != 200 or not isinstance((choice.get("message") or {}).get("content"), str):
        error = line.get("error") or body.get("error") or {}
        message = error.get("message") if isinstance(error, Mapping) else error
        raise ValueError(f"request failed: {message or response.get('status_code', 'no reply')}")
    return choice


def unreachable(line: Mapping[str, Any]) -> bool:
    """Whether nothing came back from a server, or nothing but that it cannot answer now."""
    response = line.get("response")
    return response is None or response.get("status_code") in NOT_NOW


def image_url(encoded: bytes, image: Image.Image) -> str:
    """The file of a picture as a data URL; as PNG where servers may not know its format. image: the same, decoded."""
    with Image.open(io.BytesIO(encoded)) as opened:
        kind = opened.format
    if kind not in SENT_AS_THEY_ARE:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        kind, encoded = "PNG", buffer.getvalue()
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(encoded).decode()}"


def image_message(url: str, text: str) -> dict[str, Any]:
    """A user's message of a picture, by its data URL, and a text."""
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}


class Endpoint:
    """A server that speaks OpenAI's chat completions (OpenAI, vLLM, SGLang, ...), asked by `concurrency` requests at a time.

    api_key: sent to the server; local servers take any. retries: further tries of a request after a timeout, a broken connection, HTTP 408,
    409, 429 or 5xx, with growing pauses (openai's own); then it has failed. timeout: seconds that one try may take.
    Raises ValueError when the package `openai` is not installed.
    """

    def __init__(self, base_url: str, *, api_key: str, concurrency: int, retries: int, timeout: float) -> None:
        try:
            import openai
        except ImportError as error:
            raise ValueError('asking a server needs the package openai; install it with pip install -e ".[eval]"') from error
        self._openai = openai
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=retries, timeout=timeout)
        self._concurrency = concurrency

    def __call__(self, requests: Mapping[str, Body]) -> Iterator[Line]:
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            asked = [pool.submit(self._ask, name, body) for name, body in requests.items()]
            for done in tqdm(as_completed(asked), total=len(asked), desc="asking", unit="request", leave=False):
                yield done.result()
        finally:  # also when the caller stops: requests that have not begun are dropped
            pool.shutdown(cancel_futures=True)

    def _ask(self, name: str, body: Body) -> Line:
        try:
            response = self._client.chat.completions.with_raw_response.create(**body)
            completion = json.loads(response.text)
        except self._openai.APIStatusError as error:
            return failed(name, error.status_code, error.message)
        except self._openai.OpenAIError as error:  # timeouts, connections
            return failed(name, None, f"{type(error).__name__}: {error}")
        except json.JSONDecodeError as error:
            return failed(name, None, f"the server's reply is no JSON: {error}")
        if not isinstance(completion, dict) or not completion.get("choices"):
            return failed(name, None, f"the server's reply has no choices: {response.text[:200]!r}")
        return answered(name, completion)


class LocalModel:
    """An instruct model behind its chat template, through transformers; text only.

    name_or_path: folder or hub id of a causal language model. Code that a checkpoint brings along is never run. Greedy requests run in
    batches of `batch_size`; a request that samples runs alone, seeded by its own `seed`, so that its reply does not depend on others.
    """

    def __init__(self, name_or_path: str, *, batch_size: int = 8) -> None:
        self.name = name_or_path
        self._batch_size = batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", trust_remote_code=False)
        if self._tokenizer.chat_template is None:
            raise ValueError(f"{name_or_path} has no chat template; give an instruct model, or one behind a server")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype="auto", trust_remote_code=False).to(device).eval()

    def __call__(self, requests: Mapping[str, Body]) -> Iterator[Line]:
        groups: dict[tuple[int, float], list[str]] = {}
        for name, body in requests.items():
            groups.setdefault((body["max_tokens"], body.get("temperature", 1.0)), []).append(name)
        with tqdm(total=len(requests), desc="asking", unit="request", leave=False) as progress:
            for (max_tokens, temperature), names in groups.items():
                size = self._batch_size if temperature == 0 else 1
                for start in range(0, len(names), size):
                    batch = names[start : start + size]
                    yield from self._answer({name: requests[name] for name in batch}, max_tokens, temperature)
                    progress.update(len(batch))

    @torch.no_grad()
    def _answer(self, requests: Mapping[str, Body], max_tokens: int, temperature: float) -> list[Line]:
        prompts = [
            self._tokenizer.apply_chat_template(list(body["messages"]), tokenize=False, add_generation_prompt=True)
            for body in requests.values()
        ]
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(self._model.device)
        inputs.pop("token_type_ids", None)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            torch.manual_seed(next(iter(requests.values())).get("seed") or 0)
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        ids = self._model.generate(**inputs, max_new_tokens=max_tokens, pad_token_id=self._tokenizer.pad_token_id, **sampling)
        replies = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [answered(name, self._completion(reply)) for name, reply in zip(requests, replies, strict=True)]

    def _completion(self, ids: Sequence[int]) -> dict[str, Any]:
        stops = self._model.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else set(stops or ())
        ended = next((number for number, token in enumerate(ids) if token in stops), None)
        text = self._tokenizer.decode(ids[:ended], skip_special_tokens=True).strip()
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "length" if ended is None else "stop"}
        return {"model": self.name, "created": int(time.time()), "choices": [choice]}
