"""States of a real Redis server that answers and refuses commands. Each is a context manager over a running server."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker import child
from worker.redis_server import HOST, RedisServer, _binary, _options, free_port

State = Callable[[RedisServer], AbstractContextManager[None]]


def _client(server: RedisServer) -> redis.Redis:
    """A client that neither retries nor waits for `ServerState`."""
    return redis.Redis.from_url(server.url, decode_responses=True)


@contextmanager
def read_only(server: RedisServer) -> Iterator[None]:
    """A failover made the server a replica."""
    client = _client(server)
    client.replicaof(HOST, "1")
    try:
        yield
    finally:
        client.replicaof("NO", "ONE")


@contextmanager
def without_its_primary(server: RedisServer) -> Iterator[None]:
    client = _client(server)
    client.config_set("replica-serve-stale-data", "no")
    with read_only(server):
        yield
    client.config_set("replica-serve-stale-data", "yes")


def _setting(name: str, value: str, before: str) -> State:
    @contextmanager
    def state(server: RedisServer) -> Iterator[None]:
        client = _client(server)
        client.config_set(name, value)
        try:
            yield
        finally:
            client.config_set(name, before)

    return state


@contextmanager
def running_a_long_script(server: RedisServer) -> Iterator[None]:
    client, killed = _client(server), list[Exception]()
    client.config_set("busy-reply-threshold", 20)

    def run() -> None:
        try:
            redis.Redis.from_url(server.url, socket_timeout=None).eval("while true do end", 0)
        except redis.ResponseError as error:
            killed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    _until_refused(server, "BUSY")
    try:
        yield
    finally:
        client.script_kill()
        thread.join()
        client.config_set("busy-reply-threshold", 5_000)
    assert killed


@contextmanager
def unable_to_save(server: RedisServer) -> Iterator[None]:
    """The last snapshot could not be written: its file's name is that of a directory."""
    client, place = _client(server), server.directory / "dump.rdb"
    place.unlink(missing_ok=True)
    (place / "taken").mkdir(parents=True)
    client.config_set("save", "86400 1000000")
    client.bgsave()
    _until_refused(server, "MISCONF")
    try:
        yield
    finally:
        (place / "taken").rmdir()
        place.rmdir()
        client.bgsave()
        while client.info("persistence")["rdb_last_bgsave_status"] != "ok":
            time.sleep(0.05)
        client.config_set("save", "")


@contextmanager
def out_of_connections(server: RedisServer) -> Iterator[None]:
    """All connections but one are gone, and none can be made."""
    client = _client(server)
    before = client.config_get("maxclients")["maxclients"]
    client.config_set("maxclients", 1)
    client.client_kill_filter(_type="normal", skipme=True)
    client.client_kill_filter(_type="pubsub", skipme=True)
    try:
        yield
    finally:
        client.config_set("maxclients", before)


@contextmanager
def with_another_password(server: RedisServer) -> Iterator[None]:
    """The password was changed on the server first."""
    client = _client(server)
    client.config_set("requirepass", "another")
    client.client_kill_filter(_type="normal", skipme=True)
    try:
        yield
    finally:
        client.config_set("requirepass", "")


@contextmanager
def _restarted(server: RedisServer, word: str, *options: str) -> Iterator[None]:
    _kill(server)
    command = [_binary(), *_options(server.directory, server.port), *options]
    server.process = child.start(command, server.log)
    _until_refused(server, word)
    try:
        yield
    finally:
        _kill(server)
        server.start()


def _kill(server: RedisServer) -> None:
    """At once: a server that loads its data does not obey SIGTERM."""
    assert server.process is not None
    server.process.kill()
    server.process.wait()


@contextmanager
def loading(server: RedisServer) -> Iterator[None]:
    """The server starts on keys that take a tenth of a second each, and answers between them."""
    client = _client(server)
    for key in range(600):
        client.set(f"a-test:{key}", os.urandom(2_048))
    client.bgrewriteaof()
    while client.info("persistence")["aof_rewrite_in_progress"] or client.info("persistence")["aof_rewrite_scheduled"]:
        time.sleep(0.05)
    slowly = ("--key-load-delay", "100000", "--loading-process-events-interval-bytes", "1024")
    with _restarted(server, "LOADING", *slowly):
        yield


@contextmanager
def in_a_cluster_without_others(server: RedisServer) -> Iterator[None]:
    with _restarted(server, "CLUSTERDOWN", "--cluster-enabled", "yes", "--cluster-port", str(free_port())):
        yield
    (server.directory / "nodes.conf").unlink()


def _until_refused(server: RedisServer, word: str) -> None:
    """Waits for a reply that begins with `word`."""
    deadline = time.monotonic() + 30
    with redis.Redis.from_url(server.url, socket_timeout=10, retry=Retry(NoBackoff(), 0)) as client:
        while True:
            try:
                client.set("flowpp:a-test", "1")
            except redis.RedisError as error:
                if word in (getattr(error, "status_code", None), str(error).partition(" ")[0]):
                    return
            assert time.monotonic() < deadline, f"no {word}"
            time.sleep(0.02)


STATES: dict[str, State] = {
    "READONLY": read_only,
    "MASTERDOWN": without_its_primary,
    "NOREPLICAS": _setting("min-replicas-to-write", "1", "0"),
    "OOM": _setting("maxmemory", "1", "0"),
    "BUSY": running_a_long_script,
    "MISCONF": unable_to_save,
    "max number of clients": out_of_connections,
    "NOAUTH": with_another_password,
    "LOADING": loading,
    "CLUSTERDOWN": in_a_cluster_without_others,
}
"""By what the server's replies say."""
