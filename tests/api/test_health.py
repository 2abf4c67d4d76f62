"""Whether the service can work: what is missing is named, whatever it is."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import Serve
from worker.presence import Offer, Presence
from worker.queue import QUEUES
from worker.redis_server import RedisServer
from worker.service import Service

OFFER = Offer(bytes=1, shared=True)


@pytest.fixture
def staffed(service: Service, http: httpx.Client) -> Iterator[httpx.Client]:
    """A client of a service with a worker of each kind, as far as anybody can see."""
    with ExitStack() as present:
        for queue in QUEUES:
            present.enter_context(Presence(service.redis, queue, "a worker", OFFER))
        while http.get("/readyz").status_code == 503:
            pass
        yield http


def missing(http: httpx.Client) -> list[str]:
    answer = http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["status"] == "unready"
    return list(answer.json()["missing"])


def test_a_service_that_has_everything_is_ready(staffed: httpx.Client) -> None:
    answer = staffed.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "missing": [],
        "checks": dict.fromkeys(("redis", "store", "training", "inference"), "ok"),
    }


def test_each_kind_of_worker_is_missed(service: Service, http: httpx.Client) -> None:
    assert http.get("/healthz").json()["status"] == "ok"
    assert missing(http) == ["no training worker", "no inference worker"]
    with Presence(service.redis, "training", "a worker", OFFER):
        while len(found := missing(http)) > 1:
            pass
    assert found == ["no inference worker"]


def test_a_store_that_takes_nothing_is_missed(service: Service, staffed: httpx.Client) -> None:
    store = Path(service.settings.store_url)
    store.rename(store.with_name("gone"))
    store.write_text("no directory")
    assert missing(staffed) == ["the store cannot be written: Not a directory"]
    assert staffed.get("/readyz").json()["checks"]["store"] == "the store cannot be written: Not a directory"


def test_a_redis_server_that_is_full_is_missed(service: Service, staffed: httpx.Client) -> None:
    service.redis.config_set("maxmemory", "1")
    try:
        (found,) = missing(staffed)
    finally:
        service.redis.config_set("maxmemory", "0")
    assert found.startswith("Redis refuses commands, as its memory is full: OOM ")


def test_a_rebuilding_that_has_not_come_to_its_end_is_missed(service: Service, staffed: httpx.Client) -> None:
    service.redis.set("flowpp:rebuilding", "1")
    assert missing(staffed) == ["Redis is being rebuilt by `flowpp reindex`; where that was interrupted, run it again"]


def test_without_redis_workers_are_unknown_and_the_store_is_looked_at(
    service: Service, serve: Serve, tmp_path: Path
) -> None:
    with RedisServer(tmp_path / "redis") as redis:
        settings = service.settings.model_copy(update={"redis_url": redis.url})
        with serve(settings) as http:
            redis.stop()
            os.rename(settings.store_url, f"{settings.store_url}.gone")
            Path(settings.store_url).touch()
            answer = http.get("/readyz").json()
    assert answer["missing"] == [
        "Redis does not answer: ConnectionError",
        "the store cannot be written: Not a directory",
    ]
    assert (answer["checks"]["training"], answer["checks"]["inference"]) == ("unknown", "unknown")
