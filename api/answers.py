"""The answer to a new job: the finished one if it comes in time, else where to look for it."""

import asyncio
import time
from contextlib import suppress
from typing import Annotated

from fastapi import Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.preferences import Preferences, PreferencesOf
from api.schemas import JobObject
from worker.finished import Finished
from worker.jobs import Job, Jobs
from worker.service import Service

RETRY_AFTER_SECONDS = 1
LOOK_SECONDS = 1.0
"""Word that a job has finished may be lost: then it is seen so much later."""


class Looks:
    """Looks for jobs: a batch ends many at once, and what is asked for while a look is under way waits for the next.

    Raises `NotFound`.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._asked: dict[str, asyncio.Future[Job | None]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def __call__(self, job_id: str) -> Job:
        found = self._asked.setdefault(job_id, asyncio.get_running_loop().create_future())
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.wait([found])
        job = found.result()
        return job if job is not None else await run_in_threadpool(self._jobs.get, job_id)

    async def _look(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                jobs = await run_in_threadpool(self._jobs.find, list(asked))
            except Exception as error:  # raised where it was asked for
                for found in asked.values():
                    found.set_exception(error)
            else:
                for found, job in zip(asked.values(), jobs, strict=True):
                    found.set_result(job)


class Answer:
    """Answers a new job: 200 with the finished one if it is so in time, else 202, Location and Retry-After."""

    def __init__(
        self, response: Response, service: Service, finished: Finished, looks: Looks, preferences: Preferences
    ) -> None:
        self._response = response
        self._service = service
        self._finished = finished
        self._looks = looks
        self._preferences = preferences

    async def __call__(self, job: Job) -> JobObject:
        if (wait := self._preferences.wait_seconds) and not job.finished:
            job = await self._awaited(job.id, wait)
        self._response.headers["Location"] = f"/v1/jobs/{job.id}"
        if job.finished:
            self._response.status_code = 200
        else:
            self._response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        if applied := self._preferences.applied(job.finished):
            self._response.headers["Preference-Applied"] = applied
        position = None
        if job.status == "queued":
            position = await run_in_threadpool(self._service.jobs.queue_position, job)
        return JobObject(**dict(job), queue_position=position)

    async def _awaited(self, job_id: str, seconds: float) -> Job:
        """The job when it has finished, or as it is when the time to wait is over."""
        deadline = time.monotonic() + seconds
        with self._finished.of(job_id) as word:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(deadline - time.monotonic(), LOOK_SECONDS)):
                        await word.wait()
                word.clear()  # before the look: word that comes after it is heard
                job = await self._looks(job_id)
                if job.finished or time.monotonic() > deadline:
                    return job


async def _answer(request: Request, response: Response, preferences: PreferencesOf) -> Answer:
    state = request.app.state  # looked up here: as dependencies of this one they would take longer than it does
    return Answer(response, state.service, state.finished, state.looks, preferences)


AnswerOf = Annotated[Answer, Depends(_answer)]
