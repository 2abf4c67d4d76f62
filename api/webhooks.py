"""Sends what is due to webhooks, signed as Standard Webhooks has it; any number of processes, each delivery by one.

A delivery is claimed under a lease, so that what a process that dies was sending is sent again: at least once, with
the same `webhook-id`. Redirects are not followed, and no proxy is asked.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx
from redis import RedisError
from standardwebhooks import Webhook as Signer

from api.addresses import Address, Addresses, parse
from worker.refusals import Invalid
from worker.webhooks import Attempt, Outcome, Webhooks

log = logging.getLogger(__name__)

RETRY_SECONDS: tuple[float, ...] = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""From one attempt to the next, as Standard Webhooks recommends; a tenth more or less."""

MAX_RETRY_AFTER_SECONDS = 86_400
ANSWER_SECONDS = 10
"""From the name's resolution to the answer's head."""

_LEASE_SECONDS = ANSWER_SECONDS + 5
_CONNECT_SECONDS = 4
_MOST = 64  # deliveries under way in this process
_NAMES = 32  # resolved at a time; a thread may stay with one for longer than we wait for it
_LOOK_SECONDS = 0.5
_STOP_SECONDS = 3
_READ_BYTES = 2**16
_READ_SECONDS = 1


class Sender:
    """Sends while its `sending` block runs."""

    def __init__(
        self,
        webhooks: Webhooks,
        addresses: Addresses,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
        lease_seconds: float = _LEASE_SECONDS,
    ) -> None:
        self._webhooks = webhooks
        self._addresses = addresses
        self._retry_seconds = retry_seconds
        self._lease_seconds = lease_seconds
        self._tls = httpx.create_ssl_context()
        self._under_way: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """What is under way at its end has a few seconds; what is not sent then, another process sends later."""
        self._look, self._stopping = asyncio.Event(), False
        self._redis_threads = ThreadPoolExecutor(4, thread_name_prefix="webhooks")
        self._name_threads = ThreadPoolExecutor(_NAMES, thread_name_prefix="names")
        run = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._stopping = True
            self._look.set()
            await run
            if self._under_way:
                _, late = await asyncio.wait(self._under_way, timeout=_STOP_SECONDS)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
            self._redis_threads.shutdown(wait=False)
            self._name_threads.shutdown(wait=False)

    async def _run(self) -> None:
        while not self._stopping:
            self._look.clear()
            room = _MOST - len(self._under_way)
            try:
                due = await self._in_thread(self._webhooks.claim, room, self._lease_seconds) if room else []
            except RedisError as error:
                log.warning("webhooks wait for Redis: %s", error)
                due = []
            except Exception:  # else nothing would be sent any more, and nobody told
                log.exception("webhooks could not be claimed")
                due = []
            for attempt in due:
                task = asyncio.create_task(self._deliver(attempt))
                self._under_way.add(task)
                task.add_done_callback(self._over)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), _LOOK_SECONDS)

    def _over(self, task: "asyncio.Task[None]") -> None:
        self._under_way.discard(task)
        self._look.set()

    async def _deliver(self, attempt: Attempt) -> None:
        outcome = await self._try(attempt)
        try:
            await self._in_thread(self._webhooks.end, attempt, outcome)
        except RedisError as error:  # it will be sent again
            log.warning("delivery %s was made, and Redis could not be told: %s", attempt.id, error)

    async def _try(self, attempt: Attempt) -> Outcome:
        try:
            url = parse(attempt.url)
            loop = asyncio.get_running_loop()
            deadline = loop.time() + ANSWER_SECONDS
            async with asyncio.timeout_at(deadline):
                addresses = await loop.run_in_executor(self._name_threads, self._addresses.of, url)
            code, headers = await self._post(attempt, url, addresses, deadline)
        except TimeoutError:
            return self._failed(attempt, None, f"there was no answer within {ANSWER_SECONDS} s")
        except Invalid as error:
            return self._failed(attempt, None, f"not sent: {error}")
        except httpx.HTTPError as error:
            return self._failed(attempt, None, f"the connection failed: {str(error)[:200] or type(error).__name__}")
        except Exception:  # else it would be tried for ever, each time its lease runs out
            log.exception("delivery %s failed", attempt.id)
            return self._failed(attempt, None, "the service failed; its log tells why")
        if 200 <= code < 300:
            return Outcome("delivered", code)
        if code == HTTPStatus.GONE:
            return Outcome("gone", code, "it answered 410 Gone, which disables the webhook")
        said = f"it answered {code}"
        if 300 <= code < 400:
            said += ": redirects are not followed; give the webhook the address that it leads to"
        return self._failed(attempt, code, said, _retry_after(code, headers))

    async def _post(
        self, attempt: Attempt, url: httpx.URL, addresses: Sequence[Address], deadline: float
    ) -> tuple[int, httpx.Headers]:
        """Status and headers of the answer from the first of the addresses with which a connection can be made.

        Raises `TimeoutError` and `httpx.HTTPError`.
        """
        now = datetime.now(UTC)
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "User-Agent": "flowpp-webhooks",
            "Connection": "close",
            "webhook-id": attempt.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Signer(attempt.secret).sign(attempt.id, now, attempt.body),
        }
        extensions = {
            "sni_hostname": url.raw_host.decode("ascii"),  # whose certificate is asked for, and checked
            "timeout": {"connect": _CONNECT_SECONDS},
        }
        for index, address in enumerate(addresses):
            there = url.copy_with(host=str(address))
            request = httpx.Request("POST", there, headers=headers, content=attempt.body, extensions=extensions)
            try:
                return await self._answer(request, deadline)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if index == len(addresses) - 1:
                    raise
        raise AssertionError("`Addresses.of` gives at least one")

    async def _answer(self, request: httpx.Request, deadline: float) -> tuple[int, httpx.Headers]:
        # a transport of its own: a connection to this address was checked for this host only
        async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            async with asyncio.timeout_at(deadline):
                response = await transport.handle_async_request(request)
            await _drain(response)
            return response.status_code, response.headers

    def _failed(self, attempt: Attempt, code: int | None, said: str, at_least: float = 0) -> Outcome:
        log.info("attempt %d at delivery %s to webhook %s: %s", attempt.number, attempt.id, attempt.webhook, said)
        if attempt.type == "ping" or attempt.number > len(self._retry_seconds):
            return Outcome("failed", code, said)
        delay = self._retry_seconds[attempt.number - 1] * random.uniform(0.9, 1.1)
        return Outcome("failed", code, said, max(delay, at_least))

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._redis_threads, function, *arguments)


async def _drain(response: httpx.Response) -> None:
    """Reads some of what nobody needs, since a connection that is closed earlier is an error to some servers."""
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(_READ_SECONDS):
            read = 0
            async for piece in response.aiter_raw():
                read += len(piece)
                if read >= _READ_BYTES:
                    break
    await response.aclose()


def _retry_after(code: int, headers: httpx.Headers) -> float:
    """Seconds that the receiver asks for, a day at most."""
    said = headers.get("retry-after", "").strip()
    if code not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE) or not said:
        return 0
    if said.isascii() and said.isdigit():
        return min(float(said[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        when = parsedate_to_datetime(said)
    except (ValueError, OverflowError):
        return 0
    seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    return min(max(0, seconds), MAX_RETRY_AFTER_SECONDS)
