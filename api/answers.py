"""The answer to a new job: the finished one if it comes in time, else where to look for it."""

import asyncio
import time
from contextlib import suppress

from fastapi import Response
from fastapi.concurrency import run_in_threadpool

from api.schemas import JobObject
from worker.finished import Finished
from worker.jobs import Job
from worker.service import Service

RETRY_AFTER_SECONDS = 1
LOOK_SECONDS = 1.0
"""Word that a job has finished may be lost: then it is seen so much later."""


async def answer(service: Service, finished: Finished, job: Job, response: Response, wait_seconds: float) -> JobObject:
    """200 with the finished job if it is so within `wait_seconds`, else 202, Location and Retry-After."""
    deadline = time.monotonic() + wait_seconds
    if wait_seconds and not job.finished:
        with finished.of(job.id) as word:
            while True:
                word.clear()  # before the look: word that comes after it is heard
                job = await run_in_threadpool(service.jobs.get, job.id)
                left = deadline - time.monotonic()
                if job.finished or left <= 0:
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LOOK_SECONDS)):
                        await word.wait()
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if job.finished:
        response.status_code = 200
    else:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    position = await run_in_threadpool(service.jobs.queue_position, job)
    return JobObject(**dict(job), queue_position=position)
