"""A receiver of webhooks: a real server on loopback, which verifies what it gets and answers as it is told."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from standardwebhooks import Webhook

from tests.waiting import until
from worker.redis_server import HOST


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    port: int

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> Any:
        """Its content. Raises `standardwebhooks.WebhookVerificationError`."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass
class Answer:
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    after_seconds: float = 0
    body: bytes = b"thanks"
    repeat: int = 1
    content_after_seconds: float = 0
    held: threading.Event | None = None
    """Before it is set, there is no answer."""


@dataclass
class Receiver:
    """`answers` are given in turn, by path or to whoever asks (''); when they are used up, 200."""

    port: int
    received: list[Received] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    most_at_once: int = 0
    _at_once: int = 0

    def url(self, path: str = "/hook", host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def answer(self, *answers: Answer, path: str = "") -> None:
        self.answers[path] = list(answers)

    def wait(self, count: int) -> list[Received]:
        """The first `count` that it has received."""
        until(lambda: len(self.received) >= count, lambda: f"{len(self.received)} of {count} have come")
        return self.received[:count]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        path = scope["raw_path"].decode() + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        self.received.append(
            Received(path, headers | {":method": scope["method"]}, body, time.time(), scope["client"][1])
        )
        waiting = self.answers.get(path) or self.answers.get("") or [Answer()]
        answer = waiting.pop(0)
        try:
            if answer.held is not None:
                await asyncio.to_thread(answer.held.wait)
            await asyncio.sleep(answer.after_seconds)
        finally:
            self._at_once -= 1
        sent = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": sent})
        await asyncio.sleep(answer.content_after_seconds)
        for left in range(answer.repeat, 0, -1):
            await send({"type": "http.response.body", "body": answer.body, "more_body": left > 1})


@contextmanager
def receiving(certificate: Path | None = None) -> Iterator[Receiver]:
    """With a certificate, a PEM file that has its key, too, it speaks TLS."""
    listener = socket.create_server((HOST, 0))
    receiver = Receiver(listener.getsockname()[1])
    config = uvicorn.Config(
        receiver,
        log_level="critical",
        lifespan="off",
        timeout_graceful_shutdown=1,
        ssl_certfile=certificate,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert thread.is_alive()
        yield receiver
    finally:
        server.should_exit = True
        thread.join()
