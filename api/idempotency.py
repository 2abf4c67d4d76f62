"""`Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header) on each POST that creates."""

import asyncio
import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError

from api.dependencies import CallerOf, ServiceOf
from worker.connection import UNREACHABLE
from worker.idempotency import UNDER_WAY_SECONDS, Once
from worker.keys import Caller
from worker.service import Service

PATTERN = r'^("[\x21\x23-\x7e]{1,255}"|[\x21\x23-\x7e]{1,255})$'

IdempotencyKey = Annotated[
    str | None,
    Header(
        max_length=257,
        json_schema_extra={"pattern": PATTERN},
        description="Of your choice, say a UUID: the same request sent again within a day, with the same key, creates "
        "nothing, and is answered with what the first has created. 409 while that one is under way, 422 where it was "
        "another request.",
    ),
]

REPLAYED = "Idempotency-Replayed"

_KEY = re.compile(PATTERN)


class Creation:
    """A request that creates something: whose it will be, and that it does so once. An async context manager.

    While its block runs, the Idempotency-Key is this request's. Entering it raises `Conflict`, and
    `RequestValidationError` for what is no key.
    """

    def __init__(self, request: Request, response: Response, service: Service, caller: Caller, key: str | None) -> None:
        self.request, self.response, self.service, self.caller = request, response, service, caller
        self._key = key
        self._once: Once | None = None
        self._renewing: asyncio.Task[None] | None = None

    @property
    def existing(self) -> str | None:
        """The id of what the same request has created before; to be used only after `claim`."""
        return self._once.existing if self._once else None

    def claim(self, values: Any, files: Iterable[tuple[str, Path | bytes]] = ()) -> str:
        """What the record is written with, by the content of the request. Raises `Invalid` for another content."""
        if self._once is None:
            return ""
        digest = hashlib.sha256(json.dumps([self.request.url.path, values], sort_keys=True, default=str).encode())
        for name, content in files:
            digest.update(name.encode() + b"\0")
            if isinstance(content, bytes):
                digest.update(hashlib.sha256(content).digest())
            else:
                with content.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return self._once.claim(digest.hexdigest())

    async def __aenter__(self) -> Self:
        if self._key is None:
            return self
        found = _KEY.fullmatch(self._key)
        if found is None:
            fault = "1 to 255 visible ASCII characters, which may be in double quotes"
            where = {"type": "value_error", "loc": ("header", "Idempotency-Key"), "msg": fault, "input": None}
            raise RequestValidationError([where])
        self._once = await run_in_threadpool(self.service.idempotency.begin, self.caller.owner, found[1].strip('"'))
        if self._once.existing is not None:
            self.response.headers[REPLAYED] = "true"
        else:
            self._renewing = asyncio.create_task(self._renew(self._once))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._renewing is None or self._once is None:
            return
        self._renewing.cancel()
        with suppress(asyncio.CancelledError):
            await self._renewing
        await run_in_threadpool(self.service.idempotency.end, self._once)

    async def _renew(self, once: Once) -> None:
        while True:
            await asyncio.sleep(UNDER_WAY_SECONDS / 3)
            with suppress(*UNREACHABLE):  # the request itself fails then, if it needs Redis now
                await run_in_threadpool(self.service.idempotency.renew, once)


async def _creation(
    request: Request,
    response: Response,
    service: ServiceOf,
    caller: CallerOf,
    idempotency_key: IdempotencyKey = None,
) -> Creation:
    return Creation(request, response, service, caller, idempotency_key)


CreationOf = Annotated[Creation, Depends(_creation)]
