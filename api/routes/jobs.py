"""Jobs of every kind: records, events, metrics, logs and attempts."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from api.dependencies import CallerOf, JobOf, ServiceOf
from api.schemas import After, Attempt, EventTypes, JobObject, Limit, ListOf, Metrics, Order, as_list
from worker.events import Event, EventType
from worker.jobs import TERMINAL, Job, JobStatus, JobType
from worker.paging import Page
from worker.refusals import Invalid
from worker.service import Service

router = APIRouter(prefix="/jobs", tags=["jobs"])

HEARTBEAT_SECONDS = 15
LOG = "log.txt"

_METADATA = "metadata["

FILTER = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "Only jobs with these metadata, as `metadata[key]=value`.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


@router.get("", openapi_extra=FILTER)
def list_jobs(
    request: Request,
    service: ServiceOf,
    caller: CallerOf,
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
    page = service.jobs.page(
        after=after, limit=limit, order=order, type=type, status=status, metadata=metadata, owner=caller.sees
    )
    return ListOf[JobObject](**as_list(Page([_shown(service, job) for job in page.data], page.has_more)))


@router.get("/{job_id}")
def get_job(job: JobOf, service: ServiceOf) -> JobObject:
    """Get a job."""
    return _shown(service, job)


@router.post("/{job_id}/cancel")
def cancel(job: JobOf, service: ServiceOf) -> JobObject:
    """Cancel a job: at once while it waits, else as soon as its worker has written a checkpoint, which is kept."""
    return _shown(service, service.jobs.cancel(job.id))


@router.post("/{job_id}/pause")
def pause(job: JobOf, service: ServiceOf) -> JobObject:
    """Pause a training job: it writes a checkpoint and frees its worker."""
    return _shown(service, service.jobs.pause(job.id))


@router.post("/{job_id}/resume")
def resume(job: JobOf, service: ServiceOf) -> JobObject:
    """Queue a paused job again; it goes on from its last checkpoint."""
    return _shown(service, service.resume(job.id))


DELETED = {
    202: {"model": JobObject, "description": "It is being cancelled, and deleted then."},
    204: {"description": "It is deleted.", "content": None},
}


@router.delete("/{job_id}", status_code=204, response_model=None, responses=DELETED)  # type: ignore[arg-type]
def delete(job: JobOf, service: ServiceOf) -> Response:
    """Delete a job with its events, artifacts and checkpoints.

    One that a worker holds is cancelled first (202), and is gone a few seconds after its worker has let go of it.
    """
    if service.delete_job(job.id):
        return Response(status_code=204)
    return JSONResponse(_shown(service, job).model_dump(mode="json") | {"status": "cancelling"}, 202)


SSE = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "A page, or a stream."},
    204: {"description": "The stream has no more events, and will have none: the job has finished.", "content": None},
}


@router.get("/{job_id}/events", response_model=ListOf[Event], responses=SSE)  # type: ignore[arg-type]
async def events(
    request: Request,
    job: JobOf,
    service: ServiceOf,
    after: After = None,
    limit: Limit = 100,
    order: Order = "asc",
    type: EventTypes = (),
    accept: Annotated[list[str] | None, Header(description="`text/event-stream` for a live stream.")] = None,
    last_event_id: Annotated[str | None, Header(description="The stream begins behind this event.")] = None,
) -> Any:
    """A job's events: a page of them, or live as server-sent events.

    Each message's `event` is the type, its `id` the event's, its `data` the event as JSON. The stream begins with the
    first event, or behind `Last-Event-ID`, and ends with the terminal status, or before it if `type` leaves that out.
    A browser's EventSource then connects again, and gets 204, which stops it.
    """
    behind = last_event_id or after
    if "text/event-stream" not in ",".join(accept or ()).lower():
        page = await run_in_threadpool(service.events.page, job.id, behind, limit, order=order, types=type)
        return ListOf[Event](**as_list(page))
    if order == "desc":
        raise Invalid("invalid_request", "a stream goes forward: ask for application/json, or for order=asc", "order")
    # raises `Invalid` and `NotFound` before the status is sent
    page = await run_in_threadpool(service.events.page, job.id, behind, 1, types=type)
    if job.finished and not page.data:
        return Response(status_code=204)
    stream = EventSourceResponse(_stream(service, job.id, behind, type), ping=HEARTBEAT_SECONDS, sep="\n")  # for grep
    if request.method == "HEAD":
        return StreamingResponse(iter(()), headers=stream.headers)  # a live stream would not end
    return stream


async def _stream(
    service: Service, job_id: str, behind: str | None, types: Sequence[EventType]
) -> AsyncIterator[ServerSentEvent]:
    async for event in service.events.follow(job_id, behind, types):
        yield ServerSentEvent(id=event.id, event=event.type, data=event.model_dump_json())


@router.get("/{job_id}/metrics")
def metrics(job: JobOf, service: ServiceOf) -> Metrics:
    """A training job's metrics so far, as columns."""
    rows = service.events.metrics(job.id)
    names = dict.fromkeys(name for row in rows for name in row)
    return Metrics(columns={name: [row.get(name) for row in rows] for name in names})


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
def logs(job: JobOf, service: ServiceOf) -> Response:
    """A training job's log lines so far, as text."""
    lines = [event.data["line"] for event in _all_events(service, job.id, "log")]
    return PlainTextResponse("".join(f"{line}\n" for line in lines))


@router.get("/{job_id}/attempts")
def attempts(job: JobOf, service: ServiceOf) -> ListOf[Attempt]:
    """The attempts at a job, oldest first: which worker had it, when, and how each ended."""
    found: dict[int, Attempt] = {}
    for event in _all_events(service, job.id, "status"):
        data, number = event.data, event.data.get("attempt", 0)
        if data["status"] == "running":
            found[number] = Attempt(
                attempt=number, worker=data.get("worker"), started_at=event.created_at, status="running"
            )
        elif number in found and found[number].ended_at is None:
            ended = event.created_at if data["status"] in {*TERMINAL, "queued", "paused"} else None
            change = {name: data[name] for name in ("status", "code", "message") if name in data}
            if data["status"] == "queued":
                change["status"] = "crashed" if "code" in data else "stopped"
            found[number] = found[number].model_copy(update=change | {"ended_at": ended})
    return ListOf[Attempt](data=list(found.values()))


def _shown(service: Service, job: Job) -> JobObject:
    return JobObject(**dict(job), queue_position=service.jobs.queue_position(job))


def _all_events(service: Service, job_id: str, type: EventType) -> list[Event]:
    found: list[Event] = []
    more = True
    while more:
        page = service.events.page(job_id, found[-1].id if found else None, 1000, types=(type,))
        found += page.data
        more = page.has_more
    return found
