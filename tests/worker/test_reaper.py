"""The reaper: puts back what was lost and rings for what waits unheard."""

import time

import pytest

from tests.worker.conftest import Submit
from worker.reaper import Reaper, reap
from worker.service import Service
from worker.settings import Settings


@pytest.fixture(autouse=True)
def running_for_a_while(service: Service) -> None:
    """The server has been there for longer than a lease."""
    while service.redis.info("server")["uptime_in_seconds"] <= service.settings.lease_seconds:
        time.sleep(0.1)


def bells(service: Service, queue: str) -> int:
    return service.redis.llen(f"flowpp-{queue}")


def test_a_lost_bell_is_rung_again_once(service: Service, submit: Submit) -> None:
    submit(), submit("sampling"), submit("sampling")  # records without bells
    for _ in range(3):
        assert reap(service) == []
        assert (bells(service, "training"), bells(service, "inference")) == (1, 2)


def test_nothing_is_rung_where_nothing_waits(service: Service, submit: Submit) -> None:
    job = submit()
    service.jobs.cancel(job.id)
    reap(service)
    assert bells(service, "training") == 0


def test_a_job_whose_worker_was_lost_is_put_back_and_rung_for(service: Service, submit: Submit) -> None:
    job = submit()
    service.jobs.claim("training", "a worker")
    with Reaper(service):
        time.sleep(2 * service.settings.lease_seconds)
    assert service.jobs.get(job.id).status == "queued"
    assert bells(service, "training") == 1


def test_workers_have_time_to_renew_their_leases_after_redis_was_away(
    settings: Settings, service: Service, submit: Submit
) -> None:
    job = submit()
    service.jobs.claim("training", "a worker")
    service.redis.zadd("flowpp:leases", {job.id: 0})
    with Service(settings.model_copy(update={"lease_seconds": 3_600})) as patient:  # longer than our server runs
        assert reap(patient) == []
    assert service.jobs.get(job.id).status == "running"


def test_many_reapers_count_a_lost_worker_once(service: Service, submit: Submit) -> None:
    job = submit()
    service.jobs.claim("training", "a worker")
    with Reaper(service), Reaper(service), Reaper(service):
        time.sleep(2 * service.settings.lease_seconds)
    assert service.jobs.get(job.id).failures == 1
