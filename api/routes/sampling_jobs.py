"""Sampling jobs."""

from typing import Annotated

from fastapi import APIRouter, Body, Response
from fastapi.concurrency import run_in_threadpool

from api.answers import answer
from api.dependencies import ServiceOf, WaitSeconds
from api.schemas import JobObject
from worker.requests import SamplingRequest

router = APIRouter(prefix="/sampling-jobs", tags=["jobs"])

EXAMPLE = {"model": "job_0123456789abcdef01234567", "num_samples": 16, "temperature": 0.9, "seed": 1}


@router.post("", status_code=202, responses={200: {"model": JobObject, "description": "Finished within `wait`."}})
async def sample(
    request: Annotated[SamplingRequest, Body(examples=[EXAMPLE])],
    response: Response,
    service: ServiceOf,
    wait_seconds: WaitSeconds,
) -> JobObject:
    """Draw images. The artifacts are grid.png, samples.npz and png/0000.png, ..."""
    job = await run_in_threadpool(service.submit_sampling, request)
    return await answer(service, job, response, wait_seconds)
