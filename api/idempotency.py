"""`Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header) on each POST that creates."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError

from worker.idempotency import UNDER_WAY_SECONDS, Once
from worker.keys import Caller
from worker.service import Service

IdempotencyKey = Annotated[
    str | None,
    Header(
        max_length=257,
        description="Of your choice, say a UUID: the same request sent again within a day, with the same key, creates "
        "nothing, and is answered with what the first has created. 409 while that one is under way, 422 where it was "
        "another request.",
    ),
]

REPLAYED = "Idempotency-Replayed"

_KEY = re.compile(r'"?([\x21\x23-\x7e]{1,255})"?')


@dataclass(frozen=True)
class Creation:
    """What a request is about to create, once."""

    path: str
    once: Once | None

    @property
    def existing(self) -> str | None:
        """The id of what the same request has created before; to be used only after `claim`."""
        return self.once.existing if self.once else None

    def claim(self, values: Any, files: Iterable[tuple[str, Path | bytes]] = ()) -> str:
        """What the record is written with, by the content of the request. Raises `Invalid` for another content."""
        if self.once is None:
            return ""
        digest = hashlib.sha256(json.dumps([self.path, values], sort_keys=True, default=str).encode())
        for name, content in files:
            digest.update(name.encode() + b"\0")
            if isinstance(content, bytes):
                digest.update(hashlib.sha256(content).digest())
            else:
                with content.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return self.once.claim(digest.hexdigest())


@asynccontextmanager
async def creation(
    request: Request, response: Response, service: Service, caller: Caller, key: str | None
) -> AsyncIterator[Creation]:
    """While the block runs, the key is this request's. Raises `Conflict`, and `RequestValidationError` for no key."""
    if key is None:
        yield Creation(request.url.path, None)
        return
    found = _KEY.fullmatch(key)
    if found is None:
        fault = "1 to 255 visible ASCII characters, which may be in double quotes"
        where = {"type": "value_error", "loc": ("header", "Idempotency-Key"), "msg": fault, "input": None}
        raise RequestValidationError([where])
    once = await run_in_threadpool(service.idempotency.begin, caller.owner, found[1])
    if once.existing is not None:
        response.headers[REPLAYED] = "true"
        yield Creation(request.url.path, once)
        return
    renewing = asyncio.create_task(_renew(service, once))
    try:
        yield Creation(request.url.path, once)
    finally:
        renewing.cancel()
        with suppress(asyncio.CancelledError):
            await renewing
        await run_in_threadpool(service.idempotency.end, once)


async def _renew(service: Service, once: Once) -> None:
    while True:
        await asyncio.sleep(UNDER_WAY_SECONDS / 3)
        await run_in_threadpool(service.idempotency.renew, once)
