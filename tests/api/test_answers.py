"""Answers to new jobs: who waits for jobs that end together is answered out of one look."""

import asyncio
from collections.abc import Sequence

import pytest

from api.answers import Looks
from tests.worker.conftest import Submit
from worker.jobs import Job, Jobs
from worker.refusals import NotFound
from worker.service import Service


class Counted(Jobs):
    """Notes how many jobs each look was for."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.redis, lease_seconds=1, max_attempts=1)
        self.looks: list[int] = []

    def find(self, ids: Sequence[str]) -> list[Job | None]:
        self.looks.append(len(ids))
        return super().find(ids)


def test_jobs_that_are_asked_for_together_are_seen_in_one_look(service: Service) -> None:
    submit, counted = Submit(service), Counted(service)
    jobs = [submit("sampling") for _ in range(14)]

    async def looked() -> list[Job]:
        look = Looks(counted)
        return await asyncio.gather(*(look(job.id) for job in [*jobs, jobs[0]]))

    assert asyncio.run(looked()) == [*jobs, jobs[0]]
    assert counted.looks == [14]


def test_one_that_is_not_there_keeps_nobody_else_from_being_answered(service: Service) -> None:
    job = Submit(service)("sampling")

    async def looked() -> list[Job | BaseException]:
        look = Looks(service.jobs)
        return await asyncio.gather(look(job.id), look("job_0"), return_exceptions=True)

    found, missing = asyncio.run(looked())
    assert found == job
    assert isinstance(missing, NotFound)


def test_what_goes_wrong_is_raised_for_each_who_asked_and_the_next_look_is_another(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Submit(service)
    first, second = submit("sampling"), submit("sampling")

    def fails(_: Sequence[str]) -> list[Job | None]:
        raise ConnectionError("Redis is away")

    async def looked() -> None:
        look = Looks(service.jobs)
        with monkeypatch.context() as away:
            away.setattr(service.jobs, "find", fails)
            answers = await asyncio.gather(look(first.id), look(second.id), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["Redis is away"] * 2
        assert await look(second.id) == second

    asyncio.run(looked())
