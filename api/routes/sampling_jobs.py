"""Sampling jobs."""

from fastapi import APIRouter

from api.answers import AnswerOf
from api.bodies import openapi, submit
from api.deadlines import JobCreationOf
from api.schemas import JobObject
from worker.requests import SamplingRequest
from worker.submission import prepare_sampling

router = APIRouter(prefix="/sampling-jobs", tags=["jobs"])

BODY = openapi(
    SamplingRequest,
    example={"model": "job_0123456789abcdef01234567", "num_samples": 16, "temperature": 0.9, "seed": 1},
    files="Two image files, to interpolate between.",
    in_forms={"model", "num_samples", "seed"},
)


@router.post(
    "",
    status_code=202,
    openapi_extra=BODY,
    responses={200: {"model": JobObject, "description": "Finished within `wait`."}},
)
async def sample(creation: JobCreationOf, answer: AnswerOf) -> JobObject:
    """Draw images (JSON), or interpolate between two: of a dataset (JSON), or in the request (multipart).

    The artifacts are grid.png, samples.npz and png/0000.png, ...
    """
    job = await submit(creation, SamplingRequest, prepare_sampling)
    return await answer(job)
