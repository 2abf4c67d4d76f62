"""A service that is busy, as a real server on a socket: it answers as it was told, and notes what it was sent."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic

JOB = b"""{"id": "job_1", "object": "job", "owner": "local", "type": "training", "status": "queued", "created_at": 0,
"started_at": null, "finished_at": null, "attempt": 0, "max_attempts": 3, "request": {}, "metadata": {},
"progress": null, "result": null, "error": null, "queue_position": 0}"""

DATASET = b"""{"id": "ds_1", "object": "dataset", "owner": "local", "created_at": 0, "name": null, "num_images": 1,
"num_validation": 0, "shape": [3, 8, 8], "bytes": 1, "sha256": ""}"""


@dataclass(frozen=True)
class Reply:
    """`breaks`: the connection ends instead, after the request was read."""

    status: int = 200
    body: bytes = JOB
    headers: dict[str, str] = field(default_factory=dict)
    breaks: bool = False


@dataclass(frozen=True)
class Sent:
    """A request, and when it came in monotonic seconds."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float


@contextmanager
def busy_server(*replies: Reply) -> Iterator[tuple[str, Sequence[Sent]]]:
    """Its url, and what it was sent so far. The last of `replies` is given ever after."""
    sent: list[Sent] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            sent.append(
                Sent(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body, monotonic())
            )
            reply = replies[min(len(sent), len(replies)) - 1]
            if reply.breaks:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
