"""The transitions of jobs on a real server: those that are, those that are refused, and who may write."""

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
from redis.exceptions import ResponseError

from tests.waiting import until
from tests.worker.conftest import Submit
from worker.connection import redis_time
from worker.jobs import TERMINAL, Job, JobError, JobStatus, NewJob, Progress, StaleAttempt, Submission, new_job_id
from worker.overview import overview
from worker.reaper import reap
from worker.record_images import in_record
from worker.refusals import Conflict, NotFound, OverQuota, QueueFull, Refusal
from worker.service import Service
from worker.transitions import load_script

WORKER = "a worker"
ERROR = JobError(code="internal", message="what went wrong")


def claim(service: Service, queue: str = "training") -> Job:
    [job] = service.jobs.claim(queue, WORKER)
    return job


def statuses(service: Service, job: Job) -> list[str]:
    return [event.data["status"] for event in service.events.page(job.id).data if event.type == "status"]


def in_status(service: Service, submit: Submit, status: str) -> Job:
    """A training job that is in `status` now."""
    job = submit()
    if status in ("queued",):
        return job
    if status in ("running", "pausing", "cancelling", "succeeded", "failed"):
        job = claim(service)
    steps: dict[str, Callable[[], object]] = {
        "running": lambda: None,
        "pausing": lambda: service.jobs.pause(job.id),
        "cancelling": lambda: service.jobs.cancel(job.id),
        "succeeded": lambda: service.jobs.end(job, "succeeded"),
        "failed": lambda: service.jobs.end(job, "failed", error=ERROR),
        "paused": lambda: service.jobs.pause(job.id),
        "cancelled": lambda: service.jobs.cancel(job.id),
    }
    steps[status]()
    assert service.jobs.get(job.id).status == status
    return service.jobs.get(job.id)


def test_a_new_job_is_queued_with_what_was_asked(service: Service, submit: Submit) -> None:
    before = time.time()
    job = submit(metadata={"who": "me"})
    assert (job.status, job.attempt, job.started_at, job.finished_at) == ("queued", 0, None, None)
    assert job.request == {"of": "this test"}
    assert job.metadata == {"who": "me"}
    assert before - 1 < job.created_at < time.time() + 1
    assert service.jobs.get(job.id) == job


ASKED = {
    "cancel": {
        "queued": "cancelled",
        "paused": "cancelled",
        "running": "cancelling",
        "pausing": "cancelling",
        "cancelling": "cancelling",
    },
    "pause": {"queued": "paused", "running": "pausing", "pausing": "pausing", "paused": "paused"},
    "resume": {"paused": "queued", "queued": "queued", "running": "running"},
}
STATUSES = ("queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled")


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("asked", ASKED)
def test_each_state_goes_where_it_is_asked_to_or_refuses_and_stays(
    service: Service, submit: Submit, asked: str, status: str
) -> None:
    job = in_status(service, submit, status)
    if (expected := ASKED[asked].get(status)) is not None:
        assert getattr(service.jobs, asked)(job.id).status == expected
    else:
        with pytest.raises(Conflict, match=status):
            getattr(service.jobs, asked)(job.id)
        assert service.jobs.get(job.id) == job


@pytest.mark.parametrize("status", STATUSES)
def test_a_job_that_no_worker_holds_is_deleted_at_once_and_another_is_cancelled_first(
    service: Service, submit: Submit, status: str
) -> None:
    job = in_status(service, submit, status)
    held = status in {"running", "pausing", "cancelling"}
    assert service.jobs.delete(job.id) is not held
    if held:
        assert service.jobs.get(job.id).status == "cancelling"
        assert service.jobs.deleting() == [job.id]
        assert reap(service) == []
        service.jobs.end(service.jobs.get(job.id), "stopped")
        reap(service)
    with pytest.raises(NotFound):
        service.jobs.get(job.id)
    assert [key for key in service.redis.keys("*") if job.id in key] == []
    assert service.jobs.page().data == []
    assert service.jobs.deleting() == []


@pytest.mark.parametrize("asked", ["get", "cancel", "pause", "resume", "delete"])
def test_what_is_asked_of_a_job_that_is_not_there_says_so(service: Service, asked: str) -> None:
    with pytest.raises(NotFound, match="job_nowhere"):
        getattr(service.jobs, asked)("job_nowhere")


