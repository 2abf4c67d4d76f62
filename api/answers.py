"""The answer to a new job: the finished one if it comes in time, else where to look for it."""

import anyio
from fastapi import Response
from fastapi.concurrency import run_in_threadpool

from api.schemas import JobObject
from worker.jobs import Job
from worker.service import Service

RETRY_AFTER_SECONDS = 1


async def answer(service: Service, job: Job, response: Response, wait_seconds: float) -> JobObject:
    """200 with the finished job if it is so within `wait_seconds`, else 202, Location and Retry-After."""
    deadline = anyio.current_time() + wait_seconds
    pause = 0.01
    while not job.finished and anyio.current_time() < deadline:
        await anyio.sleep(pause)
        pause = min(0.25, 1.3 * pause)
        job = await run_in_threadpool(service.jobs.get, job.id)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if job.finished:
        response.status_code = 200
    else:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    position = await run_in_threadpool(service.jobs.queue_position, job)
    return JobObject(**dict(job), queue_position=position)
