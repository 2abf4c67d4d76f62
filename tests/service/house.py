"""A house to harm: a Redis server, a service over it and training workers; and the faults that can befall it."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from flowpp.checkpoint import MODEL
from flowpp.data import build_image_set
from flowpp.run_directory import RunDirectory
from worker import child
from worker.datasets import Dataset
from worker.events import Event
from worker.jobs import Job
from worker.redis_server import RedisServer
from worker.requests import TrainingRequest
from worker.service import Service
from worker.settings import Settings

LEASE_SECONDS = 3
BOUND_SECONDS = 60
STEPS, CHECKPOINT_EVERY = 80, 10


class House:
    """A Redis server, a service over it, and training workers, all of which can be harmed."""

    def __init__(self, directory: Path, max_attempts: int = 4) -> None:
        self.redis = RedisServer(directory / "redis").start()
        self.settings = Settings(
            redis_url=self.redis.url,
            data_directory=directory / "data",
            lease_seconds=LEASE_SECONDS,
            max_attempts=max_attempts,
        )
        self.service = Service(self.settings, redis_retries=60)
        self.directory = directory
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_worker(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "FLOWPP_REDIS_URL": self.redis.url,
            "FLOWPP_DATA_DIRECTORY": str(self.settings.data_directory),
            "FLOWPP_LEASE_SECONDS": str(LEASE_SECONDS),
            "OMP_NUM_THREADS": "1",
        }
        log = self.directory / f"worker-{len(self.workers)}.log"
        self.workers.append(child.start([sys.executable, "-m", "worker", "training"], log, environment))
        return self.workers[-1]

    def training_processes(self) -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [
            process for process in found if f"{self.directory}/data/runs/" in " ".join(process.info["cmdline"] or [])
        ]

    def make_dataset(self, directory: Path) -> Dataset:
        noise = np.random.default_rng(0).integers(0, 32, (60, 8, 8, 3), np.uint8)
        np.save(directory / "images.npy", noise + np.linspace(0, 200, 8).astype(np.uint8)[:, None])
        return self.service.datasets.register(build_image_set(directory / "images.npy", directory / "set"))

    def submit(self, dataset: Dataset) -> Job:
        training = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "evaluation_every": 40, "keep_checkpoints": 3}
        request = {"dataset": dataset.id, "model": {"preset": "tiny", "dropout": 0.1}, "training": training}
        return self.service.submit_training(TrainingRequest.model_validate(request))

    def until(self, condition: Callable[[], object], what: str, seconds: float = BOUND_SECONDS) -> float:
        """Seconds until it holds."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() < start + seconds, (what, self.logs())
            time.sleep(0.02)
        return time.monotonic() - start

    def logs(self) -> str:
        return "\n".join(child.tail(log, 12) for log in sorted(self.directory.glob("worker-*.log")))

    def step(self, job: Job) -> int:
        rows = self.service.events.metrics(job.id)
        return int(rows[-1]["step"]) if rows else 0

    def finished(self, job: Job) -> Job:
        self.until(lambda: self.service.jobs.get(job.id).finished, "the job does not end")
        return self.service.jobs.get(job.id)

    def weights(self, job: Job) -> str:
        """The hash of the last checkpoint's weights."""
        last = self.service.checkpoints.of_job(job.id)[-1]
        assert last.step == STEPS
        return hashlib.sha256((self.service.checkpoints.fetch(last) / MODEL).read_bytes()).hexdigest()

    def spans(self, job: Job) -> list[tuple[float, float]]:
        """When each attempt held the job, by its status events."""
        events = [event for event in self.service.events.page(job.id, limit=1000).data if event.type == "status"]
        begins = [event.created_at for event in events if event.data["status"] == "running"]
        ends = [
            event.created_at for event in events if event.data["status"] not in ("running", "cancelling", "pausing")
        ]
        return [(begin, min((end for end in ends if end >= begin), default=np.inf)) for begin in begins]

    def events(self, job: Job) -> list[Event]:
        return list(self.service.events.page(job.id, limit=10_000).data)

    def log_lines(self, job: Job) -> list[str]:
        return [event.data["line"] for event in self.events(job) if event.type == "log"]

    def recovery(self, job: Job, struck: float) -> float:
        """Seconds from `struck`, in Unix time, to the next attempt's first step; or to the next stored checkpoint."""
        events = self.events(job)
        begun = max(event.created_at for event in events if event.data.get("status") == "running")
        kind = "metrics" if begun > struck else "checkpoint"
        return (
            min(event.created_at for event in events if event.type == kind and event.created_at > max(begun, struck))
            - struck
        )

    def retrained(self, job: Job, reached: int) -> int:
        """Steps up to `reached` that the attempts after the first took again."""
        resumed = [
            int(found[1]) for line in self.log_lines(job) if (found := re.search(r"goes on from step-(\d+)", line))
        ]
        return sum(max(0, reached - step) for step in resumed)

    def stop(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
            child.stop(worker, 20)
        self.service.close()
        self.redis.stop()


Fault = Callable[[House, Any], None]


def kill_the_training_process(house: House, job: object) -> None:
    for process in house.training_processes():
        process.kill()


def kill_the_worker(house: House, job: Job) -> None:
    house.workers[-1].kill()
    house.workers[-1].wait()
    house.until(lambda: not house.training_processes(), "the training process outlives its worker", 10)
    house.start_worker()


def kill_worker_and_training_process(house: House, job: Job) -> None:
    house.workers[-1].kill()
    kill_the_training_process(house, job)
    house.workers[-1].wait()
    house.start_worker()


def stop_the_worker_past_its_lease(house: House, job: Job) -> None:
    stopped = house.workers[-1]
    stopped.send_signal(signal.SIGSTOP)
    house.start_worker()
    house.until(lambda: house.service.jobs.get(job.id).attempt == 2, "nobody takes the job over", 30)
    house.until(lambda: house.step(job) > 30, "the second attempt does not go on")
    stopped.send_signal(signal.SIGCONT)  # and finds that it has lost the job


def kill_redis_and_start_it_on_its_data(house: House, job: object) -> None:
    assert house.redis.process is not None
    house.redis.process.kill()
    house.redis.process.wait()
    time.sleep(1)
    house.redis.start()


def damage_the_newest_checkpoint(house: House, job: Job) -> None:
    """On the disk and in the store, where both are of the same step."""
    house.workers[-1].send_signal(signal.SIGSTOP)
    kill_the_training_process(house, job)
    newest = house.service.checkpoints.of_job(job.id)[-1]
    files = [house.service.checkpoints.fetch(newest) / MODEL]
    run = RunDirectory(house.service.run_directory(job.id) / "1")
    files += [path / MODEL for path in run.checkpoints() if path.name >= run.checkpoint(newest.step).name]
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    house.workers[-1].kill()
    house.workers[-1].wait()
    house.start_worker()


def take_the_store_away_for_a_while(house: House, job: Job) -> None:
    store = Path(house.settings.store_url) / "checkpoints"
    store.rename(store.with_name("away"))
    store.write_text("no folder")
    time.sleep(4)
    store.unlink()
    store.with_name("away").rename(store)


FAULTS: dict[str, Fault] = {
    "SIGKILL of the training process": kill_the_training_process,
    "SIGKILL of the worker": kill_the_worker,
    "SIGKILL of both": kill_worker_and_training_process,
    "SIGSTOP past the lease, SIGCONT": stop_the_worker_past_its_lease,
    "SIGKILL of Redis": kill_redis_and_start_it_on_its_data,
    "newest checkpoint damaged": damage_the_newest_checkpoint,
    "store away for 4 s": take_the_store_away_for_a_while,
}
