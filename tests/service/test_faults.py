"""Faults: whatever dies, a training job goes on from its last checkpoint, once, to the weights of a quiet run.

Each fault is real: processes are killed or stopped, files damaged, the store taken away. `make test-faults` runs all
and prints a table; two of them are a part of `make test`.
"""

import time
from collections.abc import Callable, Iterator

import pytest

from tests.service.house import FAULTS, STEPS, House
from tests.service.suspension import caught, resume
from worker.datasets import Dataset
from worker.jobs import Job


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"))
    try:
        yield house
    finally:
        house.stop()


@pytest.fixture(scope="module")
def dataset(house: House, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return house.make_dataset(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def quiet(house: House, dataset: Dataset) -> str:
    """The weights of an undisturbed run."""
    house.start_worker()
    job = house.finished(house.submit(dataset))
    assert job.status == "succeeded"
    return house.weights(job)


DEADLY = {"SIGKILL of the training process", "SIGKILL of the worker", "SIGKILL of both", "newest checkpoint damaged"}
"""Faults that end the training process. It stays suspended until then."""

QUICK = {"SIGKILL of both", "newest checkpoint damaged"}
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.faults, id=name) for name in FAULTS]


@pytest.mark.parametrize("name", CASES)
def test_a_job_ends_as_if_nothing_had_happened(
    house: House, dataset: Dataset, quiet: str, name: str, record_property: Callable[[str, object], None]
) -> None:
    house.keep_one_worker()

    def stored(job: Job) -> bool:
        return len(house.service.checkpoints.of_job(job.id)) >= 2 and house.step(job) > 20

    job, processes = caught(house.service, lambda: house.submit(dataset), stored, house.training_processes)
    reached, struck = house.step(job), time.time()
    if name not in DEADLY:
        resume(processes)
    try:
        recovered = FAULTS[name](house, job)
        job = house.finished(job)
    finally:
        house.clock.set_right()

    assert job.status == "succeeded", (job, house.logs())
    steps = [row["step"] for row in house.service.events.metrics(job.id)]
    assert steps == list(range(1, STEPS + 1)), "each step once in the history"
    assert house.weights(job) == quiet, "bit for bit the weights of an undisturbed run"
    for (_, end), (begin, _) in zip(house.spans(job), house.spans(job)[1:], strict=False):
        assert end <= begin, "two attempts at once"
    said = [event.data["message"] for event in house.events(job) if event.data.get("status") == "running"]
    assert len(said) == job.attempt, "each attempt is recorded"
    assert all("; the one before ended: " in reason for reason in said[1:]), "and why there is another"
    with house.service.store.open(job.artifacts, "metrics.jsonl") as file:
        assert len(file.read().splitlines()) == STEPS
    house.service.store.verify(job.artifacts)
    house.until(lambda: not house.training_processes(), "a process is left")

    if recovered is None:
        recovered = house.recovery(job, struck)
    duplicates, lost = len(steps) - len(set(steps)), STEPS - len(set(steps))
    record_property("fault", [name, recovered, house.retrained(job, reached), duplicates, lost, job.attempt])
    if name == "newest checkpoint damaged":
        assert any("is damaged, and passed over" in warning for warning in house.warnings(job))
