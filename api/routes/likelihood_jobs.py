"""Likelihood jobs: the bits/dim of images."""

from fastapi import APIRouter, Request, Response

from api.answers import answer
from api.bodies import openapi, submit
from api.dependencies import CallerOf, FinishedOf, ServiceOf, WaitSeconds
from api.idempotency import IdempotencyKey, creation
from api.schemas import JobObject
from worker.requests import LikelihoodRequest

router = APIRouter(prefix="/likelihood-jobs", tags=["jobs"])

BODY = openapi(
    LikelihoodRequest,
    example={"model": "job_0123456789abcdef01234567", "dataset": "ds_0123456789abcdef01234567"},
    files="Image files: PNG, JPEG, WebP, BMP or TIFF.",
    in_forms={"model", "importance_samples", "bits_map", "latents", "seed"},
)


@router.post(
    "",
    status_code=202,
    openapi_extra=BODY,
    responses={200: {"model": JobObject, "description": "Finished within `wait`."}},
)
async def score(
    request: Request,
    response: Response,
    service: ServiceOf,
    caller: CallerOf,
    finished: FinishedOf,
    wait_seconds: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JobObject:
    """Score images: a dataset's validation images (JSON), or images in the request (multipart).

    The result holds mean bits/dim with its standard error and its split; likelihood.csv, an artifact, a row an image.
    """
    async with creation(request, response, service, caller, idempotency_key) as once:
        job = await submit(request, service, caller, once, LikelihoodRequest, service.submit_likelihood)
    return await answer(service, finished, job, response, wait_seconds)
