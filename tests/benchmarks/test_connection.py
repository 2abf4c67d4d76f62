"""The client of `make bench-service`, against a real server."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from benchmarks.connection import connection, written


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent, and with the port that it was sent from; hangs up on /hang-up."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/hang-up":
            self.close_connection = True
            return
        said = b"%s %s %d " % (self.path.encode(), self.headers["X-Word"].encode(), self.client_address[1]) + body
        self.send_response(207)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (said[:5], said[5:]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def question(url: str, path: str, content: bytes) -> bytes:
    return written(httpx.Request("POST", url + path, content=content, headers={"X-Word": "word"}))


def test_questions_go_over_one_connection_each_with_its_own_answer(url: str) -> None:
    async def asked() -> list[tuple[int, bytes]]:
        async with connection(url) as http:
            return [await http.ask(question(url, f"/{n}?a=b", b"\0" * n)) for n in (1, 100_000, 3)]

    answers = asyncio.run(asked())
    parts = [body.split(b" ", 3) for _, body in answers]
    assert [status for status, _ in answers] == [207] * 3
    assert [part[:2] for part in parts] == [[b"/%d?a=b" % n, b"word"] for n in (1, 100_000, 3)]
    assert [len(part[3]) for part in parts] == [1, 100_000, 3]
    assert len({part[2] for part in parts}) == 1


def test_a_server_that_hangs_up_is_told_of_now_and_of_each_question_after(url: str) -> None:
    async def asked() -> None:
        async with connection(url) as http:
            for _ in range(2):
                with pytest.raises(ConnectionError, match="the connection has ended"):
                    await http.ask(question(url, "/hang-up", b""))

    asyncio.run(asked())
