"""Jobs in Redis: a record for each, which is the truth, in a queue while it waits and under a lease while it runs.

    queued    waits in its queue
    running   a worker holds it, under a lease that it renews; an attempt of it computes
    pausing   the worker has been asked to write a checkpoint and to let go of it
    paused    rests; `resume` puts it back into the queue
    cancelling  the worker has been asked to write a checkpoint and to end it
    succeeded, failed, cancelled  terminal: never change again

Each transition is one Lua script of worker/lua.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from redis import Redis

from flowpp.tracing import trace_id
from worker.connection import redis_time
from worker.job_lists import lists
from worker.owners import LOCAL
from worker.paging import Order, Page, read_page
from worker.refusals import Conflict, OverQuota, QueueFull, Refusal, not_found
from worker.transitions import RESULT_TTL_SECONDS, Transitions, job_key
from worker.transitions import JobStatus as JobStatus
from worker.transitions import JobType as JobType

Queue = Literal["training", "inference"]
Outcome = Literal["succeeded", "failed", "stopped", "crashed"]

TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
QUEUE_OF: dict[JobType, Queue] = {"training": "training", "likelihood": "inference", "sampling": "inference"}


_EXPIRED = 200  # jobs deleted at a time


class StaleAttempt(Exception):
    """The attempt is not the job's any more: another one has the job, or nobody. It must not write."""


class JobError(BaseModel):
    """Why a job failed: a sentence and a stable code.

    worker_lost, out_of_memory, nan_loss, not_finite, diverged, bad_dataset, disk_full or internal.
    """

    model_config = ConfigDict(frozen=True)

    code: str
    message: str


class Progress(BaseModel):
    """How far a job is: optimizer steps of a training, images of a likelihood or sampling job."""

    model_config = ConfigDict(frozen=True)

    step: int
    total_steps: int
    percent_done: float = Field(ge=0, le=100)
    estimated_finish_at: float | None = Field(
        None, description="Unix seconds, by the pace of this attempt; none while the job does not run."
    )

    @classmethod
    def at(cls, step: int, total_steps: int) -> "Progress":
        return cls(step=step, total_steps=total_steps, percent_done=round(100 * min(1, step / total_steps), 2))


