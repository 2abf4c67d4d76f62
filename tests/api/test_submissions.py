"""Submissions: requests that come at about the same time are one round trip, and each has its own answer."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from api.submissions import MOST_TOGETHER_BYTES, Submissions
from worker.jobs import Job, Submission
from worker.models import Checkpoint
from worker.refusals import Invalid, NotFound, OverQuota, QueueFull, Refusal
from worker.requests import LikelihoodRequest
from worker.service import Service
from worker.submission import Prepared, prepare_likelihood

Asked = Callable[[], Prepared | Job]


@pytest.fixture
def trips(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many jobs each round trip submitted."""
    found: list[int] = []
    submit_all = service.jobs.submit_all

    def counted(submissions: Sequence[Submission]) -> list[tuple[Job, bool] | Refusal]:
        found.append(len(submissions))
        return submit_all(submissions)

    monkeypatch.setattr(service.jobs, "submit_all", counted)
    return found


def asking(service: Service, checkpoint: Checkpoint, size: int = 32, n: int = 1, **limits: int) -> Asked:
    images = np.zeros((n, size, size, 3), np.uint8)

    def prepare() -> Prepared:
        found = prepare_likelihood(service, LikelihoodRequest(model=checkpoint.id), images)
        new = found.submission.new
        return Prepared(Submission(new, limits.get("max_queued", 100), limits.get("max_jobs", 100)))

    return prepare


def answers(service: Service, asked: Sequence[Asked], size: int = 100) -> list[Job | BaseException]:
    async def submitted() -> list[Job | BaseException]:
        submissions = Submissions(service)
        return await asyncio.gather(*(submissions(each, size) for each in asked), return_exceptions=True)

    return asyncio.run(submitted())


def test_requests_that_come_together_are_one_round_trip(
    service: Service, checkpoint: Checkpoint, trips: list[int]
) -> None:
    jobs = answers(service, [asking(service, checkpoint) for _ in range(9)])
    assert trips == [9]
    assert all(isinstance(job, Job) for job in jobs)
    assert service.jobs.waiting("inference") == [job.id for job in jobs if isinstance(job, Job)]
    assert len(set(service.jobs.waiting("inference"))) == 9


def test_each_is_refused_for_its_own_reason_and_the_others_are_submitted(
    service: Service, checkpoint: Checkpoint, trips: list[int]
) -> None:
    gone = checkpoint.model_copy(update={"id": "ckpt_0"})
    service.checkpoints._known["ckpt_0"] = gone  # it was read before, and deleted since
    asked = [
        asking(service, checkpoint),
        asking(service, checkpoint, size=16),
        asking(service, gone),
        asking(service, checkpoint, max_jobs=1),
        asking(service, checkpoint, max_queued=1),
        asking(service, checkpoint),
    ]
    found = answers(service, asked)
    assert trips == [5], "what cannot be prepared is not sent"
    assert [type(each) for each in found] == [Job, Invalid, NotFound, OverQuota, QueueFull, Job]
    assert len(service.jobs.waiting("inference")) == 2


def test_what_was_stored_for_one_that_is_refused_is_deleted(service: Service, checkpoint: Checkpoint) -> None:
    first, second = answers(
        service, [asking(service, checkpoint, n=30), asking(service, checkpoint, n=30, max_queued=1)]
    )
    assert isinstance(first, Job)
    assert isinstance(second, QueueFull)
    assert {file.name.partition("/")[0] for file in service.store.listing("jobs")} == {first.id}


def test_what_fails_for_all_is_raised_for_each_and_the_next_are_submitted(
    service: Service, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Sequence[Submission]) -> None:
        raise ConnectionError("Redis is away")

    existing = service.jobs.submit(asking(service, checkpoint)().submission.new, 100)[0]  # type: ignore[union-attr]
    with monkeypatch.context() as away:
        away.setattr(service.jobs, "submit_all", fails)
        found = answers(service, [asking(service, checkpoint, n=30), lambda: existing, asking(service, checkpoint)])
    assert [str(each) for each in (found[0], found[2])] == ["Redis is away"] * 2
    assert found[1] == existing
    assert service.store.listing("jobs") == []
    assert isinstance(answers(service, [asking(service, checkpoint)])[0], Job)


def test_nobody_waits_for_a_large_request(service: Service, checkpoint: Checkpoint) -> None:
    small_is_done = threading.Event()

    def large() -> Prepared | Job:
        assert small_is_done.wait(30)
        return asking(service, checkpoint)()

    async def submitted() -> None:
        submissions = Submissions(service)
        first = asyncio.create_task(submissions(large, MOST_TOGETHER_BYTES + 1))
        await asyncio.sleep(0.05)
        assert (await submissions(asking(service, checkpoint), MOST_TOGETHER_BYTES)).status == "queued"
        small_is_done.set()
        assert (await first).status == "queued"

    asyncio.run(submitted())