ENDS = {
    "running": {"succeeded": "succeeded", "failed": "failed", "stopped": "queued", "crashed": "queued"},
    "pausing": {"succeeded": "succeeded", "failed": "failed", "stopped": "paused", "crashed": "paused"},
    "cancelling": dict.fromkeys(("succeeded", "failed", "stopped", "crashed"), "cancelled"),
}


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "stopped", "crashed"])
@pytest.mark.parametrize("status", ENDS)
def test_an_attempt_ends_as_it_went_and_as_was_wished(
    service: Service, submit: Submit, status: str, outcome: str
) -> None:
    job = in_status(service, submit, status)
    expected = ENDS[status][outcome]
    assert service.jobs.end(job, outcome, error=ERROR, result={"n": 1}, artifacts="jobs/x/attempt-1") == expected
    after = service.jobs.get(job.id)
    assert (after.status, after.result, after.artifacts) == (expected, {"n": 1}, "jobs/x/attempt-1")
    assert (after.finished_at is not None) == (expected in TERMINAL)
    assert after.error == (ERROR if expected == "failed" else None)
    assert service.redis.zcard("flowpp:leases") == 0
    assert (job.id in service.jobs.waiting("training")) == (expected == "queued")


def test_a_claim_takes_the_job_that_waited_longest_and_counts_the_attempt(service: Service, submit: Submit) -> None:
    first, second = submit(), submit()
    assert [claim(service).id, claim(service).id] == [first.id, second.id]
    assert service.jobs.claim("training", WORKER) == []
    job = service.jobs.get(first.id)
    assert (job.status, job.attempt) == ("running", 1)
    assert job.started_at is not None
    [event] = [event for event in service.events.page(job.id).data if event.data["status"] == "running"]
    assert event.data == {"status": "running", "attempt": 1, "worker": WORKER, "message": "attempt 1 begins"}


def test_of_many_claimers_one_wins(service: Service, submit: Submit) -> None:
    jobs = {submit().id for _ in range(20)}
    claimed: list[str] = []
    start = threading.Barrier(8)

    def take() -> None:
        start.wait()
        while found := service.jobs.claim("training", WORKER):
            claimed.extend(job.id for job in found)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 20
    assert set(claimed) == jobs


def test_a_claim_takes_jobs_of_one_group_as_they_fit(service: Service, submit: Submit) -> None:
    first = submit("sampling", group="a", size=3)
    other = submit("sampling", group="b", size=1)
    second = submit("sampling", group="a", size=4)
    large = submit("sampling", group="a", size=4)
    third = submit("sampling", group="a", size=1)
    assert [job.id for job in service.jobs.claim("inference", WORKER, 8)] == [first.id, second.id, third.id]
    assert [job.id for job in service.jobs.claim("inference", WORKER, 8)] == [other.id]
    assert [job.id for job in service.jobs.claim("inference", WORKER, 2)] == [large.id]


def test_jobs_of_no_group_are_claimed_one_by_one(service: Service, submit: Submit) -> None:
    submit(), submit()
    assert len(service.jobs.claim("training", WORKER, 100)) == 1


def test_a_full_queue_refuses_and_writes_nothing(service: Service, submit: Submit) -> None:
    submit(max_queued=2), submit(max_queued=2)
    keys = sorted(service.redis.keys("*"))
    with pytest.raises(QueueFull) as caught:
        submit(max_queued=2)
    assert caught.value.retry_after > 0
    assert sorted(service.redis.keys("*")) == keys
    submit("sampling", max_queued=2)  # the other queue is another matter
    claim(service)
    submit(max_queued=2)


def test_a_lease_that_is_renewed_holds_and_one_that_is_not_ends_the_attempt(service: Service, submit: Submit) -> None:
    submit()
    with Service(service.settings.model_copy(update={"lease_seconds": 3_600})) as patient:
        job = claim(patient)
        ends = redis_time(service.redis) + 0.3
        service.redis.zadd("flowpp:leases", {job.id: ends})
        assert patient.jobs.wishes([job], renew=True) == ["running"]
        until(lambda: redis_time(service.redis) > ends)
        assert patient.jobs.reap() == []
    renewed = redis_time(service.redis)
    assert service.jobs.wishes([job], renew=True) == ["running"]
    assert until(service.jobs.reap) == [job.id]
    assert redis_time(service.redis) >= renewed + service.jobs.lease_seconds
    after = service.jobs.get(job.id)
    assert (after.status, after.failures) == ("queued", 1)
    assert service.events.page(job.id).data[-1].data["code"] == "worker_lost"
    assert service.jobs.reap() == []


def expire(service: Service) -> None:
    """Ends all leases, as time would."""
    for job_id in service.redis.zrange("flowpp:leases", 0, -1):
        service.redis.zadd("flowpp:leases", {job_id: 0})


