"""The job service without HTTP: what can be asked of it, over its records, its store and its queues."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import ValidationError

from flowpp.checkpoint import BadCheckpoint
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.memory import advice, estimate, micro_batch
from flowpp.presets import resolve_model, resolve_training
from flowpp.published import import_published
from flowpp.run_directory import describe
from worker import presence
from worker.artifacts import ArtifactStore, Manifest
from worker.connection import connect
from worker.datasets import Dataset, Datasets
from worker.events import Events
from worker.idempotency import Idempotency
from worker.jobs import QUEUE_OF, Job, Jobs, JobType, NewJob, new_job_id
from worker.keys import Caller, Keys
from worker.models import Checkpoint, Checkpoints
from worker.queue import Doorbells, celery
from worker.record_images import MOST_IN_RECORD_BYTES, in_record
from worker.refusals import Conflict, Invalid, NotFound, OverQuota
from worker.requests import JobRequest, LikelihoodRequest, SamplingRequest, TrainingRequest, as_written
from worker.settings import Settings
from worker.webhooks import Webhooks

log = logging.getLogger(__name__)

ANYBODY = Caller()
"""Who asks where authentication is off."""


class Service:
    """All of it for one `Settings`: `jobs`, `events`, `datasets`, `checkpoints`, `store`. A context manager."""

    def __init__(self, settings: Settings, redis_retries: int = 3) -> None:
        self.settings = settings
        self.redis = connect(settings.redis_url, redis_retries)
        self.store = ArtifactStore(settings.store_url)
        cache = settings.data_directory.absolute() / "cache"
        self.jobs = Jobs(self.redis, settings.lease_seconds, settings.max_attempts, settings.result_ttl_seconds)
        self.events = Events(self.redis, settings.redis_url)
        self.datasets = Datasets(self.redis, self.store, cache)
        self.checkpoints = Checkpoints(self.redis, self.store, cache)
        self.keys = Keys(self.redis, self.store)
        self.webhooks = Webhooks(self.redis, self.store)
        self.idempotency = Idempotency(self.redis)
        self.celery = celery(settings.redis_url)
        self.bells = Doorbells(self.celery)

    def close(self) -> None:
        self.celery.close()
        self.redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Raises `redis.RedisError` where Redis does not answer, `OSError` where the store cannot be written."""
        self.redis.ping()
        self.store.check()

    def submit_training(
        self, request: TrainingRequest, caller: Caller = ANYBODY, claim: str = "", cancel_after: int | None = None
    ) -> Job:
        """Queues a training job. Raises `NotFound`, `Invalid`, `Conflict`, `OverQuota` and `QueueFull`.

        As of the others, `caller` will be its owner and must own what it uses; `claim` is of an idempotency key; and
        it is cancelled `cancel_after` seconds from now, if it has not finished.
        """
        self.check_bytes(caller)
        dataset = self.datasets.get(request.dataset, caller.sees)
        if dataset.num_images == dataset.num_validation:
            raise Invalid("no_training_images", f"all images of dataset {dataset.id} are for validation", "dataset")
        plan = _plan_training(request, dataset)
        if plan["training"]["num_processes"] > self.settings.max_processes:
            most = self.settings.max_processes
            raise Invalid("too_many_processes", f"the workers offer {most} processes a job", "training.num_processes")
        training = TrainingConfig(**plan["training"])
        self._check_memory(ModelConfig(**plan["model"]), training)
        _check_batch(training, dataset)
        uses = [dataset.id]
        if request.resume_from is not None:
            checkpoint = self.checkpoints.resolve(request.resume_from, caller.sees)
            if fault := ModelConfig(**plan["model"]).unlike(checkpoint.model):
                message = f"checkpoint {checkpoint.id} cannot start this model: {fault}"
                raise Invalid("wrong_model", message, "resume_from")
            plan["resume_from"] = checkpoint.id
            uses.append(checkpoint.id)
        return self._submit(caller, claim, "training", request, plan, uses, cancel_after=cancel_after)

    def submit_likelihood(
        self,
        request: LikelihoodRequest,
        images: np.ndarray | None = None,
        names: Sequence[str] = (),
        caller: Caller = ANYBODY,
        claim: str = "",
        cancel_after: int | None = None,
    ) -> Job:
        """Queues a likelihood job, for the request's dataset or for `images`, uint8 [N, H, W, C], with their names.

        Raises `NotFound`, `Invalid`, `Conflict`, `OverQuota` and `QueueFull`.
        """
        if (request.dataset is None) == (images is None):
            raise Invalid("no_images", "give a dataset, or images, and not both", "dataset")
        if request.importance_samples > self.settings.max_importance_samples:
            most = self.settings.max_importance_samples
            raise Invalid(
                "too_many_importance_samples", f"at most {most:,} importance samples an image", "importance_samples"
            )
        checkpoint = self.checkpoints.resolve(request.model, caller.sees)
        plan: dict[str, Any] = {"checkpoint": checkpoint.id}
        uses = [checkpoint.id]
        if images is None:
            dataset = self.datasets.get(request.dataset or "", caller.sees)
            uses.append(dataset.id)
            shape, count = dataset.shape, dataset.num_validation or dataset.num_images
        else:
            _, height, width, channels = images.shape
            shape, count = (channels, height, width), len(images)
            if count > (most := self._most(caller.quota.max_images, self.settings.max_request_images)):
                raise Invalid("too_many_images", f"a request may send {most:,} images; these are {count:,}", "files")
        for option in ("bits_map", "latents"):
            if getattr(request, option) and count > self.settings.max_request_images:
                most = self.settings.max_request_images
                raise Invalid("too_many_images", f"{option} is for {most:,} images; these are {count:,}", option)
        _check_shape(shape, checkpoint)
        group = f"likelihood:{checkpoint.id}:{request.importance_samples}"
        size = count * request.importance_samples
        plan["num_images"] = count
        return self._submit(
            caller, claim, "likelihood", request, plan, uses, group, size, (images, names), cancel_after
        )

    def submit_sampling(
        self,
        request: SamplingRequest,
        images: np.ndarray | None = None,
        names: Sequence[str] = (),
        caller: Caller = ANYBODY,
        claim: str = "",
        cancel_after: int | None = None,
    ) -> Job:
        """Queues a sampling job; with two `images`, uint8 [2, H, W, C], an interpolation between them.

        Raises `NotFound`, `Invalid`, `Conflict`, `OverQuota` and `QueueFull`.
        """
        most = self._most(caller.quota.max_images, self.settings.max_samples)
        if request.num_samples > most:
            raise Invalid(
                "too_many_samples",
                f"a request may ask for {most:,} samples, not {request.num_samples:,}",
                "num_samples",
            )
        checkpoint = self.checkpoints.resolve(request.model, caller.sees)
        uses = [checkpoint.id]
        if request.between is not None or images is not None:
            uses += self._check_ends(request, images, checkpoint, caller)
        plan = {
            "checkpoint": checkpoint.id,
            "num_images": request.num_samples,
            "between_images_sent": images is not None,
        }
        group = f"sampling:{checkpoint.id}"
        size = request.num_samples
        return self._submit(caller, claim, "sampling", request, plan, uses, group, size, (images, names), cancel_after)

    def _check_ends(
        self, request: SamplingRequest, images: np.ndarray | None, checkpoint: Checkpoint, caller: Caller
    ) -> list[str]:
        """What an interpolation uses beside the checkpoint. Raises `NotFound` and `Invalid`."""
        if request.num_samples < 2:
            raise Invalid("too_few_samples", "an interpolation has at least its 2 ends", "num_samples")
        if request.temperature != 1:
            raise Invalid("invalid_temperature", "an interpolation has no temperature; leave it out", "temperature")
        if images is not None:
            if request.between is not None or len(images) != 2:
                raise Invalid("wrong_ends", "send two files, or name two images of a dataset", "files")
            _, height, width, channels = images.shape
            _check_shape((channels, height, width), checkpoint)
            return []
        assert request.between is not None
        dataset = self.datasets.get(request.between.dataset, caller.sees)
        if max(request.between.images) >= dataset.num_images:
            message = f"dataset {dataset.id} has the images 0 to {dataset.num_images - 1:,}"
            raise Invalid("no_such_image", message, "between.images")
        _check_shape(dataset.shape, checkpoint)
        return [dataset.id]

    def _check_memory(self, model: ModelConfig, training: TrainingConfig) -> None:
        """Raises `Invalid` where the training would not fit into what any present worker has."""
        offered = [memory.of_process(training.num_processes) for memory in presence.memories(self.redis, "training")]
        if not offered:
            return  # who comes may have more
        needed = estimate(model, training).at(micro_batch(training))
        if needed > max(offered):
            raise Invalid("out_of_memory", advice(model, training, max(offered)), "training.micro_batch_size")

    def check_bytes(self, caller: Caller) -> None:
        """Raises `OverQuota` where the caller's owner stores as much as it may."""
        most = self._most(caller.quota.max_bytes, self.settings.max_bytes_per_owner)
        counted: Any = self.redis.hget("flowpp:bytes", caller.owner)
        stored = int(counted or 0)
        if stored >= most:
            raise OverQuota(
                f"{caller.owner} stores {stored:,} bytes, and may store {most:,}: delete datasets or checkpoints first"
            )

    @staticmethod
    def _most(of_key: int | None, of_service: int) -> int:
        return of_service if of_key is None else of_key

    def import_checkpoint(self, file: Path, preset: str, caller: Caller = ANYBODY, claim: str = "") -> Checkpoint:
        """Registers the checkpoint made of the authors' .npz file. Raises `Invalid`, which lists what does not fit."""
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = Path(directory) / "checkpoint"
            try:
                import_published(file, preset, checkpoint)
            except BadCheckpoint as error:
                raise Invalid("bad_checkpoint", str(error), "file") from error
            return self.checkpoints.register(checkpoint, owner=caller.owner, claim=claim)

    def resume(self, job_id: str) -> Job:
        """As `Jobs.resume`, and wakes a worker."""
        job = self.jobs.resume(job_id)
        if job.status == "queued":
            self.bells.ring(job.queue, job.id)
        return job

    def delete_job(self, job_id: str) -> bool:
        """Removes a job, its checkpoints and all that is stored of it; false where it is cancelled first.

        Such a job is removed as soon as its worker has let go of it. Raises `NotFound` and `Conflict`.
        """
        checkpoints = self.checkpoints.of_job(job_id)
        if not self.jobs.delete(job_id):
            return False
        for checkpoint in checkpoints:
            self.checkpoints.free(checkpoint)
        self.store.delete(f"jobs/{job_id}")
        shutil.rmtree(self.run_directory(job_id), ignore_errors=True)  # there is one where it was paused
        return True

    def delete_ended(self) -> None:
        """Removes the jobs that were to be, and have ended since."""
        for job_id in self.jobs.deleting():
            try:
                if self.jobs.get(job_id).finished:
                    self.delete_job(job_id)
            except NotFound:
                log.info("job %s was deleted by another process", job_id)
            except Conflict as error:  # tried again, when the reaper looks again
                log.info("job %s is not deleted yet: %s", job_id, error)

    def delete_expired(self) -> None:
        """Removes the likelihood and sampling jobs that are older than their results are kept."""
        for job_id in self.jobs.expired():
            try:
                self.store.delete(f"jobs/{job_id}")  # first, so that it is tried again where the store is away
                self.delete_job(job_id)
            except NotFound:
                log.info("job %s was deleted by another process", job_id)
            except OSError as error:
                log.warning("job %s has expired and is not deleted yet: %s", job_id, error)

    def artifacts(self, job: Job) -> Manifest:
        """The files that a job has left. Raises `NotFound` where it has left none yet."""
        if not job.artifacts:
            raise NotFound("artifact_not_found", f"job {job.id} is {job.status} and has stored no artifacts")
        return self.store.manifest(job.artifacts)

    def run_directory(self, job_id: str) -> Path:
        """Where a training job's process works, on the machine that it is on."""
        return self.settings.data_directory.absolute() / "runs" / job_id

    def _submit(
        self,
        caller: Caller,
        claim: str,
        type: JobType,
        request: JobRequest,
        plan: dict[str, Any],
        uses: list[str],
        group: str = "",
        size: int = 1,
        images: tuple[np.ndarray | None, Sequence[str]] = (None, ()),
        cancel_after: int | None = None,
    ) -> Job:
        sent, names = images
        names = names or [f"{index:04d}" for index in range(0 if sent is None else len(sent))]
        if sent is not None and sent.nbytes <= MOST_IN_RECORD_BYTES:
            plan["images"] = in_record(sent, names)
        total = plan["training"]["steps"] if type == "training" else plan["num_images"]
        new = NewJob(
            *(new_job_id(), type, as_written(request), plan, request.metadata, uses, group, size, caller.owner),
            total_steps=total,
            cancel_after=cancel_after,
        )
        inputs = f"jobs/{new.id}/input"
        try:
            if sent is not None and "images" not in plan:
                self._store_images(inputs, sent, names)
            queue = QUEUE_OF[type]
            most = self.settings.max_queued_training if queue == "training" else self.settings.max_queued_inference
            max_jobs = self._most(caller.quota.max_jobs, self.settings.max_jobs_per_owner)
            job, unheard = self.jobs.submit(new, most, max_jobs, claim)
        except BaseException:
            self.store.delete(f"jobs/{new.id}")
            raise
        if unheard:
            self.bells.ring(job.queue, job.id)
        return job

    def _store_images(self, prefix: str, images: np.ndarray, names: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            np.savez(Path(directory) / "images.npz", images=images, names=np.array(names), allow_pickle=False)
            self.store.put(prefix, Path(directory))


def _plan_training(request: TrainingRequest, dataset: Dataset) -> dict[str, Any]:
    """The configurations in full. Raises `Invalid`."""
    overrides = request.model.model_dump(exclude_none=True)
    preset = overrides.pop("preset")
    recipe = request.training.model_dump(exclude_none=True)  # type: ignore[attr-defined]
    try:
        model = resolve_model(preset, overrides, dataset.shape)
    except ValidationError as error:
        raise Invalid("invalid_configuration", describe(error), "model") from error
    try:
        training = resolve_training(preset, recipe)
    except ValidationError as error:
        raise Invalid("invalid_configuration", describe(error), "training") from error
    return {"model": model.model_dump(mode="json"), "training": training.model_dump(mode="json")}


def _check_batch(training: TrainingConfig, dataset: Dataset) -> None:
    """Raises `Invalid` where a batch would hold images more than once."""
    most = dataset.num_images - dataset.num_validation
    if training.batch_size > most:
        message = f"a batch of {training.batch_size:,} images is more than the {most:,} training images of {dataset.id}"
        raise Invalid("batch_larger_than_dataset", f"{message}; choose {most:,} or less", "training.batch_size")


def _check_shape(shape: tuple[int, int, int], checkpoint: Checkpoint) -> None:
    if shape != checkpoint.model.image_shape:
        wanted, given = (
            f"{'grey' if channels == 1 else 'RGB'}, {width} wide and {height} high"
            for channels, height, width in (checkpoint.model.image_shape, shape)
        )
        raise Invalid("wrong_image_shape", f"model {checkpoint.id} takes images that are {wanted}; these are {given}")
