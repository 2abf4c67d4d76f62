"""Submitting jobs: what is asked for is checked and resolved in full, before its record is written and it waits.

All of it raises `NotFound`, `Invalid`, `Conflict`, `OverQuota` and `QueueFull`.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from flowpp.config import ModelConfig, TrainingConfig
from flowpp.images import shortened
from flowpp.plan import DoesNotFit, choose
from flowpp.presets import resolve_model, resolve_training
from flowpp.run_directory import describe
from worker import presence
from worker.datasets import Dataset
from worker.jobs import QUEUE_OF, Job, JobType, NewJob, Submission, new_job_id
from worker.keys import ANYBODY, Caller
from worker.models import Checkpoint
from worker.presence import Offer
from worker.record_images import MOST_IN_RECORD_BYTES, in_record
from worker.refusals import Invalid, Refusal
from worker.requests import JobRequest, LikelihoodRequest, SamplingRequest, TrainingRequest, as_written
from worker.service import Service


@dataclass(frozen=True)
class Terms:
    """On what terms a job is submitted.

    It is `caller`'s, who must own what it uses; `claim` is of an idempotency key; and it is cancelled `cancel_after`
    seconds from now, if it has not finished. Log lines of its attempts name `request_id`,
    and in traces they belong to the request's span, `traceparent`.
    """

    caller: Caller = ANYBODY
    claim: str = ""
    cancel_after: int | None = None
    request_id: str = ""
    traceparent: str = ""


PLAIN = Terms()


@dataclass(frozen=True)
class _Planned:
    """A job with all that was resolved of it. `images`, uint8 [N, H, W, C], and their names came with the request."""

    type: JobType
    request: JobRequest
    plan: dict[str, Any]
    uses: Sequence[str]
    total_steps: int
    group: str = ""
    size: int = 1
    images: np.ndarray | None = None
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """A job that was checked and resolved, and whose images are stored: to be submitted."""

    submission: Submission

    def forget(self, service: Service) -> None:
        """Deletes what was stored for it."""
        service.store.delete(f"jobs/{self.submission.new.id}")


def submit_training(service: Service, request: TrainingRequest, terms: Terms = PLAIN) -> Job:
    """Queues a training job."""
    service.check_bytes(terms.caller)
    dataset = service.datasets.get(request.dataset, terms.caller.sees)
    if not dataset.num_training:
        message = (
            f"all images of dataset {dataset.id} are held out, for validation or test, by the names they came with"
        )
        raise Invalid("no_training_images", message, "dataset")
    model, training = _configurations(request, dataset)
    fault = training.too_few(dataset.num_training)
    if fault and request.resume_from is None:  # a warm start has no initialization
        raise Invalid("too_few_training_images", f"dataset {dataset.id}: {fault}", "dataset")
    present = presence.offers(service.redis, "training")
    _check_processes(present, training)
    _check_memory(present, model, training)
    _check_batch(training, dataset)
    plan: dict[str, Any] = {"model": model.model_dump(mode="json"), "training": training.model_dump(mode="json")}
    uses = [dataset.id]
    if request.resume_from is not None:
        checkpoint = service.checkpoints.resolve(request.resume_from, terms.caller.sees)
        if fault := model.unlike(checkpoint.model):
            message = f"checkpoint {checkpoint.id} cannot start this model: {fault}"
            raise Invalid("wrong_model", message, "resume_from")
        plan["resume_from"] = checkpoint.id
        uses.append(checkpoint.id)
    return submit_one(service, _prepare(service, _Planned("training", request, plan, uses, training.steps), terms))


def prepare_likelihood(
    service: Service,
    request: LikelihoodRequest,
    images: np.ndarray | None = None,
    names: Sequence[str] = (),
    terms: Terms = PLAIN,
) -> Prepared:
    """A likelihood job, for the request's dataset or for `images`, uint8 [N, H, W, C], with their names."""
    if (request.dataset is None) == (images is None):
        raise Invalid("no_images", "give a dataset, or images, and not both", "dataset")
    settings = service.settings
    if request.importance_samples > (most := settings.max_importance_samples):
        raise Invalid(
            "too_many_importance_samples", f"at most {most:,} importance samples an image", "importance_samples"
        )
    checkpoint = service.checkpoints.resolve(request.model, terms.caller.sees)
    uses = [checkpoint.id]
    if images is None:
        dataset = service.datasets.get(request.dataset or "", terms.caller.sees)
        uses.append(dataset.id)
        shape, count = dataset.shape, dataset.num_validation or dataset.num_images
    else:
        shape, count = _shape(images), len(images)
        if count > (most := _most(terms.caller.quota.max_images, settings.max_request_images)):
            raise Invalid("too_many_images", f"a request may send {most:,} images; these are {count:,}", "files")
    for option in ("bits_map", "latents"):
        if getattr(request, option) and count > (most := settings.max_request_images):
            raise Invalid("too_many_images", f"{option} is for {most:,} images; these are {count:,}", option)
    _check_shape(shape, checkpoint, names)
    plan = {"checkpoint": checkpoint.id, "num_images": count}
    group, size = f"likelihood:{checkpoint.id}:{request.importance_samples}", count * request.importance_samples
    return _prepare(service, _Planned("likelihood", request, plan, uses, count, group, size, images, names), terms)


