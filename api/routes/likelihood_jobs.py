"""Likelihood jobs: the bits/dim of images."""

import json
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from api.answers import answer
from api.dependencies import ServiceOf, WaitSeconds
from api.problems import Unsupported, UploadTooLarge
from api.schemas import JobObject
from api.uploads import Upload, received
from flowpp.data import read_images
from worker.jobs import Job
from worker.requests import LikelihoodRequest
from worker.service import Service

router = APIRouter(prefix="/likelihood-jobs", tags=["jobs"])

MAX_JSON_BYTES = 2**16

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": LikelihoodRequest.model_json_schema(ref_template="#/components/schemas/{model}"),
                "example": {"model": "job_0123456789abcdef01234567", "dataset": "ds_0123456789abcdef01234567"},
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["model", "files"],
                    "properties": {
                        "model": {"type": "string", "description": "A checkpoint's id, or a training job's."},
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "Image files: PNG, JPEG, WebP, BMP or TIFF.",
                        },
                        "importance_samples": {"type": "integer", "minimum": 1, "default": 1},
                        "seed": {"type": "integer", "minimum": 0, "default": 0},
                    },
                }
            },
        },
    }
}


@router.post(
    "",
    status_code=202,
    openapi_extra=FORM,
    responses={200: {"model": JobObject, "description": "Finished within `wait`."}},
)
async def score(request: Request, response: Response, service: ServiceOf, wait_seconds: WaitSeconds) -> JobObject:
    """Score images: a dataset's validation images (JSON), or images in the request (multipart).

    The result holds mean bits/dim with its standard error; likelihood.csv, an artifact, a row an image.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        job = await run_in_threadpool(service.submit_likelihood, _parsed(await _json(request)))
    elif kind == "multipart/form-data":
        settings = service.settings
        async with received(request, "files", settings.max_request_bytes, settings.max_request_images) as form:
            job = await run_in_threadpool(_submit_images, service, form)
    else:
        raise Unsupported("send application/json with a dataset, or multipart/form-data with the file field 'files'")
    return await answer(service, job, response, wait_seconds)


def _submit_images(service: Service, form: Upload) -> Job:
    request = _parsed(dict(form.fields))
    service.checkpoints.resolve(request.model)  # before the images are decoded
    files = [(name, path.read_bytes()) for name, path in form.files]
    images, names = _decode(files, service)
    return service.submit_likelihood(request, images, names)


def _decode(files: list[tuple[str, bytes]], service: Service) -> tuple[np.ndarray, list[str]]:
    images = read_images(files, limits=service.settings.request_limits)
    return images, [name for name, _ in files]


async def _json(request: Request) -> Any:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise UploadTooLarge(MAX_JSON_BYTES)
    try:
        return json.loads(body)
    except ValueError as error:
        fault = {"type": "json_invalid", "loc": ("body",), "msg": f"the body is not JSON: {error}", "input": None}
        raise RequestValidationError([fault]) from error


def _parsed(values: Any) -> LikelihoodRequest:
    try:
        return LikelihoodRequest.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(
            [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        ) from error