class Job(BaseModel):
    """A job as everybody may see it, but the fields after `error`, which are the service's own."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["job"] = "job"
    owner: str = Field(LOCAL, description="Whose key asked for it.")
    type: JobType
    status: JobStatus
    created_at: float = Field(description="Unix seconds, as the other times.")
    started_at: float | None = Field(None, description="When the first attempt began.")
    finished_at: float | None = None
    cancel_at: float | None = Field(None, description="When it is cancelled, if it has not finished: Cancel-After.")
    expires_at: float | None = Field(
        None, description="When it is deleted with its results: of likelihood and sampling jobs that have finished."
    )
    attempt: int = Field(0, description="Attempts begun so far.")
    max_attempts: int
    request: dict[str, Any]
    metadata: dict[str, str] = {}
    progress: Progress | None = None
    result: dict[str, Any] | None = None
    error: JobError | None = None

    plan: dict[str, Any] = Field({}, exclude=True, description="What was resolved when the job was submitted.")
    group: str = Field("", exclude=True, description="Jobs of the same group can run in one batch.")
    size: int = Field(1, exclude=True, description="How much of a batch it fills.")
    artifacts: str = Field("", exclude=True, description="Where in the store its artifacts are; empty: nowhere yet.")
    ended: str = Field("", exclude=True, description="Why the attempt before ended, in words.")
    request_id: str = Field("", exclude=True, description="Of the HTTP request that asked for it.")
    traceparent: str = Field("", exclude=True, description="Of that request's span; empty: it has none.")
    failures: int = Field(0, exclude=True, description="Failed attempts since one made progress.")

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL

    @property
    def queue(self) -> Queue:
        return QUEUE_OF[self.type]

    @property
    def subject(self) -> dict[str, str | int]:
        """What log lines of its attempt are about."""
        return {
            "request_id": self.request_id,
            "job_id": self.id,
            "attempt": self.attempt,
            "trace_id": trace_id(self.traceparent),
        }


@dataclass(frozen=True)
class NewJob:
    """What is known of a job before its record is written. `uses` are ids of datasets and checkpoints."""

    id: str
    type: JobType
    request: Mapping[str, Any]
    plan: Mapping[str, Any]
    metadata: Mapping[str, str]
    uses: Sequence[str]
    group: str = ""
    size: int = 1
    owner: str = LOCAL
    total_steps: int | None = None
    cancel_after: int | None = None
    """Seconds."""
    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True)
class Submission:
    """A job that is to be submitted, unless so many wait, or its owner has so many that have not finished.

    `claim` is of an idempotency key.
    """

    new: NewJob
    max_queued: int
    max_jobs: int = 1_000_000
    claim: str = ""


def new_job_id() -> str:
    return f"job_{secrets.token_hex(12)}"


class Jobs:
    """The jobs of one Redis server."""

    def __init__(
        self,
        redis: Redis,
        lease_seconds: float,
        max_attempts: int,
        result_ttl_seconds: int = RESULT_TTL_SECONDS,
    ) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._scripts = Transitions(redis, result_ttl_seconds)
        self.lease_seconds = lease_seconds
        self.max_attempts = max_attempts

    # Everybody

    def submit(self, new: NewJob, max_queued: int, max_jobs: int = 1_000_000, claim: str = "") -> tuple[Job, bool]:
        """As `submit_all`, of one. Raises what it gives."""
        (found,) = self.submit_all([Submission(new, max_queued, max_jobs, claim)])
        if isinstance(found, Refusal):
            raise found
        return found

    def submit_all(self, submissions: Sequence[Submission]) -> list[tuple[Job, bool] | Refusal]:
        """Writes the records and puts the jobs into their queues, and notes them for the idempotency keys of `claim`.

        Each job, and whether a bell is to be rung for it: not where each worker looks without one. Or else `QueueFull`,
        `OverQuota` where its owner has `max_jobs` unfinished ones, `NotFound` for what it uses.
        """
        records = [
            (each.new.id, each.max_queued, each.max_jobs, each.claim, self._fields(each.new)) for each in submissions
        ]
        found: list[tuple[Job, bool] | Refusal] = []
        for each, answer in zip(submissions, self._scripts.submit(records), strict=True):
            if isinstance(answer, str):
                found.append(_why_not(answer, each))
            else:
                heard, record = answer
                found.append((_parse(each.new.id, record), not heard))
        return found

    def _fields(self, new: NewJob) -> dict[str, str]:
        fields = {
            "owner": new.owner,
            "type": new.type,
            "max_attempts": str(self.max_attempts),
            "request": json.dumps(new.request),
            "plan": json.dumps(new.plan),
            "metadata": json.dumps(new.metadata),
            "uses": " ".join(new.uses),
            "queue": QUEUE_OF[new.type],
            "group": new.group,
            "size": str(new.size),
        }
        if new.request_id:
            fields["request_id"] = new.request_id
        if new.traceparent:
            fields["traceparent"] = new.traceparent
        if new.total_steps is not None:
            fields["progress"] = Progress.at(0, new.total_steps).model_dump_json()
        if new.cancel_after is not None:
            fields["cancel_after"] = str(new.cancel_after)
        return fields

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """Raises `NotFound`, also for what is not of `owner`, if one is given."""
        [job] = self.find([job_id])
        if job is None or owner not in (None, job.owner):
            raise not_found("job", job_id)
        return job

    def find(self, ids: Sequence[str]) -> list[Job | None]:
        """The jobs of these ids, in one round trip; none for what there is not."""
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hgetall(job_key(job_id))
        records = zip(ids, pipeline.execute(), strict=True)
        return [_parse(job_id, fields) if fields else None for job_id, fields in records]

    def page(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        type: JobType | None = None,
        status: JobStatus | None = None,
        metadata: Mapping[str, str] | None = None,
        owner: str | None = None,
    ) -> Page[Job]:
        """Jobs by creation, everybody's or those of `owner`, that match every filter.

        Raises `NotFound` where there is no job `after`.
        """
        if after is not None:
            self.get(after, owner)
        index = f"flowpp:jobs:owner:{owner}" if owner else "flowpp:jobs"
        parts = partial(lists, self._redis, owner, type, status) if type or status else None

        def choose(ids: list[str]) -> list[str]:
            return self._scripts.matching(ids, metadata or {})

        def load(ids: list[str]) -> list[Job]:
            return [job for job in self._load(ids) if status in (None, job.status)]  # it may have changed meanwhile

        try:
            return read_page(
                self._redis,
                index,
                load,
                parts=parts,
                choose=choose if metadata else None,
                after=after,
                limit=limit,
                order=order,
            )
        except KeyError as error:
            raise not_found("job", str(after)) from error

    def cancel(self, job_id: str) -> Job:
        """Queued and paused jobs are cancelled at once, running ones cancelling. Raises `NotFound`, `Conflict`."""
        return self._ask("cancel", job_id)

    def pause(self, job_id: str) -> Job:
        """For training jobs: queued ones are paused at once, running ones pausing. Raises `NotFound`, `Conflict`."""
        return self._ask("pause", job_id)

    def resume(self, job_id: str) -> Job:
        """Puts a paused job back into the queue; a training job that waits or runs already goes on doing so.

        Raises `NotFound`, `Conflict`.
        """
        return self._ask("resume", job_id)

    def delete(self, job_id: str) -> bool:
        """Removes record and events of a job that no worker holds; one that is held is cancelled first: false.

        Raises `NotFound`, `Conflict`.
        """
        return self._answer("delete", job_id) == "deleted"

    def deleting(self) -> list[str]:
        """The ids of jobs that are to be deleted as soon as they have ended."""
        return sorted(self._redis.smembers("flowpp:deleting"))

    def cancel_due(self) -> list[str]:
        """Cancels the jobs whose `cancel_at` has come; their ids."""
        return self._scripts.cancel_due()

    def expired(self) -> list[str]:
        """The ids of jobs whose `expires_at` has come, some hundred at a time."""
        now = redis_time(self._redis)
        return list(self._redis.zrange("flowpp:expiring", "-inf", now, byscore=True, offset=0, num=_EXPIRED))

    def queue_position(self, job: Job) -> int | None:
        """How many jobs are before it in the queue; none where it does not wait."""
        return self._redis.zrank(f"flowpp:queued:{job.queue}", job.id) if job.status == "queued" else None

    # Workers

    def claim(
        self,
        queue: Queue,
        worker: str,
        capacity: int = 1,
        *,
        large: int = 2**53,
        larges: int = 0,
        awake_seconds: float = 0,
    ) -> list[Job]:
        """Makes the job whose turn it is running, under a lease, with a new attempt.

        Jobs of the same group come with it as long as their sizes together fit into `capacity`. Of those larger than
        `large`, which do not count, at most `larges` are taken. For `awake_seconds` the worker promises to look again.
        """
        taken = self._scripts.claim(queue, worker, self.lease_seconds, capacity, large, larges, awake_seconds)
        return [_parse(job_id, fields) for job_id, fields in taken]

    def sleep(self, queue: Queue, worker: str) -> bool:
        """Whether a worker that promised to look again may wait for a bell instead: nothing waits."""
        return self._scripts.sleep(queue, worker)

    def wishes(self, jobs: Sequence[Job], renew: bool = False) -> list[JobStatus | None]:
        """What is wished of each job, none where its attempt is stale; the others' leases are renewed if so said."""
        held = [(job.id, job.attempt) for job in jobs]
        found: Any = self._scripts.renew(held, self.lease_seconds if renew else 0)
        return list(found)

    def set_progress(self, job: Job, progress: Progress) -> None:
        """Raises `StaleAttempt`."""
        _current(job, self._scripts.set_field(job.id, job.attempt, "progress", progress.model_dump_json()))

    def forgive(self, job: Job) -> None:
        """Counts failures anew, since the attempt made progress. Raises `StaleAttempt`."""
        _current(job, self._scripts.set_field(job.id, job.attempt, "failures", "0"))

    def set_artifacts(self, job: Job, prefix: str) -> None:
        """Says where in the store the job's artifacts are. Raises `StaleAttempt`."""
        _current(job, self._scripts.set_field(job.id, job.attempt, "artifacts", prefix))

    def end(
        self,
        job: Job,
        outcome: Outcome,
        *,
        result: Mapping[str, Any] | None = None,
        error: JobError | None = None,
        artifacts: str = "",
    ) -> JobStatus:
        """Ends the job's attempt, and says what the job now is. Raises `StaleAttempt`.

        A job that was to be cancelled is cancelled. Else, succeeded and failed are what they say; one that stopped is
        paused where that was wished and queued again where not; one that crashed is queued again, and failed after
        `max_attempts` crashes without progress between them.
        """
        (status,) = self._scripts.end([_ending(job, outcome, result=result, error=error, artifacts=artifacts)])
        return _current(job, status)

    def succeed(self, done: Sequence[tuple[Job, Mapping[str, Any], str, Progress]]) -> list[JobStatus | None]:
        """Ends jobs at once, each with its result, where its artifacts are, and its progress; none: it was stale."""
        endings = [
            _ending(job, "succeeded", result=result, artifacts=artifacts, progress=progress)
            for job, result, artifacts, progress in done
        ]
        statuses: Any = self._scripts.end(endings)
        return list(statuses)

    def reap(self, may_end: bool = True) -> list[str]:
        """Ends the attempts whose lease has run out as crashed (`worker_lost`); the ids of their jobs.

        Where `may_end` is false, none is ended: only leases that were given by a clock that was put back since are
        shortened to what a lease can be.
        """
        return self._scripts.reap(self.lease_seconds, may_end)

    def waiting(self, queue: Queue, first: int = 0, most: int = 1_000_000) -> list[str]:
        """The ids of up to `most` jobs that wait, in their order, from the place `first` on."""
        return list(self._redis.zrange(f"flowpp:queued:{queue}", first, first + most - 1))

    def _ask(self, transition: str, job_id: str) -> Job:
        self._answer(transition, job_id)
        return self.get(job_id)

    def _answer(self, transition: str, job_id: str) -> str:
        status = self._scripts.ask(transition, job_id)
        if status == "missing":
            raise not_found("job", job_id)
        if status.startswith("refused"):
            raise _refusal(transition, job_id, status.removeprefix("refused "))
        return status

    def _load(self, ids: Sequence[str]) -> list[Job]:
        return [job for job in self.find(ids) if job is not None]