def prepare_sampling(
    service: Service,
    request: SamplingRequest,
    images: np.ndarray | None = None,
    names: Sequence[str] = (),
    terms: Terms = PLAIN,
) -> Prepared:
    """A sampling job; with two `images`, uint8 [2, H, W, C], an interpolation between them."""
    count = request.num_samples
    if count > (most := _most(terms.caller.quota.max_images, service.settings.max_samples)):
        raise Invalid("too_many_samples", f"a request may ask for {most:,} samples, not {count:,}", "num_samples")
    checkpoint = service.checkpoints.resolve(request.model, terms.caller.sees)
    uses = [checkpoint.id]
    if request.between is not None or images is not None:
        uses += _check_ends(service, request, images, names, checkpoint, terms.caller)
    plan = {"checkpoint": checkpoint.id, "num_images": count, "between_images_sent": images is not None}
    group = f"sampling:{checkpoint.id}"
    return _prepare(service, _Planned("sampling", request, plan, uses, count, group, count, images, names), terms)


def submit_all(service: Service, prepared: Sequence[Prepared]) -> list[Job | Exception]:
    """Queues jobs, in one round trip: each job, or else why it cannot be. What was stored for those is deleted."""
    submissions = [each.submission for each in prepared]
    try:
        found = service.jobs.submit_all(submissions)
    except BaseException:
        for each in prepared:
            each.forget(service)
        raise
    jobs: list[Job | Exception] = []
    for each, answer in zip(prepared, found, strict=True):
        if isinstance(answer, Refusal):
            each.forget(service)
            jobs.append(answer)
            continue
        job, unheard = answer
        jobs.append(job)
        if unheard:
            service.bells.ring(job.queue, job.id)
    return jobs


def submit_one(service: Service, prepared: Prepared) -> Job:
    """Queues a job. Raises why it cannot be."""
    (job,) = submit_all(service, [prepared])
    if isinstance(job, Exception):
        raise job
    return job


def _prepare(service: Service, planned: _Planned, terms: Terms) -> Prepared:
    plan, images = planned.plan, planned.images
    names = planned.names or [f"{index:04d}" for index in range(0 if images is None else len(images))]
    if images is not None and images.nbytes <= MOST_IN_RECORD_BYTES:
        plan["images"] = in_record(images, names)
    new = NewJob(
        id=new_job_id(),
        type=planned.type,
        request=as_written(planned.request),
        plan=plan,
        metadata=planned.request.metadata,
        uses=planned.uses,
        group=planned.group,
        size=planned.size,
        owner=terms.caller.owner,
        total_steps=planned.total_steps,
        cancel_after=terms.cancel_after,
        request_id=terms.request_id,
        traceparent=terms.traceparent,
    )
    settings = service.settings
    waiting = settings.max_queued_training if QUEUE_OF[new.type] == "training" else settings.max_queued_inference
    max_jobs = _most(terms.caller.quota.max_jobs, settings.max_jobs_per_owner)
    prepared = Prepared(Submission(new, waiting, max_jobs, terms.claim))
    if images is not None and "images" not in plan:
        try:
            _store_images(service, f"jobs/{new.id}/input", images, names)
        except BaseException:
            prepared.forget(service)
            raise
    return prepared


