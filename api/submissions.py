"""Submissions of jobs: those of small requests that come at about the same time go to Redis together."""

import asyncio
from collections.abc import Callable, Sequence

from fastapi.concurrency import run_in_threadpool

from worker.jobs import Job
from worker.service import Service
from worker.submission import Prepared, submit_all

MOST_TOGETHER_BYTES = 2**15

Prepare = Callable[[], Prepared | Job]
"""Checks and resolves what is asked for, in a thread; gives a job that the same request has created before."""


class Submissions:
    """Submits what requests ask for, in a thread; what comes while that is under way waits for the next one.

    A thread, a round trip and Redis' wait for its disk take as long for many as for one.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asked: list[tuple[Prepare, asyncio.Future[Job]]] = []
        self._submitting: asyncio.Task[None] | None = None

    async def __call__(self, prepare: Prepare, size: int) -> Job:
        """`size` is of the request, in bytes: a large one goes alone, so that nobody waits for it.

        Raises what `prepare` does, and the refusals of `worker.submission`.
        """
        if size > MOST_TOGETHER_BYTES:
            (job,) = await run_in_threadpool(_submitted, self._service, [prepare])
            if isinstance(job, Exception):
                raise job
            return job
        found: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._asked.append((prepare, found))
        if self._submitting is None or self._submitting.done():
            self._submitting = asyncio.create_task(self._submit())
        await asyncio.wait([found])
        return found.result()

    async def _submit(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, []
            jobs = await run_in_threadpool(_submitted, self._service, [prepare for prepare, _ in asked])
            for (_, found), job in zip(asked, jobs, strict=True):
                if isinstance(job, Exception):
                    found.set_exception(job)
                else:
                    found.set_result(job)


def _submitted(service: Service, wanted: Sequence[Prepare]) -> list[Job | Exception]:
    """The job of each, or else why there is none, to be raised where it was asked for."""
    found: list[Prepared | Job | Exception] = []
    for prepare in wanted:
        try:
            found.append(prepare())
        except Exception as error:  # which is none of the others' business
            found.append(error)
    prepared = [each for each in found if isinstance(each, Prepared)]
    try:
        submitted: list[Job | Exception] = submit_all(service, prepared) if prepared else []
    except Exception as error:
        submitted = [error] * len(prepared)
    jobs = iter(submitted)
    return [next(jobs) if isinstance(each, Prepared) else each for each in found]
