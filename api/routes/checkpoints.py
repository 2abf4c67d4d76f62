"""Checkpoints: trained models, to list and to take home."""

import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from api.dependencies import ServiceOf
from api.schemas import After, Limit, ListOf, Order, as_list
from api.uploads import received
from flowpp.published import PUBLISHED
from worker.models import Checkpoint
from worker.refusals import Invalid

router = APIRouter(prefix="/checkpoints", tags=["checkpoints"])


FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "preset"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "The authors' .npz file of a model's weights.",
                        },
                        "preset": {"type": "string", "enum": list(PUBLISHED), "description": "The model it is of."},
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, openapi_extra=FORM)
async def upload(request: Request, response: Response, service: ServiceOf) -> Checkpoint:
    """Import the weights that the authors of Flow++ published, to score and sample with."""
    async with received(request, "file", service.settings.max_upload_bytes, max_files=1) as form:
        preset = form.fields.get("preset", "")
        if preset not in PUBLISHED:
            raise Invalid("unknown_preset", f"the authors published {', '.join(PUBLISHED)}, not {preset!r}", "preset")
        checkpoint = await run_in_threadpool(service.import_checkpoint, form.files[0][1], preset)
    response.headers["Location"] = f"/v1/checkpoints/{checkpoint.id}"
    return checkpoint


@router.get("")
def list_checkpoints(
    service: ServiceOf,
    after: After = None,
    limit: Limit = 20,
    order: Order = "desc",
    job: Annotated[str | None, Query(max_length=64, description="Only those of this training job.")] = None,
) -> ListOf[Checkpoint]:
    """List checkpoints."""
    return ListOf[Checkpoint](**as_list(service.checkpoints.page(job=job, after=after, limit=limit, order=order)))


@router.get("/{checkpoint_id}")
def get_checkpoint(checkpoint_id: str, service: ServiceOf) -> Checkpoint:
    """Get a checkpoint's step, images seen, metrics and model."""
    return service.checkpoints.get(checkpoint_id)


@router.get("/{checkpoint_id}/download", response_class=FileResponse)
def download(checkpoint_id: str, service: ServiceOf) -> FileResponse:
    """A zip of the checkpoint's directory; unpacked, `flowpp.FlowPP.load` reads it."""
    checkpoint = service.checkpoints.get(checkpoint_id)
    directory = service.checkpoints.fetch(checkpoint)
    with tempfile.NamedTemporaryFile(prefix="flowpp-download-", suffix=".zip", delete=False) as file:
        path = Path(file.name)
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # weights do not compress
            for each in sorted(directory.iterdir()):
                archive.write(each, f"{checkpoint.id}/{each.name}")
    except BaseException:
        path.unlink()
        raise
    return FileResponse(
        path, media_type="application/zip", filename=f"{checkpoint.id}.zip", background=BackgroundTask(path.unlink)
    )
