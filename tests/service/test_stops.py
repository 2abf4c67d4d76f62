"""Stops: whatever a training job is at, it ends within the grace period, keeps what it has, and leaves no process."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from flowpp.checkpoint import verify
from flowpp.data import build_image_set
from tests.service.house import GRACE_SECONDS, House
from tests.service.suspension import caught, resume_when_told_to_end
from tests.waiting import PATIENCE_SECONDS
from worker.datasets import Dataset
from worker.jobs import Job
from worker.requests import TrainingRequest
from worker.submission import submit_training

BATCH_SIZE = 2
SLOW = {"preset": "tiny", "filters": 64, "blocks": 12, "flow": ["columns x4", "squeeze", "channels x2", "columns x2"]}
"""A model that takes seconds to initialize and a minute to evaluate on a small machine."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"))
    try:
        house.start_worker()
        yield house
    finally:
        house.stop()


@pytest.fixture(scope="module")
def dataset(house: House, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """16 images to train on, 1024 to evaluate on."""
    directory = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (1040, 16, 16, 3), np.uint8)
    np.savez(directory / "images.npz", train=noise[:16], validation=noise[16:])
    return house.service.datasets.register(build_image_set(directory / "images.npz", directory / "set"))


def submit(house: House, dataset: Dataset, model: dict[str, object], **training: object) -> Job:
    every = dict.fromkeys(("checkpoint_every", "evaluation_every", "sample_every"), 1_000_000)
    recipe = {
        "steps": 1_000_000,
        "evaluation_images": 1024,
        "init_batch_size": 16,
        "batch_size": BATCH_SIZE,
        **every,
        **training,
    }
    request = {"dataset": dataset.id, "model": model, "training": recipe}
    return submit_training(house.service, TrainingRequest.model_validate(request))


def starting(mapped: str = "") -> Callable[[House, Job], None]:
    """The process has mapped a file with this name: torch's library, or the first images."""

    def reach(house: House, job: Job) -> None:
        house.until(lambda: any(has_mapped(process, mapped) for process in house.training_processes()), "none trains")

    return reach


def has_mapped(process: psutil.Process, name: str) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return name in Path(f"/proc/{process.pid}/maps").read_text()
    return False


def training(house: House, job: Job) -> None:
    house.until(lambda: house.step(job) >= 3, "no step is taken")


def evaluating(house: House, job: Job) -> None:
    """The second step is being evaluated. Its metrics are written after that."""
    house.until(lambda: house.step(job) == 1, "no step is taken")
    (row,) = house.service.events.metrics(job.id)
    time.sleep(2 * BATCH_SIZE / row["images_per_second"])  # what two steps take
    assert house.step(job) == 1


def checkpointing(house: House, job: Job) -> None:
    house.until(lambda: len(house.service.checkpoints.of_job(job.id)) >= 2, "no checkpoint is written")


TINY = {"preset": "tiny"}
PHASES: dict[str, tuple[dict[str, object], dict[str, object], Callable[[House, Job], None]]] = {
    "the interpreter starts": (TINY, {}, starting()),
    "torch is imported": (TINY, {}, starting("libtorch_cpu")),
    "initialization": ({**SLOW, "blocks": 24}, {}, starting("images.npy")),
    "training": (TINY, {}, training),
    "evaluation": (SLOW, {"evaluation_every": 2, "log_every": 1}, evaluating),
    "samples are drawn": (SLOW, {"sample_every": 1}, training),  # which takes longer than a step
    "checkpoints are written": (TINY, {"checkpoint_every": 1, "keep_checkpoints": 100}, checkpointing),
}


SLOWER = ("cancel", "shutdown")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "wish",
    ["pause", pytest.param("cancel", marks=pytest.mark.faults), pytest.param("shutdown", marks=pytest.mark.faults)],
)
def test_a_job_stops_within_the_grace_period_and_keeps_its_last_step(
    house: House, dataset: Dataset, phase: str, wish: str
) -> None:
    model, recipe, reach = PHASES[phase]
    job = submit(house, dataset, model, **recipe)
    try:
        reach(house, job)
        stop(house, job, phase, wish)
    finally:
        if not house.service.jobs.get(job.id).finished:
            house.service.jobs.cancel(job.id)
    house.finished(job)


def stop(house: House, job: Job, phase: str, wish: str) -> None:
    before = house.step(job)
    start = time.monotonic()
    if wish == "shutdown":
        house.workers[-1].terminate()
        assert house.workers[-1].wait(PATIENCE_SECONDS) == 0, house.logs()
    else:
        getattr(house.service.jobs, wish)(job.id)
    wanted = {"pause": "paused", "cancel": "cancelled", "shutdown": "queued"}[wish]
    house.until(lambda: house.service.jobs.get(job.id).status == wanted, f"it is not {wanted}")
    assert time.monotonic() - start < GRACE_SECONDS
    assert house.training_processes() == [], "no process is left"
    job = house.service.jobs.get(job.id)
    assert (job.attempt, job.failures, job.error) == (1, 0, None)
    checkpoints = house.service.checkpoints.of_job(job.id)
    if before:
        assert checkpoints[-1].step >= before + (phase == "evaluation"), "the step at hand is kept"
        assert verify(house.service.checkpoints.fetch(checkpoints[-1])).step == checkpoints[-1].step
    if phase == "evaluation":
        assert "validation_bits_per_dim" not in checkpoints[-1].metrics, "it was not waited for"
    if wish == "shutdown":
        house.start_worker()


def test_a_paused_job_resumes_after_its_files_are_gone_from_the_disk(house: House, dataset: Dataset) -> None:
    job, processes = caught(
        house.service,
        lambda: submit(house, dataset, TINY, steps=300),
        lambda job: house.step(job) >= 3,
        house.training_processes,
    )
    house.service.jobs.pause(job.id)
    resume_when_told_to_end(processes)
    house.until(lambda: house.service.jobs.get(job.id).status == "paused", "it is not paused")
    step = house.service.checkpoints.of_job(job.id)[-1].step
    for path in Path(house.service.run_directory(job.id)).glob("*/checkpoints/*/*"):
        path.unlink()
    house.service.resume(job.id)
    job = house.finished(job)
    assert job.status == "succeeded"
    assert f"goes on from step-{step:08d}" in house.log_lines(job)
    assert [row["step"] for row in house.service.events.metrics(job.id)] == list(range(1, 301))
