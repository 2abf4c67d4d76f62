"""Checkpoints: trained models in the artifact store, each with a record in Redis."""

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from redis import Redis

from flowpp.checkpoint import QUANTILES, Quantiles, chosen, read_manifest
from flowpp.config import ModelConfig
from worker.artifacts import ArtifactStore, delete_directory, no_check
from worker.jobs import Job, StaleAttempt
from worker.owners import LOCAL, index_of
from worker.paging import Order, Page, read_page
from worker.refusals import Conflict, check_kind, not_found
from worker.transitions import Transitions, job_key

_MOST_KNOWN = 1_024

CHECKPOINT = "checkpoint"
"""The checkpoint's own directory within the stored one, since both have a manifest.json."""


class Checkpoint(BaseModel):
    """What is known of a checkpoint; its weights are in the store."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    owner: str = Field(LOCAL, description="Whose key sent it, or asked for its job.")
    created_at: float = Field(description="Unix seconds.")
    job: str | None = Field(None, description="The training job that wrote it.")
    step: int = Field(description="Optimizer steps taken.")
    images_seen: int
    metrics: dict[str, float] = Field(description="Of this step: train and, where evaluated, validation bits/dim.")
    validation_quantiles: Quantiles | None = Field(None, description=QUANTILES)
    model: ModelConfig
    dataset_sha256: str | None = Field(None, description="Of the images it was trained on.")
    warm_start_sha256: str | None = Field(None, description="Of the weights that its training began with.")
    bytes: int = Field(description="In the store.")

    @property
    def prefix(self) -> str:
        """Where it is in the store."""
        return f"checkpoints/{self.id}"


class Checkpoints:
    """The checkpoints of one Redis server and store. Copies of remote ones are kept below `cache`."""

    def __init__(self, redis: Redis, store: ArtifactStore, cache: Path) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._store = store
        self._cache = cache
        self._known: dict[str, Checkpoint] = {}
        self._scripts = Transitions(redis)

    def register(self, directory: Path, job: Job | None = None, owner: str = LOCAL, claim: str = "") -> Checkpoint:
        """Stores a checkpoint directory; one of a job only while its attempt is current (else `StaleAttempt`).

        It is the job's owner's, or else `owner`'s, and noted for an idempotency key. Raises
        `flowpp.checkpoint.BadCheckpoint` where it is not complete.
        """
        manifest = read_manifest(directory)
        checkpoint = Checkpoint(
            id=f"ckpt_{secrets.token_hex(12)}",
            created_at=time.time(),
            owner=job.owner if job else owner,
            job=job.id if job else None,
            step=manifest.step,
            images_seen=manifest.images_seen,
            metrics=manifest.metrics,
            validation_quantiles=manifest.validation_quantiles,
            model=manifest.model,
            dataset_sha256=manifest.dataset_sha256,
            warm_start_sha256=manifest.warm_start_sha256,
            bytes=sum(file.bytes for file in manifest.files.values()),
        )
        written = False
        try:
            self._store.put(checkpoint.prefix, directory, checkpoint.model_dump(mode="json"), below=CHECKPOINT)
            attempt = (job.id, job.attempt) if job else ("", 0)
            record = checkpoint.model_dump_json()
            written = self._scripts.register("checkpoint", checkpoint.id, record, *attempt, claim)
        finally:
            if not written:
                self._store.delete(checkpoint.prefix)
        if not written:
            assert job is not None
            raise StaleAttempt(f"attempt {job.attempt} of job {job.id} is not the current one")
        return checkpoint

    def get(self, checkpoint_id: str, owner: str | None = None) -> Checkpoint:
        """Raises `NotFound`, also for what is not of `owner`, if one is given."""
        found = self._load([checkpoint_id])
        if not found or owner not in (None, found[0].owner):
            raise not_found("checkpoint", checkpoint_id)
        return found[0]

    def page(
        self,
        *,
        job: str | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        owner: str | None = None,
    ) -> Page[Checkpoint]:
        """By creation, everybody's or those of `owner`, all or those of a job.

        Raises `NotFound` where there is no checkpoint `after`.
        """

        if job is not None:
            check_kind("job", job)
        of_job = set() if job is None else self._redis.smembers(f"{job_key(job)}:checkpoints")

        def choose(ids: list[str]) -> list[str]:
            return [checkpoint_id for checkpoint_id in ids if checkpoint_id in of_job]

        try:
            return read_page(
                self._redis,
                index_of("checkpoints", owner),
                self._load,
                choose=None if job is None else choose,
                after=after,
                limit=limit,
                order=order,
            )
        except KeyError as error:
            raise not_found("checkpoint", str(after)) from error

    def of_job(self, job_id: str) -> list[Checkpoint]:
        """A job's checkpoints, by step."""
        found = self._load(sorted(self._redis.smembers(f"{job_key(job_id)}:checkpoints")))
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.created_at))

    def resolve(self, model_id: str, owner: str | None = None) -> Checkpoint:
        """The checkpoint of this id, or a training job's best one. Raises `NotFound`, and `Conflict` where it has none.

        A checkpoint may have been deleted since: the submission of a job that uses it says so.
        What is not of `owner`, if one is given, is not found.
        The best has the lowest validation bits/dim; if none was validated, it is the newest that had not diverged.
        """
        if not model_id.startswith("job_"):
            return self._known_one(model_id, owner)
        owner_of_job, job_type = self._redis.hmget(job_key(model_id), "owner", "type")
        if owner_of_job is None or owner not in (None, owner_of_job):
            raise not_found("job", model_id)
        found = self.of_job(model_id)
        if not found and job_type != "training":
            raise Conflict("no_checkpoint", f"{model_id} is a {job_type} job; only training jobs have checkpoints")
        if not found:
            raise Conflict("no_checkpoint", f"job {model_id} has no checkpoint yet")
        return best(found) or found[-1]

    def _known_one(self, checkpoint_id: str, owner: str | None) -> Checkpoint:
        """As `get`, of a record that was read before, since records do not change: each request asks for one."""
        checkpoint = self._known.get(checkpoint_id)
        if checkpoint is None:
            found = self._load([checkpoint_id])
            if not found:
                raise not_found("checkpoint", checkpoint_id, "job")
            checkpoint = found[0]
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[checkpoint_id] = checkpoint
        if owner not in (None, checkpoint.owner):
            raise not_found("checkpoint", checkpoint_id)
        return checkpoint

    def fetch(self, checkpoint: Checkpoint, check: Callable[[], None] = no_check) -> Path:
        """The checkpoint's directory on this machine. Raises `NotFound` and `DamagedArtifact`.

        As `ArtifactStore.copy` it calls `check`.
        """
        return self._store.fetch(checkpoint.prefix, self._cache, check) / CHECKPOINT

    def copy(self, checkpoint: Checkpoint, directory: Path, check: Callable[[], None] = no_check) -> None:
        """Copies the checkpoint to the new `directory`. Raises `NotFound` and `DamagedArtifact`; calls `check`."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".step-", suffix=".tmp") as temporary:
            self._store.copy(checkpoint.prefix, Path(temporary), check)
            shutil.move(Path(temporary) / CHECKPOINT, directory)

    def delete(self, checkpoint: Checkpoint) -> None:
        """Raises `NotFound`, and `Conflict` while a job that has not finished uses it."""
        answer = self._scripts.unregister("checkpoint", checkpoint.id, checkpoint.job or "")
        if answer == "missing":
            raise not_found("checkpoint", checkpoint.id)
        if answer == "in_use":
            raise Conflict("in_use", f"checkpoint {checkpoint.id} is used by a job that has not finished")
        self.free(checkpoint)

    def free(self, checkpoint: Checkpoint) -> None:
        """Removes what is stored of a checkpoint that has no record any more, and this machine's copy."""
        self._store.delete(checkpoint.prefix)
        delete_directory(self._cache / checkpoint.prefix)

    def _load(self, ids: Sequence[str]) -> Any:
        records = self._redis.mget([f"flowpp:checkpoint:{checkpoint_id}" for checkpoint_id in ids]) if ids else []
        return [Checkpoint.model_validate_json(record) for record in records if record]


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The best of a job's checkpoints, by step, as `flowpp.checkpoint.chosen`; None if the metrics do not decide."""
    return chosen(checkpoints, [checkpoint.metrics for checkpoint in checkpoints])