def test_after_so_many_lost_workers_the_job_has_failed(service: Service, submit: Submit) -> None:
    job = submit()
    for _ in range(job.max_attempts):
        claim(service)
        expire(service)
        service.jobs.reap()
    job = service.jobs.get(job.id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "worker_lost"
    assert job.attempt == job.max_attempts


@pytest.mark.parametrize(("wished", "expected"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_lost_worker_cannot_keep_a_job_from_what_was_wished(
    service: Service, submit: Submit, wished: str, expected: str
) -> None:
    submit()
    job = claim(service)
    getattr(service.jobs, wished)(job.id)
    expire(service)
    service.jobs.reap()
    assert service.jobs.get(job.id).status == expected


def test_stopping_does_not_count_as_a_failed_attempt(service: Service, submit: Submit) -> None:
    job = submit()
    for attempt in range(1, 6):
        running = claim(service)
        assert running.attempt == attempt
        service.jobs.end(running, "stopped")
    assert (service.jobs.get(job.id).status, service.jobs.get(job.id).failures) == ("queued", 0)


def test_a_job_that_was_put_back_is_before_those_that_came_later(service: Service, submit: Submit) -> None:
    first, second = submit(), submit()
    service.jobs.end(claim(service), "stopped")
    assert service.jobs.waiting("training") == [first.id, second.id]
    assert [service.jobs.queue_position(service.jobs.get(job.id)) for job in (first, second)] == [0, 1]


STALE = {
    "progress": lambda service, job: service.jobs.set_progress(job, Progress.at(1, 2)),
    "event": lambda service, job: service.events.append(job, "log", {"line": "x"}),
    "end": lambda service, job: service.jobs.end(job, "succeeded", result={"false": True}, artifacts="jobs/false"),
}


@pytest.mark.parametrize("write", STALE)
@pytest.mark.parametrize("now", ["queued", "claimed by another", "finished"])
def test_a_stale_attempt_writes_nothing(service: Service, submit: Submit, write: str, now: str) -> None:
    submit()
    stale = claim(service)
    expire(service)
    service.jobs.reap()
    if now != "queued":
        current = claim(service)
        if now == "finished":
            service.jobs.end(current, "succeeded", result={"true": True})
    before = service.jobs.get(stale.id), service.events.page(stale.id), service.redis.zrange("flowpp:leases", 0, -1)
    with pytest.raises(StaleAttempt, match=f"attempt 1 of job {stale.id}"):
        STALE[write](service, stale)
    assert service.jobs.wishes([stale], renew=True) == [None]
    after = service.jobs.get(stale.id), service.events.page(stale.id), service.redis.zrange("flowpp:leases", 0, -1)
    assert after == before


def test_pages_follow_creation_in_both_orders(service: Service, submit: Submit) -> None:
    ids = [submit().id for _ in range(7)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        seen: list[str] = []
        more = True
        while more:
            page = service.jobs.page(after=seen[-1] if seen else None, limit=3, order=order)
            seen += [job.id for job in page.data]
            more = page.has_more
        assert seen == expected
    assert not service.jobs.page(limit=7).has_more
    with pytest.raises(NotFound):
        service.jobs.page(after="job_nowhere")


def test_filters_leave_what_matches_all_of_them(service: Service, submit: Submit) -> None:
    a = submit(metadata={"k": "1", "l": "2"})
    b = submit(metadata={"k": "1"})
    c = submit("sampling", metadata={"k": "1"})
    service.jobs.cancel(b.id)

    def found(**filters: object) -> list[str]:
        return [job.id for job in service.jobs.page(order="asc", **filters).data]

    assert found(type="training") == [a.id, b.id]
    assert found(status="queued") == [a.id, c.id]
    assert found(metadata={"k": "1"}) == [a.id, b.id, c.id]
    assert found(metadata={"k": "1", "l": "2"}) == [a.id]
    assert found(type="training", status="cancelled", metadata={"k": "1"}) == [b.id]
    assert found(metadata={"k": "2"}) == []


def test_a_filter_finds_what_lies_behind_many_that_do_not_match(service: Service, submit: Submit) -> None:
    rare = [submit(metadata={"rare": "yes"}).id for _ in range(2)]
    for _ in range(600):
        submit()
    few = [submit("sampling", owner="few").id for _ in range(2)]
    assert [job.id for job in service.jobs.page(owner="few", type="sampling").data] == few[::-1]
    assert service.jobs.page(owner="few", type="training").data == []
    assert [job.id for job in service.jobs.page(owner="few", status="queued", after=few[1]).data] == [few[0]]
    with pytest.raises(NotFound):
        service.jobs.page(owner="few", type="training", after=rare[0])
    page = service.jobs.page(metadata={"rare": "yes"}, limit=1)
    assert ([job.id for job in page.data], page.has_more) == ([rare[1]], True)
    page = service.jobs.page(metadata={"rare": "yes"}, limit=1, after=rare[1])
    assert ([job.id for job in page.data], page.has_more) == ([rare[0]], False)


def test_a_job_is_listed_by_its_status_through_its_life(service: Service, submit: Submit) -> None:
    job, other = submit(owner="alice"), submit("sampling", owner="bob")

    def listed(**filters: Any) -> list[str]:
        """The statuses under which the job is found."""
        by_status = {status: service.jobs.page(status=status, **filters).data for status in get_args(JobStatus)}
        assert [each.id for found in by_status.values() for each in found].count(job.id) == 1
        return [status for status, found in by_status.items() if job.id in [each.id for each in found]]

    def is_listed(status: str) -> None:
        assert listed() == listed(owner="alice") == listed(type="training", owner="alice") == [status]
        assert service.jobs.page(status=service.jobs.get(job.id).status, owner="nobody").data == []

    is_listed("queued")
    held = claim(service)
    is_listed("running")
    service.jobs.pause(job.id)
    is_listed("pausing")
    service.jobs.end(held, "stopped")
    is_listed("paused")
    service.jobs.resume(job.id)
    is_listed("queued")
    claim(service)
    expire(service)
    assert service.jobs.reap() == [job.id]
    is_listed("queued")
    held = claim(service)
    service.jobs.cancel(job.id)
    is_listed("cancelling")
    service.jobs.end(held, "stopped")
    is_listed("cancelled")
    service.jobs.delete(job.id)
    assert [each.id for status in get_args(JobStatus) for each in service.jobs.page(status=status).data] == [other.id]
    service.jobs.delete(other.id)
    assert service.redis.keys("flowpp:jobs*") == []


def test_pages_by_status_follow_creation_over_owners_and_types_in_both_orders(service: Service, submit: Submit) -> None:
    types, owners = ("training", "sampling", "likelihood"), ("alice", "bob", "carol", "dave")
    jobs = [submit(types[n % 3], owner=owners[n * 7 % 4]) for n in range(60)]
    for job in jobs[::2]:
        service.jobs.cancel(job.id)
    for order, expected in (("asc", jobs[::2]), ("desc", jobs[::2][::-1])):
        for limit in (1, 4, 7, 30):
            seen: list[str] = []
            more = True
            while more:
                page = service.jobs.page(status="cancelled", limit=limit, order=order, after=seen[-1] if seen else None)
                seen += [job.id for job in page.data]
                more = page.has_more
                assert len(page.data) == limit or not more
            assert seen == [job.id for job in expected]
    queued = jobs[31].id
    behind = service.jobs.page(status="cancelled", order="asc", after=queued, limit=1).data
    assert [job.id for job in behind] == [jobs[32].id]


def test_pages_miss_no_job_that_keeps_its_status_while_others_change_theirs(service: Service, submit: Submit) -> None:
    jobs = [submit() for _ in range(120)]
    kept = {job.id for job in jobs[::3]}
    for job_id in kept:
        service.jobs.pause(job_id)
    changing = [job.id for job in jobs if job.id not in kept]
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for job_id in changing:
                service.jobs.pause(job_id)
            for job_id in changing:
                service.jobs.resume(job_id)

    def walk(**filters: Any) -> list[Job]:
        seen: list[Job] = []
        more = True
        while more:
            page = service.jobs.page(limit=7, after=seen[-1].id if seen else None, **filters)
            seen += page.data
            more = page.has_more
        return seen

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(10):
            paused = walk(status="paused")
            assert kept <= {job.id for job in paused}
            assert {job.status for job in paused} == {"paused"}
            every = [job.id for job in walk(type="training")]
            assert every == [job.id for job in jobs][::-1]
    finally:
        ended.set()
        changer.join()


def test_jobs_that_an_older_version_has_written_are_listed_by_status(service: Service, submit: Submit) -> None:
    queued, cancelled, deleted = submit(owner="alice"), submit("sampling"), submit()
    service.jobs.cancel(cancelled.id)
    redis = service.redis
    status_lists = redis.keys("flowpp:jobs:status:*")
    redis.delete("flowpp:owners", "flowpp:indexed", *status_lists)
    redis.zadd("flowpp:jobs:type:training", {queued.id: 1, deleted.id: 3})  # which it had
    redis.hset("flowpp:counts", "training:queued", 2)
    assert [job.id for job in service.jobs.page(status="queued", owner="alice").data] == [queued.id]
    assert [job.id for job in service.jobs.page(status="cancelled").data] == [cancelled.id]
    assert sorted(redis.keys("flowpp:jobs:status:*")) == sorted(status_lists)
    assert redis.exists("flowpp:jobs:type:training", "flowpp:counts") == 0
    redis.hset(f"flowpp:job:{queued.id}", "status", "paused")  # as a worker of that version does meanwhile
    assert service.jobs.page(status="queued", owner="alice").data == []
    redis.delete("flowpp:indexed")
    assert [job.id for job in service.jobs.page(status="paused").data] == [queued.id]
    assert redis.zcard("flowpp:jobs:status:alice:training:queued") == 0


def test_owners_are_those_that_have_jobs(service: Service, submit: Submit) -> None:
    first, second, other = submit(owner="alice"), submit("sampling", owner="alice"), submit(owner="bob")
    service.jobs.delete(first.id)
    assert service.redis.smembers("flowpp:owners") == {"alice", "bob"}
    service.jobs.delete(second.id)
    assert service.redis.smembers("flowpp:owners") == {"bob"}
    again = submit(owner="alice")
    assert service.redis.smembers("flowpp:owners") == {"alice", "bob"}
    assert [job.id for job in service.jobs.page(status="queued").data] == [again.id, other.id]


@pytest.fixture
def written_by_an_older_version(service: Service, submit: Submit) -> list[Job]:
    """2,100 jobs in the order of their creation, none of them in the lists by status, of four slices and a rest."""
    first = submit("sampling", owner="alice")
    redis = service.redis
    fields = redis.hgetall(f"flowpp:job:{first.id}")
    with redis.pipeline(transaction=False) as pipeline:
        for sequence in range(2, 2_101):
            job_id = f"job_{sequence:024x}"
            pipeline.hset(f"flowpp:job:{job_id}", mapping=fields | {"sequence": str(sequence)})
            pipeline.zadd("flowpp:jobs", {job_id: sequence})
            pipeline.zadd("flowpp:jobs:owner:alice", {job_id: sequence})
        pipeline.set("flowpp:sequence", 2_100)
        pipeline.execute()
    redis.delete("flowpp:owners", "flowpp:indexed", *redis.keys("flowpp:jobs:status:*"))
    return [service.jobs.get(job_id) for job_id in redis.zrange("flowpp:jobs", 0, -1)]


def list_some(service: Service, slices: int = 1) -> None:
    """As a process does that is killed between two slices; the first slices only delete lists."""
    for _ in range(slices):
        assert load_script(service.redis, "index")(args=[500]) == 1


def listed(service: Service, **filters: Any) -> list[str]:
    found: list[str] = []
    more = True
    while more:
        page = service.jobs.page(after=found[-1] if found else None, limit=1_000, order="asc", **filters)
        found += [job.id for job in page.data]
        more = page.has_more
    return found


def test_no_script_that_lists_an_older_servers_jobs_takes_more_than_a_slice(
    service: Service, written_by_an_older_version: list[Job]
) -> None:
    redis = service.redis
    redis.config_resetstat()
    assert listed(service, type="sampling") == [job.id for job in written_by_an_older_version]
    stats = redis.info("commandstats")
    enlisted, scripts = stats["cmdstat_zadd"]["calls"], stats["cmdstat_evalsha"]["calls"]
    assert enlisted == 2_100
    assert scripts >= 3 + 6  # pages, and slices with the one that begins
    assert sum(overview(redis).jobs["sampling"].values()) == 2_100


def test_a_listing_of_an_older_servers_jobs_that_was_interrupted_goes_on_where_it_was(
    service: Service, written_by_an_older_version: list[Job]
) -> None:
    list_some(service, 3)
    assert 0 < service.redis.zcard("flowpp:jobs:status:alice:sampling:queued") < 2_100
    service.redis.config_resetstat()
    assert listed(service, status="queued") == [job.id for job in written_by_an_older_version]
    assert service.redis.info("commandstats")["cmdstat_zadd"]["calls"] <= 2_100 - 500


def test_jobs_that_change_while_an_older_servers_are_listed_are_listed_as_they_are(
    service: Service, submit: Submit, written_by_an_older_version: list[Job]
) -> None:
    jobs = [job.id for job in written_by_an_older_version]
    changed: list[str] = []
    while service.redis.get("flowpp:indexed") != "1":
        load_script(service.redis, "index")(args=[500])
        for place in (len(changed), len(jobs) - 1 - len(changed)):  # one that is listed, at last, and one that is not
            service.jobs.cancel(jobs[place])
            changed.append(jobs[place])
        service.jobs.delete(jobs.pop(1_000))
        jobs.append(submit("sampling", owner="bob", max_queued=10_000).id)
    assert len(changed) > 8
    assert listed(service, status="cancelled") == [each for each in jobs if each in changed]
    assert listed(service, status="queued") == [each for each in jobs if each not in changed]
    assert listed(service, type="sampling") == jobs
    counts = overview(service.redis).jobs["sampling"]
    assert (counts["cancelled"], counts["queued"]) == (len(changed), len(jobs) - len(changed))


def test_lists_are_whole_for_all_who_ask_while_jobs_are_listed_anew(
    service: Service, written_by_an_older_version: list[Job]
) -> None:
    jobs = [job.id for job in written_by_an_older_version]
    answers: list[bool] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            page = service.jobs.page(status="queued", limit=1_000)
            answers.append([job.id for job in page.data] == jobs[:-1_001:-1])
            answers.append(sum(overview(service.redis).jobs["sampling"].values()) == len(jobs))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for _ in range(10):
        service.redis.delete("flowpp:indexed")
        time.sleep(0.1)
    until(lambda: len(answers) > 6)
    ended.set()
    for asker in askers:
        asker.join()
    assert all(answers)


def test_a_page_by_status_costs_the_same_however_many_jobs_there_are(service: Service, submit: Submit) -> None:
    rare = submit()
    service.jobs.cancel(rare.id)

    def commands() -> int:
        service.redis.config_resetstat()
        assert [job.id for job in service.jobs.page(status="cancelled", owner=rare.owner).data] == [rare.id]
        return sum(stat["calls"] for stat in service.redis.info("commandstats").values())

    before = [commands() for _ in range(2)][1]
    for _ in range(300):
        submit()
    assert commands() == before


def test_a_page_reads_no_more_records_than_it_shows(service: Service, submit: Submit) -> None:
    for number in range(300):
        submit(metadata={"even": str(number % 2 == 0)})

    def records_read(**filters: object) -> int:
        service.redis.config_resetstat()
        assert len(service.jobs.page(limit=20, **filters).data) == 20
        return service.redis.info("commandstats")["cmdstat_hgetall"]["calls"]

    assert records_read() == 21
    assert records_read(metadata={"even": "True"}, status="queued") == 21


def test_images_that_came_with_a_request_go_from_its_record_when_it_ends(service: Service, submit: Submit) -> None:
    plan = {"checkpoint": "ckpt_1", "num_images": 1, "images": in_record(np.zeros((1, 8, 8, 3), np.uint8), ["a.png"])}
    job, _ = service.jobs.submit(NewJob(new_job_id(), "likelihood", {}, plan, {}, ()), 10)
    (job,) = service.jobs.claim("inference", "worker")
    assert service.jobs.end(job, "stopped") == "queued"
    assert service.jobs.get(job.id).plan == json.loads(json.dumps(plan)), "it is to be computed yet"
    (job,) = service.jobs.claim("inference", "worker")
    service.jobs.end(job, "succeeded", result={"bits_per_dim": 4.0})
    assert service.jobs.get(job.id).plan == {"checkpoint": "ckpt_1", "num_images": 1}


def test_owners_take_turns_in_proportion_to_what_they_ask_for(service: Service, submit: Submit) -> None:
    many = [submit("likelihood", owner="many", size=10) for _ in range(4)]
    few = [submit("likelihood", owner="few", size=10) for _ in range(2)]
    order = [service.jobs.claim("inference", "worker")[0].id for _ in range(6)]
    assert {few[0].id, few[1].id} < set(order[:4]), "the second owner waits for all of the first"
    assert [id for id in order if id in {job.id for job in many}] == [job.id for job in many]


def test_a_job_that_was_put_back_keeps_its_turn(service: Service, submit: Submit) -> None:
    first, second = submit(), submit()
    (claimed,) = service.jobs.claim("training", "worker")
    service.jobs.end(claimed, "stopped")
    assert service.jobs.waiting("training") == [first.id, second.id]


def test_an_owner_may_have_so_many_unfinished_jobs(service: Service, submit: Submit) -> None:
    job = submit(owner="alice", max_jobs=1)
    with pytest.raises(OverQuota, match="alice has 1 jobs that have not finished"):
        submit(owner="alice", max_jobs=1)
    submit(owner="bob", max_jobs=1)
    service.jobs.cancel(job.id)
    submit(owner="alice", max_jobs=1)


def test_another_owners_job_is_not_found_and_not_listed(service: Service, submit: Submit) -> None:
    hers, his = submit(owner="alice"), submit(owner="bob")
    with pytest.raises(NotFound, match="there is no job"):
        service.jobs.get(hers.id, "bob")
    assert service.jobs.get(hers.id, "alice").owner == "alice"
    assert [job.id for job in service.jobs.page(owner="bob").data] == [his.id]
    with pytest.raises(NotFound):
        service.jobs.page(owner="bob", after=hers.id)


def test_a_job_from_before_there_were_turns_takes_one_when_it_is_queued(service: Service, submit: Submit) -> None:
    job = submit()
    service.jobs.pause(job.id)
    service.redis.hdel(f"flowpp:job:{job.id}", "turn")
    service.jobs.resume(job.id)
    assert [claimed.id for claimed in service.jobs.claim("training", "worker")] == [job.id]


def due(service: Service, index: str, job: Job) -> None:
    """Makes the time of a job's deadline or end come, as waiting would."""
    assert service.redis.zscore(index, job.id) is not None
    service.redis.zadd(index, {job.id: 1})


@pytest.mark.parametrize("status", STATUSES)
def test_a_job_whose_time_is_over_is_cancelled_unless_it_has_finished(
    service: Service, submit: Submit, status: str
) -> None:
    submit_timed = partial(submit, cancel_after=3_600)
    job = in_status(service, submit_timed, status)
    assert job.cancel_at == pytest.approx(job.created_at + 3_600, abs=0.01)
    if status in TERMINAL:
        assert service.redis.zcard("flowpp:deadlines") == 0, "nothing is left to do"
        return
    assert service.jobs.cancel_due() == [], "not yet"
    due(service, "flowpp:deadlines", job)
    assert service.jobs.cancel_due() == [job.id]
    if status in ("running", "pausing", "cancelling"):
        assert service.jobs.get(job.id).status == "cancelling"
        assert service.jobs.end(job, "stopped") == "cancelled"
    assert service.jobs.get(job.id).status == "cancelled"
    said = service.events.page(job.id).data[-1].data["message"]
    assert said == ("cancelled" if status == "cancelling" else "cancelled: its Cancel-After ran out")
    assert service.redis.zcard("flowpp:deadlines") == 0


def test_a_job_with_a_deadline_that_is_deleted_leaves_nothing(service: Service, submit: Submit) -> None:
    job = submit(cancel_after=3_600)
    service.jobs.delete(job.id)
    assert [key for key in service.redis.keys("*") if job.id in key] == []
    assert service.redis.zcard("flowpp:deadlines") == 0


@pytest.mark.parametrize("type", ["likelihood", "sampling"])
@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled"])
def test_an_inference_job_that_has_finished_expires(service: Service, submit: Submit, type: str, outcome: str) -> None:
    job = submit(type)
    assert service.jobs.get(job.id).expires_at is None
    if outcome == "cancelled":
        service.jobs.cancel(job.id)
    else:
        service.jobs.end(claim(service, "inference"), outcome, error=ERROR)
    job = service.jobs.get(job.id)
    assert job.finished_at is not None
    assert job.expires_at == pytest.approx(job.finished_at + service.settings.result_ttl_seconds, abs=0.01)
    assert service.jobs.expired() == []
    due(service, "flowpp:expiring", job)
    assert service.jobs.expired() == [job.id]
    service.jobs.delete(job.id)
    assert service.redis.zcard("flowpp:expiring") == 0


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_a_training_job_never_expires(service: Service, submit: Submit, status: str) -> None:
    assert in_status(service, submit, status).expires_at is None
    assert service.redis.zcard("flowpp:expiring") == 0


def test_percent_done_is_known_from_the_start(service: Service, submit: Submit) -> None:
    assert submit(total_steps=20).progress == Progress(step=0, total_steps=20, percent_done=0)


def test_only_a_job_that_runs_has_an_estimated_end_and_only_of_its_own_attempt(
    service: Service, submit: Submit
) -> None:
    submit(total_steps=20)
    job = claim(service)
    estimate = Progress.at(10, 20).model_copy(update={"estimated_finish_at": 2e9})

    def shown() -> tuple[str, float | None]:
        now = service.jobs.get(job.id)
        assert now.progress is not None
        assert now.progress.percent_done == 50
        return now.status, now.progress.estimated_finish_at

    service.jobs.set_progress(job, estimate)
    assert shown() == ("running", 2e9)
    service.jobs.pause(job.id)
    service.jobs.set_progress(job, estimate)
    assert shown() == ("pausing", None)
    service.jobs.end(job, "stopped")
    assert shown() == ("paused", None)
    service.jobs.resume(job.id)
    assert shown() == ("queued", None)
    claim(service)
    assert shown() == ("running", None), "that was the pace of another attempt"


def test_failures_count_anew_after_progress(service: Service, submit: Submit) -> None:
    job = submit()
    for _ in range(3 * job.max_attempts):
        running = claim(service)
        service.jobs.forgive(running)
        service.jobs.end(running, "crashed", error=ERROR)
    assert (service.jobs.get(job.id).status, service.jobs.get(job.id).failures) == ("queued", 1)
    service.jobs.end(claim(service), "crashed", error=ERROR)
    assert service.jobs.get(job.id).status == "failed"


def test_a_likelihood_job_is_not_resumed_as_it_cannot_be_paused(service: Service, submit: Submit) -> None:
    with pytest.raises(Conflict, match="only a paused job can be resumed"):
        service.jobs.resume(submit("likelihood").id)


def test_a_job_that_is_sent_again_since_the_answer_was_lost_stays_what_it_is(service: Service) -> None:
    new = NewJob(new_job_id(), "training", {"of": "this test"}, {}, {}, ())
    service.jobs.submit(new, max_queued=1)
    running = claim(service)
    job, to_be_rung = service.jobs.submit(new, max_queued=1)
    assert (job, to_be_rung) == (running, True)
    assert statuses(service, job) == ["queued", "running"]
    assert service.jobs.waiting("training") == []


def test_wishes_are_heard_of_many_jobs_at_once_each_by_its_attempt(service: Service, submit: Submit) -> None:
    for _ in range(3):
        submit()
    lost, cancelled, running = (claim(service) for _ in range(3))
    service.jobs.end(lost, "stopped")
    service.jobs.cancel(cancelled.id)
    assert service.jobs.wishes([lost, cancelled, running], renew=True) == [None, "cancelling", "running"]
    assert service.jobs.wishes([]) == []


def test_jobs_are_found_together_and_none_is_said_of_what_there_is_not(service: Service, submit: Submit) -> None:
    first, second = submit(), submit()
    assert service.jobs.find([first.id, "job_0", second.id]) == [first, None, second]


def test_limits_hold_and_turns_are_fair_among_jobs_that_are_submitted_together(service: Service) -> None:
    def together(owners: str, max_queued: int = 100, max_jobs: int = 100) -> list[str]:
        new = [NewJob(new_job_id(), "likelihood", {}, {}, {}, (), "group", 1, owner) for owner in owners]
        found = service.jobs.submit_all([Submission(each, max_queued, max_jobs) for each in new])
        return [type(each).__name__ if isinstance(each, Refusal) else each[0].id for each in found]

    alices = together("aaa")
    [bobs] = together("b")
    assert together("aab", max_jobs=4)[1] == "OverQuota"
    assert together("cc", max_queued=7)[1] == "QueueFull"
    order = service.jobs.waiting("inference")
    assert [job for job in order if job in alices] == alices
    assert order.index(bobs) < order.index(alices[1])
    assert len(order) == 7


def test_many_jobs_are_submitted_claimed_and_ended_at_once(service: Service) -> None:
    def new() -> NewJob:
        return NewJob(new_job_id(), "likelihood", {}, {}, {}, (), "group", 1, "alice")

    found = service.jobs.submit_all([Submission(new(), 10_000, 10_000) for _ in range(1_200)])
    ids = [each[0].id for each in found if not isinstance(each, Refusal)]
    assert service.jobs.waiting("inference") == ids
    jobs = [job for _ in range(5) for job in service.jobs.claim("inference", WORKER, 250)]
    assert [job.id for job in jobs] == ids
    ended = service.jobs.succeed([(job, {"of": job.id}, "", Progress.at(1, 1)) for job in jobs])
    assert ended == ["succeeded"] * 1_200
    for job in service.jobs.find(ids):
        assert job is not None
        assert (job.status, job.result) == ("succeeded", {"of": job.id})
        assert statuses(service, job) == ["queued", "running", "succeeded"]
    assert service.redis.zcard("flowpp:expiring") == service.redis.zcard("flowpp:changed") == 1_200
    left = ("flowpp:unfinished:alice", "flowpp:leases", "flowpp:queued:inference")
    assert service.redis.exists(*left) == 0


def test_a_job_that_cannot_be_ended_keeps_none_from_ending_beside_it(service: Service, submit: Submit) -> None:
    for _ in range(3):
        submit("likelihood", group="group", total_steps=1)
    first, broken, last = jobs = service.jobs.claim("inference", WORKER, 3)
    service.redis.hset(f"flowpp:job:{broken.id}", "plan", "{")
    with pytest.raises(ResponseError, match="Expected object key"):
        service.jobs.succeed([(job, {}, "", Progress.at(1, 1)) for job in jobs])
    for job in (first, last):
        assert service.jobs.get(job.id).status == "succeeded"
        assert statuses(service, job) == ["queued", "running", "succeeded"], "each event once"
    assert service.redis.hget(f"flowpp:job:{broken.id}", "status") == "running"
    assert statuses(service, broken) == ["queued", "running"], "nothing was written"
    assert service.redis.zrange("flowpp:leases", 0, -1) == [broken.id]
