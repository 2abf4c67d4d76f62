"""The service at a moment: its workers, queues and jobs. Read in bounded time, however many jobs there have been."""

import json
import math
from typing import Any

from pydantic import BaseModel, Field
from redis import Redis

from worker import presence
from worker.connection import redis_time
from worker.job_lists import count
from worker.jobs import JobStatus, JobType, Progress
from worker.owners import LOCAL
from worker.queue import QUEUES
from worker.transitions import job_key

MOST_TRAININGS = 200
"""Training jobs that are told of one by one: those that have been held longest. Each keeps a worker busy."""

_FIELDS = ("type", "status", "owner", "progress", "latest", "validated", "checkpoint_at")


class QueueState(BaseModel):
    """What waits in a queue."""

    workers: int = Field(description="Workers of this queue that are there.")
    waiting: int = Field(description="Jobs that wait.")
    wait_seconds: float = Field(description="For so long the job whose turn is next has waited; 0 where none waits.")


class RunningTraining(BaseModel):
    """A training job that a worker holds, with the last that it has told."""

    id: str
    status: JobStatus
    owner: str
    progress: Progress | None
    train_bits_per_dim: float | None = None
    validation_bits_per_dim: float | None = Field(None, description="Of the last evaluation.")
    images_per_second: float | None = None
    checkpoint_at: float | None = Field(None, description="When its newest checkpoint was stored, in Unix seconds.")


class Overview(BaseModel):
    """The service at a moment, to everybody or to one owner."""

    at: float = Field(description="Unix seconds, by Redis's clock.")
    queues: dict[str, QueueState]
    jobs: dict[JobType, dict[JobStatus, int]] = Field(
        description="How many there are by type and status, finished ones included until they are deleted; with a key "
        "that is not an administrator's, its owner's."
    )
    training: list[RunningTraining] = Field(
        description=f"Of the up to {MOST_TRAININGS} training jobs that workers have held longest; likewise its owner's."
    )


def overview(redis: Redis, owner: str | None = None) -> Overview:
    """Of the service on a Redis server: its jobs are everybody's, or those of `owner`. Raises `redis.RedisError`."""
    client: Any = redis  # its annotations do not know of decode_responses
    now = redis_time(client)
    with client.pipeline(transaction=False) as pipeline:
        pipeline.zrange("flowpp:training", 0, MOST_TRAININGS - 1)
        for queue in QUEUES:
            pipeline.zcard(f"flowpp:queued:{queue}")
            pipeline.zrange(f"flowpp:queued:{queue}", 0, 0)
        held, *queued = pipeline.execute()
    heads = [ids[0] if ids else "" for ids in queued[1::2]]
    with client.pipeline(transaction=False) as pipeline:
        for job_id in heads:
            pipeline.hget(job_key(job_id), "changed")
        for job_id in held:
            pipeline.hmget(job_key(job_id), _FIELDS)
        found = pipeline.execute()
    queues = {}
    for queue, waiting, changed in zip(QUEUES, queued[::2], found, strict=False):
        waited = max(0.0, now - int(changed) / 1e6) if waiting and changed else 0.0
        workers = presence.count(redis, queue)
        queues[queue] = QueueState(workers=workers, waiting=waiting, wait_seconds=round(waited, 3))
    told = (dict(zip(_FIELDS, fields, strict=True)) for fields in found[len(heads) :])
    training = [_running(job_id, fields) for job_id, fields in zip(held, told, strict=True) if fields["status"]]
    mine = [job for job in training if owner in (None, job.owner)]
    return Overview(at=now, queues=queues, jobs=count(redis, owner), training=mine)


def _running(job_id: str, fields: dict[str, str | None]) -> RunningTraining:
    latest, validated = (json.loads(fields[name] or "{}") for name in ("latest", "validated"))
    return RunningTraining.model_validate(
        {
            "id": job_id,
            "status": fields["status"],
            "owner": fields["owner"] or LOCAL,
            "progress": json.loads(fields["progress"]) if fields["progress"] else None,
            "train_bits_per_dim": _finite(latest.get("train_bits_per_dim")),
            "validation_bits_per_dim": _finite(validated.get("validation_bits_per_dim")),
            "images_per_second": _finite(latest.get("images_per_second")),
            "checkpoint_at": fields["checkpoint_at"],
        }
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
