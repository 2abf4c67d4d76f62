"""Checkpoints: registered by the attempt that has the job, best by validation, kept while a job needs them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flowpp import FlowPP
from flowpp.checkpoint import BadCheckpoint, verify
from flowpp.presets import resolve_model
from flowpp.weights import write_checkpoint
from tests.worker.conftest import Submit
from worker.jobs import Job, StaleAttempt
from worker.refusals import Conflict, NotFound
from worker.service import Service

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def model() -> FlowPP:
    return FlowPP(resolve_model("tiny", {}, (3, 8, 8)))


@pytest.fixture
def job(service: Service, submit: Submit) -> Job:
    submit()
    return service.jobs.claim("training", "a worker")[0]


@pytest.fixture
def write(model: FlowPP, tmp_path: Path) -> Write:
    """Writes a checkpoint directory of a step, with or without validation bits/dim."""

    def write(step: int, validation: float | None = None) -> Path:
        metrics = {"train_bits_per_dim": 7.0} | ({} if validation is None else {"validation_bits_per_dim": validation})
        directory = tmp_path / f"step-{step}"
        tensors = {"model.safetensors": model.state_dict()}
        write_checkpoint(directory, tensors, model=model.config, step=step, images_seen=8 * step, metrics=metrics)
        return directory

    return write


def test_a_registered_checkpoint_can_be_fetched_and_loaded(service: Service, job: Job, write: Write) -> None:
    checkpoint = service.checkpoints.register(write(3, 6.5), job)
    assert service.checkpoints.get(checkpoint.id) == checkpoint
    assert (checkpoint.job, checkpoint.step, checkpoint.images_seen) == (job.id, 3, 24)
    assert verify(service.checkpoints.fetch(checkpoint)).metrics["validation_bits_per_dim"] == 6.5
    assert FlowPP.load(service.checkpoints.fetch(checkpoint)).config == checkpoint.model
    service.store.verify(checkpoint.prefix)


def test_an_incomplete_checkpoint_is_not_registered(service: Service, job: Job, write: Write) -> None:
    directory = write(3)
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint):
        service.checkpoints.register(directory, job)
    assert service.checkpoints.page().data == []


def test_a_stale_attempt_registers_nothing_and_leaves_nothing(service: Service, job: Job, write: Write) -> None:
    service.jobs.end(job, "stopped")
    [current] = service.jobs.claim("training", "another worker")
    with pytest.raises(StaleAttempt):
        service.checkpoints.register(write(3), job)
    assert service.checkpoints.page().data == []
    assert not list(Path(service.settings.store_url).rglob("*.safetensors"))
    service.checkpoints.register(write(4), current)


def test_a_job_means_its_best_checkpoint_or_its_newest(service: Service, job: Job, write: Write) -> None:
    with pytest.raises(Conflict) as caught:
        service.checkpoints.resolve(job.id)
    assert caught.value.code == "no_checkpoint"
    first = service.checkpoints.register(write(1), job)
    second = service.checkpoints.register(write(2), job)
    assert service.checkpoints.resolve(job.id) == second
    third = service.checkpoints.register(write(3, 6.0), job)
    service.checkpoints.register(write(4, 6.1), job)
    assert service.checkpoints.resolve(job.id) == third
    assert service.checkpoints.resolve(first.id) == first
    for nowhere in ("ckpt_nowhere", "job_nowhere"):
        with pytest.raises(NotFound):
            service.checkpoints.resolve(nowhere)


def test_checkpoints_are_listed_by_creation_and_by_job(
    service: Service, job: Job, write: Write, submit: Submit
) -> None:
    first, second = (service.checkpoints.register(write(step), job) for step in (1, 2))
    own = service.checkpoints.register(write(3))
    assert [found.id for found in service.checkpoints.page().data] == [own.id, second.id, first.id]
    assert [found.id for found in service.checkpoints.page(job=job.id, order="asc").data] == [first.id, second.id]
    assert own.job is None


def test_a_checkpoint_is_kept_while_a_job_needs_it(service: Service, job: Job, write: Write, submit: Submit) -> None:
    checkpoint = service.checkpoints.register(write(1), job)
    service.jobs.end(job, "succeeded")
    user = submit("sampling", uses=(checkpoint.id,))
    with pytest.raises(Conflict):
        service.checkpoints.delete(checkpoint)
    with pytest.raises(Conflict) as caught:
        service.delete_job(job.id)
    assert caught.value.code == "in_use"
    assert FlowPP.load(service.checkpoints.fetch(checkpoint))
    service.jobs.cancel(user.id)
    service.delete_job(job.id)
    with pytest.raises(NotFound):
        service.checkpoints.get(checkpoint.id)
    assert not list(Path(service.settings.store_url).rglob("*.safetensors"))


def test_a_result_names_no_checkpoint_that_was_deleted_and_says_all_else_as_before(
    service: Service, job: Job, write: Write
) -> None:
    best, last = service.checkpoints.register(write(3, 6.5), job), service.checkpoints.register(write(4, 7.5), job)
    named = {"best_checkpoint": best.id, "last_checkpoint": last.id}
    result = {**named, "validation_bits_per_dim": 6.123456789012345, "empty": []}
    service.jobs.end(job, "succeeded", result=result)
    before = int(service.redis.zscore("flowpp:changed", job.id))
    service.checkpoints.delete(best)
    assert service.jobs.get(job.id).result == result | {"best_checkpoint": None}
    assert int(service.redis.zscore("flowpp:changed", job.id)) > before, "or `flowpp reindex` would bring it back"
    service.checkpoints.delete(last)
    assert service.jobs.get(job.id).result == result | dict.fromkeys(named)


def test_a_checkpoint_that_is_deleted_while_its_job_ends_is_not_named(service: Service, job: Job, write: Write) -> None:
    gone, kept = service.checkpoints.register(write(3, 6.5), job), service.checkpoints.register(write(4, 7.5), job)
    service.checkpoints.delete(gone)
    service.jobs.end(job, "succeeded", result={"best_checkpoint": gone.id, "last_checkpoint": kept.id})
    assert service.jobs.get(job.id).result == {"best_checkpoint": None, "last_checkpoint": kept.id}
