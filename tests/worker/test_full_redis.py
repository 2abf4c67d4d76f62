"""A Redis server that has reached its `maxmemory`: who waits for one that is away waits for it, too."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.waiting import until
from tests.worker.conftest import Submit
from worker.connection import ServerState
from worker.lease import Lease
from worker.reaper import Reaper
from worker.service import Service


@contextmanager
def full(service: Service, submit: Submit) -> Iterator[None]:
    """Within it the server takes nothing new."""
    service.redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(ServerState, match=r"^OOM "):
            submit()
        yield
    finally:
        service.redis.config_set("maxmemory", 0)


def test_a_lease_is_renewed_once_there_is_room_again(service: Service, submit: Submit) -> None:
    submit()
    [job] = service.jobs.claim("training", "a worker")
    with Lease(service.jobs, [job]):
        with full(service, submit):
            time.sleep(1)
        before = service.redis.zscore("flowpp:leases", job.id)
        until(lambda: service.redis.zscore("flowpp:leases", job.id) != before, "the lease is renewed no more")


def test_the_reaper_goes_on_once_there_is_room_again(service: Service, submit: Submit) -> None:
    job = submit()
    until(lambda: service.redis.info("server")["uptime_in_seconds"] > service.settings.lease_seconds)
    service.jobs.claim("training", "one that is lost")
    with Reaper(service):
        with full(service, submit):
            time.sleep(1)
            assert service.jobs.get(job.id).status == "running"
        until(lambda: service.jobs.get(job.id).status != "running", "the reaper has ended")
    assert service.jobs.get(job.id).status == "queued"


def test_what_has_finished_can_be_deleted_to_make_room(service: Service, submit: Submit) -> None:
    job = submit()
    service.jobs.cancel(job.id)
    with full(service, submit):
        assert service.jobs.delete(job.id)
    assert service.jobs.page().data == []
