"""Jobs of every kind: records, events, metrics, logs and artifacts."""

import mimetypes
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from api.dependencies import ServiceOf
from api.schemas import After, Artifact, Attempt, JobObject, Limit, ListOf, Metrics, Order, as_list
from worker.artifacts import Manifest
from worker.events import Event
from worker.jobs import TERMINAL, Job, JobStatus, JobType
from worker.paging import Page
from worker.refusals import NotFound
from worker.service import Service

router = APIRouter(prefix="/jobs", tags=["jobs"])

HEARTBEAT_SECONDS = 15
LOG = "log.txt"

_METADATA = "metadata["


@router.get("")
def list_jobs(
    request: Request,
    service: ServiceOf,
    after: After = None,
    limit: Limit = 20,
    order: Order = "desc",
    type: Annotated[JobType | None, Query(description="Only jobs of this type.")] = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this state.")] = None,
) -> ListOf[JobObject]:
    """List jobs. `metadata[key]=value` filters by your own metadata."""
    metadata = {
        name.removeprefix(_METADATA).removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith(_METADATA) and name.endswith("]")
    }
    page = service.jobs.page(after=after, limit=limit, order=order, type=type, status=status, metadata=metadata)
    return ListOf[JobObject](**as_list(Page([_shown(service, job) for job in page.data], page.has_more)))


@router.get("/{job_id}")
def get_job(job_id: str, service: ServiceOf) -> JobObject:
    """Get a job."""
    return _shown(service, service.jobs.get(job_id))


@router.post("/{job_id}/cancel")
def cancel(job_id: str, service: ServiceOf) -> JobObject:
    """Cancel a job: at once while it waits, else as soon as its worker has written a checkpoint, which is kept."""
    return _shown(service, service.jobs.cancel(job_id))


@router.post("/{job_id}/pause")
def pause(job_id: str, service: ServiceOf) -> JobObject:
    """Pause a training job: it writes a checkpoint and frees its worker."""
    return _shown(service, service.jobs.pause(job_id))


@router.post("/{job_id}/resume")
def resume(job_id: str, service: ServiceOf) -> JobObject:
    """Queue a paused job again; it goes on from its last checkpoint."""
    return _shown(service, service.resume(job_id))


DELETED = {
    202: {"model": JobObject, "description": "It is being cancelled, and deleted then."},
    204: {"description": "It is deleted.", "content": None},
}


@router.delete("/{job_id}", status_code=204, response_model=None, responses=DELETED)  # type: ignore[arg-type]
def delete(job_id: str, service: ServiceOf) -> Response:
    """Delete a job with its events, artifacts and checkpoints.

    One that a worker holds is cancelled first (202), and is gone a few seconds after its worker has let go of it.
    """
    before = service.jobs.get(job_id)
    if service.delete_job(job_id):
        return Response(status_code=204)
    return JSONResponse(_shown(service, before).model_dump(mode="json") | {"status": "cancelling"}, 202)


SSE = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "A page, or a stream."}}


@router.get("/{job_id}/events", response_model=ListOf[Event], responses=SSE)  # type: ignore[arg-type]
async def events(
    job_id: str,
    service: ServiceOf,
    after: After = None,
    limit: Limit = 100,
    accept: Annotated[str | None, Header(description="`text/event-stream` for a live stream.")] = None,
    last_event_id: Annotated[str | None, Header(description="The stream begins behind this event.")] = None,
) -> Any:
    """A job's events: a page of them, or live as server-sent events.

    Each message's `event` is the type, its `id` the event's, its `data` the event as JSON. The stream begins with the
    first event, or behind `Last-Event-ID`, and ends with the terminal status.
    """
    behind = last_event_id or after
    page = await run_in_threadpool(service.events.page, job_id, behind, limit)
    if "text/event-stream" not in (accept or ""):
        return ListOf[Event](**as_list(page))
    return EventSourceResponse(_stream(service, job_id, behind), ping=HEARTBEAT_SECONDS)


