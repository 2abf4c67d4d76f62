"""Word of finished jobs, over connections that fail without a word."""

import asyncio
from contextlib import suppress

import pytest
from redis import Redis

from tests.waiting import PATIENCE_SECONDS
from worker import finished
from worker.finished import CHANNEL, Finished
from worker.redis_server import RedisServer


class SilentProxy:
    """A TCP proxy to `port`; what has connected before `cut` hears nothing any more, and is not closed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connected = 0
        self.cut = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected += 1
        mine = self.connected
        upstream, to_upstream = await asyncio.open_connection("127.0.0.1", self.port)

        async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                if mine > self.cut:
                    target.write(data)

        with suppress(OSError):
            await asyncio.wait(
                [asyncio.create_task(pass_on(reader, to_upstream)), asyncio.create_task(pass_on(upstream, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        to_upstream.close()
        writer.close()


def test_word_comes_again_after_a_connection_that_went_silent(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "_LISTEN_SECONDS", 0.2)
    redis = Redis.from_url(redis_server.url)

    async def subscribed() -> None:
        while not dict(redis.pubsub_numsub(CHANNEL))[CHANNEL.encode()]:  # type: ignore[call-overload]
            await asyncio.sleep(0.02)

    async def hear() -> None:
        proxy = SilentProxy(redis_server.port)
        async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
            words = Finished(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
            async with words.listening():
                with words.of("job_1") as first:
                    await subscribed()
                    while not first.is_set():  # a slow connection may have been replaced
                        redis.publish(CHANNEL, "job_0 job_1")  # those of one batch
                        await asyncio.sleep(0.05)
                proxy.cut = proxy.connected
                with words.of("job_2") as second:
                    redis.publish(CHANNEL, "job_2")  # it is lost
                    while proxy.connected == proxy.cut:
                        await asyncio.sleep(0.02)
                    assert not second.is_set()
                with words.of("job_3") as third:
                    while not third.is_set():  # until it has subscribed
                        redis.publish(CHANNEL, "job_3")
                        await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(hear(), PATIENCE_SECONDS))