def _why_not(answer: str, submission: Submission) -> Refusal:
    new = submission.new
    if answer == "full":
        waiting = f"{submission.max_queued} jobs wait in the {QUEUE_OF[new.type]} queue already"
        return QueueFull(f"{waiting}; try again later")
    if answer == "quota":
        most = submission.max_jobs
        return OverQuota(f"{new.owner} has {most} jobs that have not finished, and may not have more at a time")
    return not_found("dataset" if answer.startswith("ds_") else "checkpoint", answer)


_JSON = ("request", "plan", "metadata", "progress", "result", "error")


def _parse(job_id: str, fields: dict[str, str]) -> Job:
    values: dict[str, Any] = {**fields, "id": job_id}
    values |= {name: json.loads(fields[name]) for name in _JSON if fields.get(name)}
    if values["status"] != "running" and "progress" in values:  # an attempt that is to stop estimates on
        values["progress"].pop("estimated_finish_at", None)
    return Job.model_validate(values)


def _ending(
    job: Job,
    outcome: Outcome,
    *,
    result: Mapping[str, Any] | None = None,
    error: JobError | None = None,
    artifacts: str = "",
    progress: Progress | None = None,
) -> list[str | int]:
    return [
        job.id,
        job.attempt,
        outcome,
        error.code if error else "",
        error.message if error else "",
        "" if result is None else json.dumps(result),
        artifacts,
        progress.model_dump_json() if progress else "",
    ]


def _current(job: Job, status: str | None) -> Any:
    if not status:
        raise StaleAttempt(f"attempt {job.attempt} of job {job.id} is not the current one")
    return status


def _refusal(transition: str, job_id: str, status: str) -> Conflict:
    if status == "in_use":
        return Conflict("in_use", f"a checkpoint of job {job_id} is used by a job that has not finished")
    if status in TERMINAL:
        return Conflict("job_finished", f"job {job_id} is {status} and cannot change any more")
    if transition == "resume":
        return Conflict("job_not_paused", f"job {job_id} is {status}; only a paused job can be resumed")
    return Conflict("not_pausable", f"job {job_id} is {status} and cannot be paused; training jobs can, while they run")
