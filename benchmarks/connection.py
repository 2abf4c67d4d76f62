"""An HTTP/1.1 connection that takes little of the cores it shares with what is measured: requests are written ahead."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast
from urllib.parse import urlsplit

import httptools
import httpx

_ANSWER_SECONDS = 120


def written(request: httpx.Request) -> bytes:
    """A request as it goes over a connection."""
    body = request.read()
    head = f"{request.method} {request.url.raw_path.decode()} HTTP/1.1\r\n"
    lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return f"{head}{lines}\r\n".encode() + body


class Connection(asyncio.Protocol):
    """Asks one question after the other, each a request as `written`."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body: list[bytes] = []
        self._transport: asyncio.WriteTransport | None = None

    async def ask(self, question: bytes) -> tuple[int, bytes]:
        """Status and body. Raises `ConnectionError` where the connection ends before, `TimeoutError` after 120 s."""
        if self._transport is None:
            raise ConnectionError("the connection has ended")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(question)
        async with asyncio.timeout(_ANSWER_SECONDS):
            return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the connection has ended: {error or 'it was closed'}"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, part: bytes) -> None:
        self._body.append(part)

    def on_message_complete(self) -> None:
        body, self._body = b"".join(self._body), []
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), body))


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Connection]:
    """To the server of `url`; closed with the block."""
    address, loop = urlsplit(url), asyncio.get_running_loop()
    transport, found = await loop.create_connection(Connection, address.hostname or "", address.port or 80)
    try:
        yield found
    finally:
        transport.close()
