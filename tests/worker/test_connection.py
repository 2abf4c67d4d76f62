"""Which replies of a server are about its state, and that all clients raise the same for them."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu.exceptions import OperationalError
from redis.asyncio import Redis as AsyncRedis

from tests.redis_states import STATES
from tests.worker.conftest import Submit
from worker.connection import UNREACHABLE, Script, ServerState, check_writes, connect, options_in_a_loop, state_of
from worker.lease import Lease
from worker.queue import celery
from worker.reaper import Reaper
from worker.redis_server import RedisServer
from worker.service import Service
from worker.settings import Settings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One to harm."""
    with RedisServer(tmp_path_factory.mktemp("harmed")) as server:
        yield server


REPLIES = {
    "READONLY You can't write against a read only replica.": "it is a replica",
    "READONLY You can't write against a read only replica. script: 8a2, on @user_script:1.": "it is a replica",
    "EXECABORT Transaction discarded because of: MISCONF Errors writing to the AOF file": "it cannot write to its disk",
    "ERR Error running script (call to f_8a2): @user_script:1: @user_script: 1: -OOM command not allowed when used "
    "memory > 'maxmemory'.": "its memory is full",
    "ERR Error running script (call to f_8a2): @user_script:1: @user_script: 1: -READONLY You can't write": "it is a "
    "replica",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)": "it has just "
    "become a replica",
    "TRYAGAIN Multiple keys request during rehashing of slot": "its cluster moves keys",
    "MOVED 3999 127.0.0.1:6381": "another server of its cluster has the keys",
    "ASK 3999 127.0.0.1:6381": "it moves its keys to another server",
    "CLUSTERDOWN Hash slot not served": "its cluster is incomplete",
    "ERR Script attempted to execute a write command while the cluster is down and readonly": "its cluster is "
    "incomplete",
    "ERR Can not execute a command 'set' while the cluster is down script: on @user_script:1.": "its cluster is "
    "incomplete",
    "CROSSSLOT Keys in request don't hash to the same slot": "it is part of a cluster, which this service cannot use",
    "ERR Script attempted to access keys that do not hash to the same slot": "it is part of a cluster, which this "
    "service cannot use",
    "ERR max number of clients + cluster connections reached": "it has as many connections as it may have",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": "it runs a script that "
    "takes long",
}


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_about_the_servers_state_is_recognized_in_all_its_forms(reply: str) -> None:
    assert state_of(reply) == REPLIES[reply]


@pytest.mark.parametrize(
    "reply",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "BUSYGROUP Consumer Group name already exists",
        "BUSYKEY Target key name already exists.",
        "NOSCRIPT No matching script. Please use EVAL.",
        "NOPERM this user has no permissions to run the 'get' command",
        "EXECABORT Transaction discarded because of previous errors.",
        "ERR value is not an integer or out of range",
        "ERR Error running script (call to f_8a2): @user_script:1: OOM is a word of this script",
        "ERR unknown command 'READONLY', with args beginning with: ",
    ],
)
def test_other_replies_are_not(reply: str) -> None:
    assert state_of(reply) is None


# These refuse writes alone.
_READABLE = {"READONLY", "NOREPLICAS", "OOM", "MISCONF"}


@pytest.mark.parametrize("word", STATES)
def test_each_client_raises_the_same_for_a_state_and_works_when_it_ends(word: str, server: RedisServer) -> None:
    client = connect(server.url, retries=0)
    script = Script(client, "return redis.call('SET', 'a', 'b')")

    def transaction() -> None:
        with client.pipeline(transaction=True) as pipeline:
            pipeline.get("a")
            pipeline.set("a", "b")
            pipeline.execute()

    def pipeline() -> None:
        with client.pipeline(transaction=False) as pipeline:
            pipeline.set("a", "b")
            pipeline.set("c", "d")
            pipeline.execute()

    async def in_a_loop() -> None:
        async with AsyncRedis.from_url(server.url, **options_in_a_loop()) as other:
            await other.set("a", "b")

    calls: list[Callable[[], object]] = [
        lambda: check_writes(client),
        lambda: script(),
        transaction,
        pipeline,
        lambda: asyncio.run(in_a_loop()),
    ]
    if word not in _READABLE:
        calls.append(lambda: client.get("a"))
    expected: Any = redis.AuthenticationError if word == "NOAUTH" else ServerState
    said = ""
    with STATES[word](server):
        for call in calls:
            with pytest.raises(expected) as raised:
                call()
            assert isinstance(raised.value, UNREACHABLE)
            said += str(raised.value)
        assert word in said or word == "NOAUTH"
        with celery(server.url).connection_for_write() as broker, pytest.raises(OperationalError):
            broker.ensure_connection(max_retries=1, interval_start=0)
    deadline = time.monotonic() + 30
    for call in calls:
        while True:
            try:
                call()
                break
            except UNREACHABLE:
                assert time.monotonic() < deadline
    with celery(server.url).connection_for_write() as broker:
        broker.ensure_connection(max_retries=3)
    client.close()


def test_scripts_that_the_server_forgets_again_and_again_are_run(service: Service, submit: Submit) -> None:
    """As servers do that replace one another."""
    stop = threading.Event()

    def forget() -> None:
        with connect(service.settings.redis_url) as other:
            while not stop.is_set():
                other.script_flush()

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        for _ in range(200):
            submit()
            assert len(service.jobs.claim("training", "a worker")) == 1
    finally:
        stop.set()
        thread.join()


def test_a_script_that_somebody_ended_is_run_again(server: RedisServer) -> None:
    client = connect(server.url, retries=3)
    slow = Script(client, "while not redis.call('GET', 'go on') do end return 'done'")
    other = redis.Redis.from_url(server.url)
    other.config_set("busy-reply-threshold", 20)

    def kill() -> None:
        for _ in range(4):  # the first try and each repetition
            while True:
                time.sleep(0.05)
                try:
                    other.script_kill()
                    break
                except redis.ResponseError:  # none runs now
                    pass

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(ServerState, match="Script killed by user"):
        slow()
    thread.join()
    client.close()


@pytest.mark.parametrize("word", ["READONLY", "BUSY", "max number of clients"])
def test_a_job_under_lease_stays_with_its_worker_though_the_state_outlasts_the_lease(
    word: str, server: RedisServer, tmp_path: Path
) -> None:
    """Its lease runs out meanwhile, and the reaper leaves the worker the time to renew it."""
    settings = Settings(redis_url=server.url, data_directory=tmp_path, lease_seconds=2, max_attempts=1)
    with Service(settings) as service, Service(settings, redis_retries=0) as house:
        service.redis.flushall()
        while service.redis.info("server")["uptime_in_seconds"] <= settings.lease_seconds:
            time.sleep(0.1)
        job = Submit(service)()
        [held] = service.jobs.claim("training", "a worker")
        with Lease(service.jobs, [held]) as lease, Reaper(house):
            with STATES[word](server):
                time.sleep(2 * settings.lease_seconds)
            time.sleep(2 * settings.lease_seconds)
            assert not lease.lost(held)
            assert service.jobs.get(job.id).status == "running"
            assert service.jobs.end(held, "succeeded") == "succeeded"
        [lost] = [Submit(service)()]
        service.jobs.claim("training", "one that is lost")
        with Reaper(house):
            deadline = time.monotonic() + 30
            while service.jobs.get(lost.id).status == "running":
                assert time.monotonic() < deadline, "the reaper has ended"
                time.sleep(0.05)
