"""Datasets: uploaded image sets."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Response
from fastapi.concurrency import run_in_threadpool

from api.dependencies import CallerOf, DatasetOf, ServiceOf
from api.idempotency import Creation, CreationOf
from api.routes.artifacts import AS_ONE, Conditions
from api.schemas import After, Limit, ListOf, Order, as_list
from api.uploads import Upload, invalid_field, received, saved
from flowpp.data import build_image_set
from flowpp.images import encode_png, image_grid
from worker.datasets import Dataset

router = APIRouter(prefix="/datasets", tags=["datasets"])

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "description": "A .zip, .tar or .tar.gz of images, .npy or .npz (uint8 [N, H, W(, C)]), "
                            "one of CIFAR-10's official archives, or several image files (repeat the field). Names of "
                            "folders, arrays and files such as train, val and test are the split. Without a validation "
                            "part, a tenth of the training images becomes one.",
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                        },
                        "test_as_validation": {
                            "description": "The images that are named as test images are the validation part. Without "
                            "this no training uses them.",
                            "type": "string",
                            "enum": ["true", "false"],
                        },
                    },
                }
            }
        },
    }
}


FIELDS = ("test_as_validation",)
"""Text fields of the form."""

SHEET: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}, "description": "The images, a black pixel around each."},
    304: {"description": "It is still the one that `If-None-Match` names."},
}
SHEET_IMAGES = 64


@router.post("", status_code=201, openapi_extra=FORM)
async def upload(creation: CreationOf) -> Dataset:
    """Upload images. They are decoded and checked before this answers.

    If you already have a dataset of the same images with the same split, the answer is that dataset, under its name,
    and nothing is stored again.
    """
    settings = creation.service.settings
    await run_in_threadpool(creation.service.check_bytes, creation.caller)
    async with (
        creation,
        received(creation.request, "file", settings.max_upload_bytes, settings.max_request_images, FIELDS) as form,
        saved(form) as sent,
    ):
        dataset = await run_in_threadpool(_register, creation, sent)
    creation.response.headers["Location"] = f"/v1/datasets/{dataset.id}"
    return dataset


def _register(creation: Creation, sent: Upload) -> Dataset:
    service = creation.service
    claim = creation.claim(dict(sent.fields), sent.files)
    test_as_validation = sent.fields.get("test_as_validation", "false")
    if test_as_validation not in ("true", "false"):
        raise invalid_field("test_as_validation", f"is {test_as_validation[:40]!r}; send true or false")
    if creation.existing:
        return service.datasets.get(creation.existing)
    with tempfile.TemporaryDirectory(prefix="flowpp-dataset-") as directory:
        source = sent.files[0][1] if len(sent.files) == 1 else sent.files
        image_set = build_image_set(
            source,
            Path(directory) / "images",
            limits=service.settings.dataset_limits,
            test_as_validation=test_as_validation == "true",
        )
        if same := service.datasets.same(image_set, creation.caller.owner, claim):
            return same
        return service.datasets.register(image_set, sent.files[0][0], creation.caller.owner, claim)


@router.get("")
def list_datasets(
    service: ServiceOf, caller: CallerOf, after: After = None, limit: Limit = 20, order: Order = "desc"
) -> ListOf[Dataset]:
    """List datasets."""
    page = service.datasets.page(after=after, limit=limit, order=order, owner=caller.sees)
    return ListOf[Dataset](**as_list(page))


@router.get("/{dataset_id}")
def get_dataset(dataset: DatasetOf) -> Dataset:
    """Get a dataset."""
    return dataset


@router.get("/{dataset_id}/contact-sheet", response_class=Response, responses=SHEET)
def contact_sheet(
    dataset: DatasetOf,
    service: ServiceOf,
    if_none_match: Annotated[
        list[str] | None, AS_ONE, Header(description="Answer 304 if the sheet is one of these.")
    ] = None,
) -> Response:
    """Look at a dataset: n = up to 64 of its images, evenly spread, in one PNG.

    Row by row, the k-th place has image k * num_images // n; training images come first.
    """
    headers = {"ETag": f'"{dataset.sha256}"', "Cache-Control": "private, no-cache"}
    if Conditions(if_none_match).is_known(headers["ETag"]):
        return Response(status_code=304, headers=headers)
    images = np.pad(service.datasets.some(dataset, SHEET_IMAGES), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return Response(encode_png(image_grid(images)), media_type="image/png", headers=headers)


@router.delete("/{dataset_id}", status_code=204)
def delete_dataset(dataset: DatasetOf, service: ServiceOf) -> None:
    """Delete a dataset and its images. Refused (409) while a job that has not finished uses it."""
    service.datasets.delete(dataset.id)