def _store_images(service: Service, prefix: str, images: np.ndarray, names: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        np.savez(Path(directory) / "images.npz", images=images, names=np.array(names), allow_pickle=False)
        service.store.put(prefix, Path(directory))


def _configurations(request: TrainingRequest, dataset: Dataset) -> tuple[ModelConfig, TrainingConfig]:
    """Those of the preset, with what the request changes of them, for the dataset's images."""
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
    return model, training


def _check_processes(present: Sequence[Offer], training: TrainingConfig) -> None:
    """Raises `Invalid` if each present worker offers fewer processes than the training has.

    Without workers nothing is known, as one that comes may offer more; nor is it of one that announces no number.
    """
    offered = [offer.processes for offer in present]
    if not offered or None in offered:
        return
    most = max(filter(None, offered))
    if training.num_processes > most:
        message = f"the training workers that are present offer a job up to {most} processes"
        raise Invalid("too_many_processes", message, "training.num_processes")


def _check_memory(present: Sequence[Offer], model: ModelConfig, training: TrainingConfig) -> None:
    """Raises `Invalid` if the training would not fit into what any present worker has."""
    refusals = []
    for offer in sorted(present, key=lambda offer: offer.bytes):
        try:
            choose(model, training, offer.of_process(training.num_processes), cuda=not offer.shared)
        except DoesNotFit as error:
            refusals.append(str(error))
    if refusals and len(refusals) == len(present):  # without any, who comes may have more
        raise Invalid("out_of_memory", refusals[-1], "training.micro_batch_size")


def _check_batch(training: TrainingConfig, dataset: Dataset) -> None:
    """Raises `Invalid` where a batch would hold images more than once."""
    most = dataset.num_training
    if training.batch_size > most:
        message = f"a batch of {training.batch_size:,} images is more than the {most:,} training images of {dataset.id}"
        raise Invalid("batch_larger_than_dataset", f"{message}; choose {most:,} or less", "training.batch_size")


def _check_ends(
    service: Service,
    request: SamplingRequest,
    images: np.ndarray | None,
    names: Sequence[str],
    checkpoint: Checkpoint,
    caller: Caller,
) -> list[str]:
    """What an interpolation uses beside the checkpoint."""
    if request.num_samples < 2:
        raise Invalid("too_few_samples", "an interpolation has at least its 2 ends", "num_samples")
    if request.temperature != 1:
        raise Invalid("invalid_temperature", "an interpolation has no temperature; leave it out", "temperature")
    if images is not None:
        if request.between is not None or len(images) != 2:
            raise Invalid("wrong_ends", "send two files, or name two images of a dataset", "files")
        _check_shape(_shape(images), checkpoint, names)
        return []
    assert request.between is not None
    dataset = service.datasets.get(request.between.dataset, caller.sees)
    if max(request.between.images) >= dataset.num_images:
        message = f"dataset {dataset.id} has the images 0 to {dataset.num_images - 1:,}"
        raise Invalid("no_such_image", message, "between.images")
    _check_shape(dataset.shape, checkpoint)
    return [dataset.id]


def _shape(images: np.ndarray) -> tuple[int, int, int]:
    """Channels, height, width of images [N, H, W, C]."""
    _, height, width, channels = images.shape
    return channels, height, width


def _check_shape(shape: tuple[int, int, int], checkpoint: Checkpoint, names: Sequence[str] = ()) -> None:
    """`names` are of the files that came with the request, all of this shape."""
    if shape != checkpoint.model.image_shape:
        wanted, given = (
            f"{'grey' if channels == 1 else 'RGB'}, {width} wide and {height} high"
            for channels, height, width in (checkpoint.model.image_shape, shape)
        )
        message = f"model {checkpoint.id} takes images that are {wanted}; these are {given}"
        if not names:
            raise Invalid("wrong_image_shape", message)
        others = f" and {len(names) - 1:,} more" if names[1:] else ""
        raise Invalid("wrong_image_shape", f"{shortened(names[0])}{others}: {message}", "files")


def _most(of_key: int | None, of_service: int) -> int:
    return of_service if of_key is None else of_key
