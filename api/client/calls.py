"""Calls written once, as coroutines, and made in two ways: awaited, or blocking.

A coroutine that waits only for what its `Way` gives it never suspends where that way blocks. Then one step runs it
to its end, without an event loop; so the blocking client works in threads and notebooks, too.
"""

import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

import anyio
import anyio.to_thread
import httpx

P = ParamSpec("P")
R = TypeVar("R")


class Way(Protocol):
    """How a call waits: for the network, for time, and for what takes long here."""

    def http(self) -> httpx.AsyncBaseTransport: ...

    async def sleep(self, seconds: float) -> None: ...

    async def run(self, function: Callable[[], R]) -> R: ...

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any: ...

    def each(self, generator: AsyncGenerator[Any, None]) -> Any: ...


class Awaited:
    """Calls are awaited, their lists iterated by `async for`; on asyncio or trio."""

    def http(self) -> httpx.AsyncBaseTransport:
        return httpx.AsyncHTTPTransport(trust_env=False)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def run(self, function: Callable[[], R]) -> R:
        return await anyio.to_thread.run_sync(function)

    def call(self, coroutine: Coroutine[Any, Any, R]) -> Coroutine[Any, Any, R]:
        return coroutine

    def each(self, generator: AsyncGenerator[R, None]) -> AsyncIterator[R]:
        return generator


class Blocking:
    """Calls block."""

    def http(self) -> httpx.AsyncBaseTransport:
        return _BlockingTransport()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def run(self, function: Callable[[], R]) -> R:
        return function()

    def call(self, coroutine: Coroutine[Any, Any, R]) -> R:
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
        coroutine.close()
        raise AssertionError("a call waits for something that does not block")

    def each(self, generator: AsyncGenerator[R, None]) -> Generator[R, None, None]:
        try:
            while True:
                try:
                    item = self.call(generator.asend(None))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self.call(generator.aclose())


W = TypeVar("W", bound=Way)


class Resource(Generic[W]):
    """Calls that are made in the way `W`."""

    way: W


class call(Generic[P, R]):
    """Makes a method of a `Resource` out of a coroutine function: it returns `R`, or an awaitable of it."""

    def __init__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> None:
        self.function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, instance: None, owner: Any) -> Self: ...
    @overload
    def __get__(self, instance: Resource[Blocking], owner: Any) -> Callable[P, R]: ...
    @overload
    def __get__(self, instance: Resource[Awaited], owner: Any) -> Callable[P, Coroutine[Any, Any, R]]: ...

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else _bound(self.function, instance, instance.way.call)


class each(Generic[P, R]):
    """Makes a method of a `Resource` out of an asynchronous generator function: an iterator of `R`, of either kind."""

    def __init__(self, function: Callable[Concatenate[Any, P], AsyncIterator[R]]) -> None:
        self.function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, instance: None, owner: Any) -> Self: ...
    @overload
    def __get__(self, instance: Resource[Blocking], owner: Any) -> Callable[P, Iterator[R]]: ...
    @overload
    def __get__(self, instance: Resource[Awaited], owner: Any) -> Callable[P, AsyncIterator[R]]: ...

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else _bound(self.function, instance, instance.way.each)


def _bound(function: Callable[..., Any], instance: Any, made: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return made(function(instance, *args, **kwargs))

    return method


class _BlockingTransport(httpx.AsyncBaseTransport):
    """httpx's own blocking transport, whose coroutines do not suspend."""

    def __init__(self) -> None:
        self._transport = httpx.HTTPTransport(trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = self._transport.handle_request(request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_BlockingStream(response.stream),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        self._transport.close()


class _BlockingStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._stream:
            yield chunk

    async def aclose(self) -> None:
        self._stream.close()
