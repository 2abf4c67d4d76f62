"""A house to harm: a Redis server, a service over it and training workers; and the faults that can befall it."""

import hashlib
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import psutil
import pytest

from flowpp.checkpoint import MODEL
from flowpp.data import build_image_set
from flowpp.run_directory import RunDirectory
from tests.waiting import LEASE_SECONDS, PATIENCE_SECONDS
from worker import child
from worker.datasets import Dataset
from worker.events import Event
from worker.jobs import Job
from worker.redis_server import HOST, RedisServer, free_port
from worker.requests import TrainingRequest
from worker.service import Service
from worker.settings import Settings
from worker.submission import submit_training

GRACE_SECONDS = 60
"""The time from SIGTERM to SIGKILL of a training process. It ends many times faster, on a busy core too."""

STEPS, CHECKPOINT_EVERY = 80, 10


class House:
    """A Redis server, a service over it, and training workers, all of which can be harmed."""

    def __init__(self, directory: Path, max_attempts: int = 4) -> None:
        self.clock = MovableClock(directory)
        with self.clock.over_children():
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
        self.api: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.environment = {
            **os.environ,
            **self.clock.environment,
            "FLOWPP_REDIS_URL": self.redis.url,
            "FLOWPP_DATA_DIRECTORY": str(self.settings.data_directory),
            "FLOWPP_LEASE_SECONDS": str(LEASE_SECONDS),
            "FLOWPP_GRACE_SECONDS": str(GRACE_SECONDS),
            "FLOWPP_AUTHENTICATION": "false",
            "OMP_NUM_THREADS": "1",
        }

    def start_worker(self, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        log = self.directory / f"worker-{len(self.workers)}.log"
        command = [*prefix, sys.executable, "-m", "worker", "training"]
        self.workers.append(child.start(command, log, self.environment))
        return self.workers[-1]

    def keep_one_worker(self) -> None:
        """The last one started, so that a fault of it is a fault of whoever has the job."""
        for worker in self.workers[:-1]:
            child.stop(worker, PATIENCE_SECONDS)

    def start_redis(self) -> None:
        with self.clock.over_children():
            self.redis.start()

    def start_api(self) -> httpx.Client:
        """Starts the API, and returns when it answers."""
        command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(self.port)]
        self.api = child.start(command, self.directory / "api.log", self.environment)
        http = httpx.Client(base_url=f"http://{HOST}:{self.port}", trust_env=False)

        def answers() -> bool:
            try:
                return http.get("/healthz").is_success
            except httpx.TransportError:
                return False

        self.until(answers, "the API does not answer")
        return http

    def training_processes(self) -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [
            process for process in found if f"{self.directory}/data/runs/" in " ".join(process.info["cmdline"] or [])
        ]

    def make_dataset(self, directory: Path) -> Dataset:
        noise = np.random.default_rng(0).integers(0, 32, (60, 8, 8, 3), np.uint8)
        np.save(directory / "images.npy", noise + np.linspace(0, 200, 8).astype(np.uint8)[:, None])
        return self.service.datasets.register(build_image_set(directory / "images.npy", directory / "set"))

    def submit(self, dataset: Dataset, steps: int = STEPS) -> Job:
        training = {"steps": steps, "checkpoint_every": CHECKPOINT_EVERY, "evaluation_every": 40, "keep_checkpoints": 3}
        request = {"dataset": dataset.id, "model": {"preset": "tiny", "dropout": 0.1}, "training": training}
        return submit_training(self.service, TrainingRequest.model_validate(request))

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> float:
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
        assert last.step == job.plan["training"]["steps"]
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

    def warnings(self, job: Job) -> list[str]:
        return [event.data["message"] for event in self.events(job) if event.type == "warning"]

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
        if self.api is not None:
            child.stop(self.api, PATIENCE_SECONDS)
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
            child.stop(worker, PATIENCE_SECONDS)
        self.service.close()
        self.redis.stop()


class MovableClock:
    """A clock of this machine for child processes, made of the true one and an offset, where there is a C compiler."""

    def __init__(self, directory: Path) -> None:
        self._offset = directory / "clock"
        self._offset.touch()
        self._write(0)
        self.environment: dict[str, str] = {}
        if compiler := shutil.which("cc"):
            library = directory / "moved_clock.so"
            source = Path(__file__).with_name("moved_clock.c")
            subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
            self.environment = {"LD_PRELOAD": str(library), "MOVED_CLOCK": str(self._offset)}

    def over_children(self) -> AbstractContextManager[Any]:
        """Within it, processes that inherit this one's environment have the clock."""
        return patch.dict(os.environ, self.environment)

    def put(self, seconds: int) -> None:
        """Makes it differ from the true one by so much."""
        if not self.environment:
            pytest.skip("without a C compiler there is no clock to move")
        self._write(seconds)

    def set_right(self) -> None:
        self._write(0)

    def _write(self, seconds: int) -> None:
        with self._offset.open("r+b") as file:  # the same file: it is mapped
            file.write(struct.pack("l", seconds))


