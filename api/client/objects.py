"""What the service answers, as the client shows it. Times are Unix seconds."""

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T", bound=BaseModel)

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


class Answer(BaseModel):
    """Fields of newer services than this client are kept, as attributes."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Dataset(Answer):
    id: str
    object: str
    owner: str
    created_at: float
    name: str | None
    """The uploaded file's."""
    num_images: int
    """Training, validation and test images."""
    num_validation: int
    num_test: int = 0
    """Images that no training uses."""
    shape: tuple[int, int, int]
    """Channels, height, width."""
    bytes: int
    sha256: str
    """Of the pixels, whatever files they came from."""


class JobError(Answer):
    code: str
    message: str


class Progress(Answer):
    """Optimizer steps of a training, images of a likelihood or sampling job."""

    step: int
    total_steps: int
    percent_done: float
    estimated_finish_at: float | None = None


class Job(Answer):
    id: str
    object: str
    owner: str
    type: str
    """training, likelihood or sampling."""
    status: str
    """queued, running, pausing, paused, cancelling, succeeded, failed or cancelled."""
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    """Attempts begun so far."""
    max_attempts: int
    request: dict[str, Any]
    metadata: dict[str, str]
    progress: Progress | None
    result: dict[str, Any] | None
    error: JobError | None
    queue_position: int | None
    """How many jobs wait before it; none where it does not wait."""
    cancel_at: float | None = None
    expires_at: float | None = None

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL


class Event(Answer):
    """One entry of a job's stream; type is status, metrics, log, checkpoint or warning."""

    id: str
    type: str
    created_at: float
    data: dict[str, Any]

    @property
    def terminal(self) -> bool:
        return self.type == "status" and self.data.get("status") in TERMINAL


class Attempt(Answer):
    attempt: int
    worker: str | None
    started_at: float
    ended_at: float | None
    status: str
    """running, pausing, cancelling, succeeded, failed, cancelled, paused, stopped (with its worker) or crashed."""
    code: str | None
    message: str | None


class Metrics(Answer):
    """A column each, for plotting; a step without a value has none."""

    columns: dict[str, list[float | None]]


class Artifact(Answer):
    name: str
    bytes: int
    sha256: str
    url: str


class Checkpoint(Answer):
    id: str
    object: str
    owner: str
    created_at: float
    job: str | None
    """The training job that wrote it."""
    step: int
    """Optimizer steps taken."""
    images_seen: int
    metrics: dict[str, float]
    """Of this step: train and, where evaluated, validation bits/dim."""
    validation_quantiles: list[float] | None
    """Bits/dim of the validation images at 0, 1, ..., 100 %, where they were scored at this step."""
    model: dict[str, Any]
    dataset_sha256: str | None
    bytes: int


class Preset(Answer):
    id: str
    description: str
    model: dict[str, Any]
    training: dict[str, Any]


class Webhook(Answer):
    """Where the owner of jobs is told of their events."""

    id: str
    object: str
    owner: str
    created_at: float
    url: str
    events: tuple[str, ...]
    status: str
    """active or disabled; a ping that is delivered makes it active again."""
    disabled_reason: str | None
    dropped: int
    """Events that are not delivered, as too many deliveries waited."""


class CreatedWebhook(Webhook):
    secret: str = Field(repr=False)
    """Verifies what it receives. It is shown this once."""


class Delivery(Answer):
    """An event on its way to a webhook, or at the end of it."""

    id: str
    """The header `webhook-id`: the same at each attempt."""
    object: str
    type: str
    """An event's, or ping."""
    created_at: float
    status: str
    """pending, delivered, or dead: it is not tried again."""
    attempts: int
    last_attempt_at: float | None
    next_attempt_at: float | None
    status_code: int | None
    """Of the last answer."""
    error: str | None
    """Why the last attempt failed, in words."""


class Page(Answer, Generic[T]):
    """Of a list; the next one begins behind `last_id`."""

    data: list[T]
    last_id: str | None
    has_more: bool


class Readiness(Answer):
    status: str
    """ok or unready."""
    missing: list[str]
    """In words."""
    checks: dict[str, str]
    """Of redis, store, training and inference: ok, what is missing, or unknown."""


class QueueState(Answer):
    workers: int
    waiting: int
    wait_seconds: float
    """For so long the job whose turn is next has waited."""


class RunningTraining(Answer):
    """A training job that a worker holds, with the last that it has told."""

    id: str
    status: str
    owner: str
    progress: Progress | None
    train_bits_per_dim: float | None
    validation_bits_per_dim: float | None
    images_per_second: float | None
    checkpoint_at: float | None


class Status(Answer):
    at: float
    queues: dict[str, QueueState]
    jobs: dict[str, dict[str, int]]
    """How many there are, by type and status."""
    training: list[RunningTraining]
    owner: str | None = None
    """Owner of the key."""
    scopes: tuple[str, ...] | None = None
    """Permissions of the key: read, submit, admin. None if the service does not report them."""
