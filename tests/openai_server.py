"""A server on loopback that speaks OpenAI's chat completions, for tests: what it answers, and how it fails, is up to the test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# body of a request -> text of the reply, or (HTTP status, raw content): a failure, or something that is no completion
Answer = Callable[[dict[str, Any]], str | tuple[int, str]]
CREATED = 1_767_225_600  # 2026-01-01, midnight UTC


class OpenAIServer:
    """url: what clients take as base_url. requests: the bodies that came, in their order; keys: the keys that they came with."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


@contextmanager
def serve(answer: Answer) -> Iterator[OpenAIServer]:
    """Run a server on a free port while the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append(body)
                server.keys.append(self.headers.get("Authorization"))
            found = answer(body) if self.path == "/v1/chat/completions" else (404, "{}")
            status, content = found if isinstance(found, tuple) else (200, json.dumps(completion(body, found)))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content.encode())))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *arguments: Any) -> None:
            """Quiet."""

    lock = threading.Lock()
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = OpenAIServer(f"http://127.0.0.1:{listener.server_port}/v1")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def completion(body: dict[str, Any], text: str) -> dict[str, Any]:
    """A chat completion as servers write it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": CREATED, "model": f"{body['model']}-2026", "choices": [choice]}
