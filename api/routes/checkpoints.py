"""Checkpoints: trained models, to list and to take home."""

import shutil
import tempfile
import zipfile
from email.utils import formatdate
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from api.dependencies import CallerOf, CheckpointOf, ServiceOf
from api.idempotency import Creation, CreationOf
from api.routes.artifacts import FILE, ConditionsOf
from api.schemas import After, Limit, ListOf, Order, as_list
from api.uploads import Upload, invalid_field, received, saved
from flowpp.presets import PUBLISHED
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
                    "additionalProperties": False,
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
async def upload(creation: CreationOf) -> Checkpoint:
    """Import the weights that the authors of Flow++ published, to score and sample with."""
    settings = creation.service.settings
    await run_in_threadpool(creation.service.check_bytes, creation.caller)
    async with (
        creation,
        received(creation.request, "file", settings.max_upload_bytes, 1, ("preset",)) as form,
        saved(form) as sent,
    ):
        checkpoint = await run_in_threadpool(_import, creation, sent)
    creation.response.headers["Location"] = f"/v1/checkpoints/{checkpoint.id}"
    return checkpoint


def _import(creation: Creation, sent: Upload) -> Checkpoint:
    if "preset" not in sent.fields:
        raise invalid_field("preset", "Field required")
    preset = sent.fields["preset"]
    if preset not in PUBLISHED:
        raise Invalid("unknown_preset", f"the authors published {', '.join(PUBLISHED)}, not {preset!r}", "preset")
    claim = creation.claim(dict(sent.fields), sent.files)
    if creation.existing:
        return creation.service.checkpoints.get(creation.existing)
    return creation.service.import_checkpoint(sent.files[0][1], preset, creation.caller, claim)


@router.get("")
def list_checkpoints(
    service: ServiceOf,
    caller: CallerOf,
    after: After = None,
    limit: Limit = 20,
    order: Order = "desc",
    job: Annotated[str | None, Query(max_length=64, description="Only those of this training job.")] = None,
) -> ListOf[Checkpoint]:
    """List checkpoints."""
    page = service.checkpoints.page(job=job, after=after, limit=limit, order=order, owner=caller.sees)
    return ListOf[Checkpoint](**as_list(page))


@router.get("/{checkpoint_id}")
def get_checkpoint(checkpoint: CheckpointOf) -> Checkpoint:
    """Get a checkpoint's step, images seen, metrics and model."""
    return checkpoint


@router.delete("/{checkpoint_id}", status_code=204)
def delete_checkpoint(checkpoint: CheckpointOf, service: ServiceOf) -> None:
    """Delete a checkpoint. Refused (409) while a job that has not finished uses it."""
    service.checkpoints.delete(checkpoint)


@router.get("/{checkpoint_id}/download", response_class=Response, responses=FILE)  # type: ignore[arg-type]
def download(request: Request, checkpoint: CheckpointOf, service: ServiceOf, conditions: ConditionsOf) -> Response:
    """A zip of the checkpoint's directory; unpacked, `flowpp.FlowPP.load` reads it. Parts are served."""
    headers = {"ETag": f'"{checkpoint.id}"', "Cache-Control": "private, no-cache"}
    if conditions.is_known(headers["ETag"]):
        return Response(status_code=304, headers=headers)
    headers["Last-Modified"] = formatdate(checkpoint.created_at, usegmt=True)  # not the zip's, which is made now
    directory = service.checkpoints.fetch(checkpoint)
    with tempfile.NamedTemporaryFile(prefix="flowpp-download-", suffix=".zip", delete=False) as file:
        path = Path(file.name)
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # weights do not compress
            for each in sorted(directory.iterdir()):
                entry = zipfile.ZipInfo(f"{checkpoint.id}/{each.name}")  # no date: the same bytes each time
                with each.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, 2**20)
        conditions.check(request, headers["ETag"], path.stat().st_size)
    except BaseException:
        path.unlink()
        raise
    return FileResponse(
        path,
        media_type="application/zip",
        filename=f"{checkpoint.id}.zip",
        headers=headers,
        background=BackgroundTask(path.unlink),
    )
