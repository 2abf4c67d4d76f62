"""The soak: 30 short jobs and a fault every few seconds for ten minutes; nothing may be lost."""

import random
import time
from pathlib import Path

import pytest

from tests.service.house import STEPS, House, kill_redis_and_start_it_on_its_data, kill_the_training_process
from worker.jobs import TERMINAL, Job

JOBS, FAULT_SECONDS, WORKERS = 30, 600, 2
PATIENCE_SECONDS = 900


def kill_a_worker(house: House, chance: random.Random) -> None:
    living = [worker for worker in house.workers if worker.poll() is None]
    chance.choice(living).kill()
    house.start_worker()


def terminate_a_worker(house: House, chance: random.Random) -> None:
    living = [worker for worker in house.workers if worker.poll() is None]
    chance.choice(living).terminate()
    house.start_worker()


def kill_training(house: House, chance: random.Random) -> None:
    kill_the_training_process(house, None)


def kill_redis(house: House, chance: random.Random) -> None:
    kill_redis_and_start_it_on_its_data(house, None)


@pytest.mark.soak
@pytest.mark.timeout(FAULT_SECONDS + PATIENCE_SECONDS + 120)
def test_every_accepted_job_ends_and_every_succeeded_one_is_whole(tmp_path: Path) -> None:
    seed = int(time.time())
    chance = random.Random(seed)
    (tmp_path / "images").mkdir()
    house = House(tmp_path, max_attempts=100)  # far more faults than a job would meet
    try:
        dataset = house.make_dataset(tmp_path / "images")
        for _ in range(WORKERS):
            house.start_worker()
        jobs, faults = [], 0
        start = time.monotonic()
        while time.monotonic() < start + FAULT_SECONDS:
            if len(jobs) < JOBS and chance.random() < 0.5:
                jobs.append(house.submit(dataset))
            time.sleep(chance.uniform(2, 8))
            chance.choice([kill_a_worker, terminate_a_worker, kill_training, kill_training, kill_redis])(house, chance)
            faults += 1
        jobs += [house.submit(dataset) for _ in range(JOBS - len(jobs))]
        ended = [waited_for(house, job) for job in jobs]
        print(f"\nsoak: seed {seed}, {faults} faults, {len(ended)} jobs, attempts {[job.attempt for job in ended]}")
        assert {job.status for job in ended} == {"succeeded"}
        for job in ended:
            assert [row["step"] for row in house.service.events.metrics(job.id)] == list(range(1, STEPS + 1))
            house.service.store.verify(job.artifacts)
            for checkpoint in house.service.checkpoints.of_job(job.id):
                house.service.store.verify(checkpoint.prefix)
        assert len({house.weights(job) for job in ended}) == 1, "the jobs are alike, and so are their weights"
        assert not house.training_processes()
    finally:
        house.stop()


def waited_for(house: House, job: Job) -> Job:
    house.until(lambda: house.service.jobs.get(job.id).status in TERMINAL, f"{job.id} does not end", PATIENCE_SECONDS)
    return house.service.jobs.get(job.id)
