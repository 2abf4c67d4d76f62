"""The soak: 30 short jobs and a fault every few seconds for ten minutes; nothing may be lost."""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.service.house import House, kill_redis_and_start_it_on_its_data, kill_the_training_process
from worker.jobs import TERMINAL, Job

JOBS, STEPS, FAULT_SECONDS, WORKERS = 30, 400, 600, 2
PATIENCE_SECONDS = 900


def kill_a_worker(house: House, chance: random.Random) -> None:
    chance.choice(living(house)).kill()
    house.start_worker()


def terminate_a_worker(house: House, chance: random.Random) -> None:
    chance.choice(living(house)).terminate()
    house.start_worker()


def kill_training(house: House, chance: random.Random) -> None:
    kill_the_training_process(house, None)


def kill_redis(house: House, chance: random.Random) -> None:
    kill_redis_and_start_it_on_its_data(house, None)


def kill_the_api(house: House, chance: random.Random) -> None:
    assert house.api is not None
    house.api.kill()
    house.api.wait()
    house.start_api().close()


FAULTS: dict[str, tuple[int, Callable[[House, random.Random], None]]] = {
    "SIGKILL of the training processes": (2, kill_training),
    "SIGKILL of a worker": (1, kill_a_worker),
    "SIGTERM of a worker": (1, terminate_a_worker),
    "SIGKILL of Redis": (1, kill_redis),
    "SIGKILL of the API": (1, kill_the_api),
}
"""With how often each is chosen."""


@pytest.mark.soak
@pytest.mark.timeout(FAULT_SECONDS + PATIENCE_SECONDS + 120)
def test_every_accepted_job_ends_and_every_succeeded_one_is_whole(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = int(time.time())
    chance = random.Random(seed)
    (tmp_path / "images").mkdir()
    house = House(tmp_path, max_attempts=100)  # far more faults than a job would meet
    try:
        dataset = house.make_dataset(tmp_path / "images")
        house.start_api().close()
        for _ in range(WORKERS):
            house.start_worker()
        jobs, faults = [], Counter[str]()
        start = time.monotonic()
        while time.monotonic() < start + FAULT_SECONDS:
            while len(jobs) < JOBS * (time.monotonic() - start) / FAULT_SECONDS:  # some run at any time
                jobs.append(house.submit(dataset, STEPS))
            time.sleep(chance.uniform(2, 8))
            [name] = chance.choices(list(FAULTS), [often for often, _ in FAULTS.values()])
            FAULTS[name][1](house, chance)
            faults[name] += 1
        jobs += [house.submit(dataset, STEPS) for _ in range(JOBS - len(jobs))]
        ended = [waited_for(house, job) for job in jobs]
        print(f"\nsoak: seed {seed}, {faults.total()} faults, attempts {[job.attempt for job in ended]}")
        assert {job.status for job in ended} == {"succeeded"}
        told = duplicates = lost = overlaps = 0
        for job in ended:
            steps = [row["step"] for row in house.service.events.metrics(job.id)]
            told += sum(event.type == "metrics" for event in house.events(job)) - len(steps)
            duplicates += len(steps) - len(set(steps))
            lost += len(set(range(1, STEPS + 1)) - set(steps))
            spans = house.spans(job)
            overlaps += sum(begin < end for (_, end), (begin, _) in pairwise(spans))
            house.service.store.verify(job.artifacts)
            for checkpoint in house.service.checkpoints.of_job(job.id):
                house.service.store.verify(checkpoint.prefix)
        rows = [[name, str(faults[name])] for name in FAULTS]
        rows += [["jobs succeeded, with equal weights and artifacts that verify", str(len(ended))]]
        rows += [["attempts", str(sum(job.attempt for job in ended))]]
        rows += [["told steps retrained", str(told)], ["duplicates in the metrics", str(duplicates)]]
        rows += [["steps lost", str(lost)], ["attempts at once", str(overlaps)]]
        record_property("soak", rows)
        assert (duplicates, lost, overlaps) == (0, 0, 0)
        assert len({house.weights(job) for job in ended}) == 1, "the jobs are alike, and so are their weights"
        assert not house.training_processes()
    finally:
        house.stop()


def living(house: House) -> list[subprocess.Popen[bytes]]:
    return [worker for worker in house.workers if worker.poll() is None]


def waited_for(house: House, job: Job) -> Job:
    house.until(lambda: house.service.jobs.get(job.id).status in TERMINAL, f"{job.id} does not end", PATIENCE_SECONDS)
    return house.service.jobs.get(job.id)
