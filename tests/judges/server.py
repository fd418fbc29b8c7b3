"""An OpenAI-compatible server on this machine whose replies and faults are written down beforehand."""

import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response. `cut` bytes are promised and not sent; `delay` seconds pass before it."""

    content: str | None = "Verdict: A"
    status: int = 200
    code: str = ""
    error: Mapping[str, Any] | None = None  # instead of one with that code
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # instead of a chat completion
    cut: int = 0
    delay: float = 0.0
    usage: Mapping[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    finish: str = "stop"

    @property
    def is_whole(self) -> bool:
        """Whether it is a chat completion that arrives, which is what an endpoint charges for."""
        return self.status == 200 and not self.cut and self.raw is None

    def body(self, model: str) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            error = self.error or {"message": f"no, {self.code}", "code": self.code, "type": "x"}
            return json.dumps({"error": dict(error)}).encode()
        message = {"role": "assistant", "content": self.content}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        said: dict[str, Any] = {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [choice],
        }
        return json.dumps(said | ({"usage": dict(self.usage)} if self.usage is not None else {})).encode()


Script = Callable[[dict[str, Any], int], Answer]
"""(the body of a request, how often this very body came before) -> what is answered."""


class ScriptedServer:
    """Counts what it is asked, by content, and what of it was answered whole."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.came: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.side_by_side = self.most_side_by_side = 0
        self.lock = threading.Lock()
        self.http = _Http(("127.0.0.1", 0), _Handler)
        self.http.scripted = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def respond(self, body: dict[str, Any], headers: Mapping[str, str]) -> Answer:
        content = sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            before = self.came[content]
            self.came[content] += 1
            self.bodies.append(body)
            self.headers.append(dict(headers))
            self.times.append(time.monotonic())
            self.side_by_side += 1
            self.most_side_by_side = max(self.most_side_by_side, self.side_by_side)
        answer = self.script(body, before)
        time.sleep(answer.delay)
        with self.lock:
            self.side_by_side -= 1
            self.answered[content] += answer.is_whole
        return answer


class _Gone(Exception):
    """A request that ends in its middle."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    scripted: ScriptedServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked is gone, killed in the middle of a request perhaps; other errors are shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError | _Gone):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        size = int(self.headers["content-length"])
        if len(sent := self.rfile.read(size)) < size:
            raise _Gone
        body = json.loads(sent)
        answer = self.server.scripted.respond(body, dict(self.headers))
        payload = answer.body(body["model"])
        head = {"content-type": "application/json", "content-length": str(len(payload)), **answer.headers}
        lines = [f"HTTP/1.1 {answer.status} x", *(f"{name}: {value}" for name, value in head.items())]
        try:
            self.wfile.write("\r\n".join([*lines, "", ""]).encode() + payload[: len(payload) - answer.cut])
        except OSError:  # whoever asked is gone
            self.close_connection = True
        if answer.cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@contextmanager
def serving(script: Script) -> Iterator[ScriptedServer]:
    """A server that answers by the script until the block ends."""
    server = ScriptedServer(script)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
