"""What goes over the wire, beside the records of worker."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from flowpp.config import ModelConfig, TrainingConfig
from worker.events import EventType
from worker.jobs import Job, JobError, JobStatus, JobType
from worker.keys import Scope
from worker.overview import Overview
from worker.paging import Page
from worker.webhooks import WebhookEvent

T = TypeVar("T", bound=BaseModel)

After = Annotated[str | None, Query(max_length=128, description="Continue behind the object with this id.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Objects at the most.")]
Order = Annotated[Literal["asc", "desc"], Query(description="By creation.")]


def _split(written: Any) -> Any:
    """Values of a query parameter, each of them a list with commas; each once."""
    if not isinstance(written, list):
        return written
    return list(dict.fromkeys(part for each in written for part in str(each).split(",")))


EventTypes = Annotated[
    tuple[EventType, ...],
    BeforeValidator(_split),
    Query(description="Only events of these types: repeated, or with commas between."),
]


class ListOf(BaseModel, Generic[T]):
    """A page of a list. The next one: `after` the last id, while `has_more`."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


def as_list(page: Page[Any]) -> dict[str, Any]:
    """A page of records with ids as a `ListOf`."""
    return {
        "data": page.data,
        "first_id": page.data[0].id if page.data else None,
        "last_id": page.data[-1].id if page.data else None,
        "has_more": page.has_more,
    }


class JobObject(Job):
    """A job. Follow it at /v1/jobs/{id}/events."""

    queue_position: int | None = Field(None, description="How many jobs wait before it; none where it does not wait.")


class Preset(BaseModel):
    """A named model with the recipe that trains it."""

    model_config = ConfigDict(protected_namespaces=())

    id: str = Field(examples=["small"])
    object: Literal["preset"] = "preset"
    description: str
    model: ModelConfig
    training: TrainingConfig


class Artifact(BaseModel):
    """A file that a job has left."""

    id: str = Field(description="Its name, too.", examples=["grid.png"])
    object: Literal["artifact"] = "artifact"
    name: str
    bytes: int
    sha256: str
    url: str = Field(description="Path to fetch it from.")


class Attempt(BaseModel):
    """One attempt at a job."""

    attempt: int
    worker: str | None = None
    started_at: float
    ended_at: float | None = None
    status: str = Field(
        description="What it made of the job, or what the job is: running, pausing, cancelling, succeeded, failed, "
        "cancelled, paused; or stopped, with its worker, and crashed, upon which the job was queued again."
    )
    code: str | None = Field(None, description="Why it ended so, where it failed.")
    message: str | None = Field(None, description="Why it ended, in words.")


class Metrics(BaseModel):
    """A training job's metrics, a column each, for plotting; a step without a value has null."""

    object: Literal["metrics"] = "metrics"
    columns: dict[str, list[float | None]] = Field(
        examples=[{"step": [5, 10], "train_bits_per_dim": [6.1, 5.2], "validation_bits_per_dim": [None, 5.4]}]
    )


class Health(BaseModel):
    """Whether the service can do its work."""

    status: Literal["ok", "unready"]
    missing: list[str] = Field([], description="What it waits for, in words.")


class Readiness(Health):
    """Health, part by part."""

    checks: dict[Literal["redis", "store", "training", "inference"], str] = Field(
        description="ok, or what is missing, in words; of workers also unknown, while Redis does not tell of them.",
        examples=[{"redis": "ok", "store": "ok", "training": "no training worker", "inference": "ok"}],
    )


class Status(Overview):
    """What the service has to do, and who is there to do it."""

    object: Literal["status"] = "status"
    owner: str = Field(description="The owner of the request's key.")
    scopes: tuple[Scope, ...] = Field(description="Permissions of the key. Without authentication, all of them.")


class JobEventData(BaseModel):
    """The job as it was when the event happened."""

    id: str
    object: Literal["job"]
    type: JobType
    status: JobStatus
    attempt: int
    metadata: dict[str, str]
    error: JobError | None
    result: dict[str, Any] | None = Field(description="Left out beyond 4 kB: get the job.")
    event_id: str = Field(description="Of the same event at /v1/jobs/{id}/events.")
    checkpoint: dict[str, Any] | None = Field(None, description="Of job.checkpoint: its id, step and metrics.")


class JobEvent(BaseModel):
    """What a webhook is sent."""

    type: WebhookEvent
    timestamp: datetime = Field(description="When it happened.")
    data: JobEventData
