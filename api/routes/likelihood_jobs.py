"""Likelihood jobs: the bits/dim of images."""

from fastapi import APIRouter

from api.answers import AnswerOf
from api.bodies import openapi, submit
from api.deadlines import JobCreationOf
from api.schemas import JobObject
from worker.requests import LikelihoodRequest
from worker.submission import prepare_likelihood

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
async def score(creation: JobCreationOf, answer: AnswerOf) -> JobObject:
    """Score images: a dataset's validation images (JSON), or images in the request (multipart).

    The result holds mean bits/dim with its standard error and its split, and for up to 32 images each one's figures;
    likelihood.csv, an artifact of jobs on a dataset or more images, has a row an image.
    """
    job = await submit(creation, LikelihoodRequest, prepare_likelihood)
    return await answer(job)