async def _stream(service: Service, job_id: str, behind: str | None) -> AsyncIterator[ServerSentEvent]:
    async for event in service.events.follow(job_id, behind):
        yield ServerSentEvent(id=event.id, event=event.type, data=event.model_dump_json())


@router.get("/{job_id}/metrics")
def metrics(job_id: str, service: ServiceOf) -> Metrics:
    """A training job's metrics so far, as columns."""
    rows = service.events.metrics(job_id)
    names = dict.fromkeys(name for row in rows for name in row)
    return Metrics(columns={name: [row.get(name) for row in rows] for name in names})


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
def logs(job_id: str, service: ServiceOf) -> Response:
    """A training job's log lines so far, as text."""
    lines = [event.data["line"] for event in _all_events(service, job_id) if event.type == "log"]
    return PlainTextResponse("".join(f"{line}\n" for line in lines))


@router.get("/{job_id}/attempts")
def attempts(job_id: str, service: ServiceOf) -> ListOf[Attempt]:
    """The attempts at a job, oldest first: which worker had it, when, and how each ended."""
    found: dict[int, Attempt] = {}
    for event in _all_events(service, job_id):
        if event.type != "status":
            continue
        data, number = event.data, event.data.get("attempt", 0)
        if data["status"] == "running":
            found[number] = Attempt(
                attempt=number, worker=data.get("worker"), started_at=event.created_at, status="running"
            )
        elif number in found and found[number].ended_at is None:
            ended = event.created_at if data["status"] in {*TERMINAL, "queued", "paused"} else None
            change = {name: data[name] for name in ("status", "code", "message") if name in data}
            found[number] = found[number].model_copy(update=change | {"ended_at": ended})
    return ListOf[Attempt](data=list(found.values()))


@router.get("/{job_id}/artifacts")
def artifacts(job_id: str, service: ServiceOf) -> ListOf[Artifact]:
    """The files that a job has left; none before it has ended."""
    job = service.jobs.get(job_id)
    files = service.artifacts(job).files if job.artifacts else {}
    shown = [
        Artifact(id=name, name=name, bytes=file.bytes, sha256=file.sha256, url=f"/v1/jobs/{job.id}/artifacts/{name}")
        for name, file in sorted(files.items())
    ]
    return ListOf[Artifact](**as_list(Page(shown, False)))


@router.get("/{job_id}/artifacts/{name:path}", response_class=Response)
def artifact(
    job_id: str,
    name: str,
    service: ServiceOf,
    if_none_match: Annotated[str | None, Header(description="Answer 304 where the file is still this one.")] = None,
) -> Response:
    """Fetch one file. Its ETag is its sha256; ranges are served."""
    job = service.jobs.get(job_id)
    manifest: Manifest = service.artifacts(job)
    if name not in manifest.files:
        raise NotFound("artifact_not_found", f"job {job.id} has left no artifact {name[:256]!r}")
    etag = f'"{manifest.files[name].sha256}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if if_none_match is not None and etag in (tag.strip() for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    if name.endswith(".jsonl"):
        media_type = "application/jsonl"
    if service.store.directory is not None:
        return FileResponse(service.store.directory / job.artifacts / name, media_type=media_type, headers=headers)
    file = service.store.open(job.artifacts, name)
    headers["Content-Length"] = str(manifest.files[name].bytes)
    return StreamingResponse(iter(lambda: file.read(2**20), b""), media_type=media_type, headers=headers)


def _shown(service: Service, job: Job) -> JobObject:
    return JobObject(**dict(job), queue_position=service.jobs.queue_position(job))


def _all_events(service: Service, job_id: str) -> list[Event]:
    found: list[Event] = []
    more = True
    while more:
        page = service.events.page(job_id, found[-1].id if found else None, 1000)
        found += page.data
        more = page.has_more
    return found
