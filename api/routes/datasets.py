"""Datasets: uploaded image sets."""

import tempfile
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.dependencies import ServiceOf
from api.schemas import After, Limit, ListOf, Order, as_list
from api.uploads import Upload, received
from flowpp.data import build_image_set
from worker.datasets import Dataset
from worker.service import Service

router = APIRouter(prefix="/datasets", tags=["datasets"])

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "description": "A .zip, .tar or .tar.gz of images, .npy or .npz (uint8 [N, H, W(, C)]), "
                            "one of CIFAR-10's official archives, or several image files (repeat the field). Folders "
                            "or arrays named train and validation are the split; else a tenth is held out.",
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, openapi_extra=FORM)
async def upload(request: Request, response: Response, service: ServiceOf) -> Dataset:
    """Upload images. They are decoded and checked before this answers."""
    settings = service.settings
    async with received(request, "file", settings.max_upload_bytes, settings.max_request_images) as form:
        dataset = await run_in_threadpool(_register, service, form)
    response.headers["Location"] = f"/v1/datasets/{dataset.id}"
    return dataset


def _register(service: Service, form: Upload) -> Dataset:
    paths = [path for _, path in form.files]
    with tempfile.TemporaryDirectory(prefix="flowpp-dataset-") as directory:
        source = paths[0] if len(paths) == 1 else paths
        image_set = build_image_set(source, Path(directory) / "images", limits=service.settings.dataset_limits)
        return service.datasets.register(image_set, form.files[0][0])


@router.get("")
def list_datasets(service: ServiceOf, after: After = None, limit: Limit = 20, order: Order = "desc") -> ListOf[Dataset]:
    """List datasets."""
    return ListOf[Dataset](**as_list(service.datasets.page(after=after, limit=limit, order=order)))


@router.get("/{dataset_id}")
def get_dataset(dataset_id: str, service: ServiceOf) -> Dataset:
    """Get a dataset."""
    return service.datasets.get(dataset_id)


@router.delete("/{dataset_id}", status_code=204)
def delete_dataset(dataset_id: str, service: ServiceOf) -> None:
    """Delete a dataset and its images. Refused (409) while a job that has not finished uses it."""
    service.datasets.delete(dataset_id)