Fault = Callable[[House, Any], float | None]
"""Does the harm; may say after how many seconds all was well again, where the job's events do not show it."""


def kill_the_training_process(house: House, job: object) -> None:
    for process in house.training_processes():
        process.kill()


def kill_the_worker(house: House, job: Job) -> None:
    house.workers[-1].kill()
    house.workers[-1].wait()
    house.until(lambda: not house.training_processes(), "the training process outlives its worker")
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
    house.until(lambda: house.service.jobs.get(job.id).attempt == 2, "nobody takes the job over")
    house.until(lambda: house.step(job) > 30, "the second attempt does not go on")
    stopped.send_signal(signal.SIGCONT)  # and finds that it has lost the job


def kill_redis_and_start_it_on_its_data(house: House, job: object) -> None:
    assert house.redis.process is not None
    house.redis.process.kill()
    house.redis.process.wait()
    time.sleep(1)
    house.start_redis()


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


def kill_the_api(house: House, job: Job) -> float:
    with closing(house.start_api()) as http:
        assert http.get(f"/v1/jobs/{job.id}").json()["status"] == "running"
    assert house.api is not None
    house.api.kill()
    house.api.wait()
    start = time.monotonic()
    with closing(house.start_api()) as http:
        steps = http.get(f"/v1/jobs/{job.id}/metrics").json()["columns"]["step"]
        assert steps == list(range(1, len(steps) + 1))
        return time.monotonic() - start


def fill_the_disk_of_the_runs(house: House, job: Job) -> float:
    """The job goes on with a worker whose run directories are on a small disk of their own, and that is filled."""
    child.stop(house.workers[-1], PATIENCE_SECONDS)
    runs = house.settings.data_directory / "runs"
    mount = f"mount -t tmpfs -o size=16m tmpfs {runs}"
    tool = shutil.which("unshare")
    if tool is None or subprocess.run([tool, "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk")
    worker = house.start_worker((tool, "-rm", "sh", "-c", f'{mount} && exec "$0" "$@"'))
    reached = house.step(job)
    house.until(lambda: house.step(job) > reached, "the job does not go on")
    ballast = Path(f"/proc/{worker.pid}/root{runs}/ballast")
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)) == 2**16:
            pass
    assert shutil.disk_usage(ballast).free == 0
    house.until(lambda: house.warnings(job), "nobody warns of it")
    before = len(house.service.checkpoints.of_job(job.id))
    time.sleep(1)
    assert len(house.service.checkpoints.of_job(job.id)) == before
    assert not house.service.jobs.get(job.id).finished
    ballast.unlink()
    return house.until(lambda: house.service.checkpoints.of_job(job.id)[-1].step > reached, "no checkpoint comes")


def put_the_clock_forward(house: House, job: Job) -> float:
    return move_the_clock(house, job, 3600)


def put_the_clock_back_and_kill_the_worker(house: House, job: Job) -> float:
    """Whose lease would then end in an hour."""
    move_the_clock(house, job, -3600)
    kill_the_worker(house, job)
    return house.until(lambda: house.service.jobs.get(job.id).attempt == 2, "nobody takes the job over")


def move_the_clock(house: House, job: Job, seconds: int) -> float:
    house.clock.put(seconds)
    reached = house.step(job)
    return house.until(lambda: house.step(job) > reached, "the job does not go on")


FAULTS: dict[str, Fault] = {
    "SIGKILL of the training process": kill_the_training_process,
    "SIGKILL of the worker": kill_the_worker,
    "SIGKILL of both": kill_worker_and_training_process,
    "SIGSTOP past the lease, SIGCONT": stop_the_worker_past_its_lease,
    "SIGKILL of Redis": kill_redis_and_start_it_on_its_data,
    "newest checkpoint damaged": damage_the_newest_checkpoint,
    "store away for 4 s": take_the_store_away_for_a_while,
    "SIGKILL of the API": kill_the_api,
    "disk full": fill_the_disk_of_the_runs,
    "clock an hour forward": put_the_clock_forward,
    "clock an hour back, SIGKILL of the worker": put_the_clock_back_and_kill_the_worker,
}
