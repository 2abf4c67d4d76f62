"""A lease: kept while the block runs, told what is wished, and lost when another has the job."""

import time

from tests.waiting import until
from tests.worker.conftest import Submit
from worker.connection import redis_time
from worker.lease import Lease
from worker.service import Service


def test_a_lease_is_renewed_in_the_block_and_not_after(service: Service, submit: Submit) -> None:
    submit()
    [job] = service.jobs.claim("training", "a worker")

    def end() -> float:
        return float(service.redis.zscore("flowpp:leases", job.id))

    with Lease(service.jobs, [job]):
        first = end()
        until(lambda: end() > first + 2 * service.jobs.lease_seconds, "the lease is not renewed")
    last = end()
    assert until(service.jobs.reap, "the lease does not end") == [job.id]
    assert redis_time(service.redis) >= last


def test_a_wish_is_heard(service: Service, submit: Submit) -> None:
    submit()
    [job] = service.jobs.claim("training", "a worker")
    with Lease(service.jobs, [job]) as lease:
        assert lease.wish(job) == "running"
        service.jobs.pause(job.id)
        until(lambda: lease.wish(job) == "pausing")
        service.jobs.cancel(job.id)
        until(lambda: lease.wish(job) == "cancelling")
        assert not lease.lost(job)


def test_a_job_that_another_has_is_lost(service: Service, submit: Submit) -> None:
    submit()
    [job] = service.jobs.claim("training", "a worker")
    with Lease(service.jobs, [job]) as lease:
        service.redis.zadd("flowpp:leases", {job.id: 0})
        service.jobs.reap()
        [again] = service.jobs.claim("training", "another worker")
        until(lambda: lease.lost(job))
        service.redis.zadd("flowpp:leases", {job.id: 1})
        time.sleep(2 * service.jobs.lease_seconds)
        assert service.redis.zscore("flowpp:leases", job.id) == 1  # the stale one renews nothing
        assert service.jobs.wishes([again]) == ["running"]


def test_what_was_wished_of_an_earlier_attempt_does_not_count_for_a_later_one(service: Service, submit: Submit) -> None:
    """As where one worker loses a job and claims it again, under the same lease."""
    submit()
    [job] = service.jobs.claim("training", "a worker")
    with Lease(service.jobs, [job]) as lease:
        service.redis.zadd("flowpp:leases", {job.id: 0})
        service.jobs.reap()
        until(lambda: lease.lost(job))
        lease.let_go(job)
        [again] = service.jobs.claim("training", "a worker")
        lease.hold(again)
        assert not lease.lost(again)
        service.jobs.pause(job.id)
        until(lambda: lease.wish(again) == "pausing")
