"""The reaper: puts back what was lost and rings for what waits unheard."""

import time
from pathlib import Path

import pytest

from tests.waiting import until
from tests.worker.conftest import Submit
from worker.reaper import Reaper, reap
from worker.service import Service
from worker.settings import Settings


@pytest.fixture(autouse=True)
def running_for_a_while(service: Service) -> None:
    """The server has been there for longer than a lease."""
    until(lambda: service.redis.info("server")["uptime_in_seconds"] > service.settings.lease_seconds)


def bells(service: Service, queue: str) -> int:
    return service.redis.llen(f"flowpp-{queue}")


def test_a_lost_bell_is_rung_again_once(service: Service, submit: Submit) -> None:
    submit(), submit("sampling"), submit("sampling")  # records without bells
    for _ in range(3):
        assert reap(service) == []
        assert (bells(service, "training"), bells(service, "inference")) == (1, 2)


def test_many_lost_bells_are_rung_in_several_looks(service: Service, submit: Submit) -> None:
    for _ in range(130):
        submit()
    for rung in (100, 130, 130):
        reap(service)
        assert bells(service, "training") == rung


def test_nothing_is_rung_where_nothing_waits(service: Service, submit: Submit) -> None:
    job = submit()
    service.jobs.cancel(job.id)
    reap(service)
    assert bells(service, "training") == 0


def test_a_job_whose_worker_was_lost_is_put_back_and_rung_for(service: Service, submit: Submit) -> None:
    job = submit()
    service.jobs.claim("training", "a worker")
    with Reaper(service):
        until(lambda: service.jobs.get(job.id).status == "queued")
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
        until(lambda: service.jobs.get(job.id).status == "queued")
        time.sleep(service.settings.lease_seconds)  # each reaper looks several times meanwhile
    assert service.jobs.get(job.id).failures == 1


def test_what_is_due_is_cancelled(service: Service, submit: Submit) -> None:
    late, early = submit(cancel_after=3_600), submit(cancel_after=3_600)
    service.redis.zadd("flowpp:deadlines", {early.id: 1})
    reap(service, trusted=False)
    assert service.jobs.get(early.id).status == "queued", "a clock that was moved cancels nothing"
    reap(service)
    assert (service.jobs.get(early.id).status, service.jobs.get(late.id).status) == ("cancelled", "queued")


def test_an_expired_job_is_deleted_with_its_files_and_others_stay(
    service: Service, submit: Submit, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "file").write_text("what is stored")
    expired, kept = submit("sampling"), submit("sampling")
    for job in (expired, kept):
        for place in ("input", "attempt-1"):
            service.store.put(f"jobs/{job.id}/{place}", tmp_path / "files")
        service.jobs.cancel(job.id)
    service.redis.zadd("flowpp:expiring", {expired.id: 1, "job_gone": 1})
    for _ in range(2):
        reap(service)
    assert [job.id for job in service.jobs.page().data] == [kept.id]
    assert service.store.directory is not None
    assert [path.name for path in (service.store.directory / "jobs").iterdir()] == [kept.id]
    assert service.redis.zrange("flowpp:expiring", 0, -1) == [kept.id]


def test_more_expired_jobs_than_are_looked_at_at_a_time_go_in_one_look(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.service._DELETING_SECONDS", 60)
    jobs = [submit("sampling").id for _ in range(250)]
    for job_id in jobs:
        service.jobs.cancel(job_id)
    service.redis.zadd("flowpp:expiring", dict.fromkeys(jobs, 1))
    reap(service)
    assert service.jobs.page().data == []


def test_expired_jobs_stay_while_the_store_is_away(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit("sampling")
    service.jobs.cancel(job.id)
    service.redis.zadd("flowpp:expiring", {job.id: 1})

    def away(prefix: str) -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(service.store, "delete", away)
        reap(service)
        assert service.jobs.get(job.id).status == "cancelled"
    reap(service)
    assert service.jobs.page().data == []
