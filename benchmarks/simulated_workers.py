"""Workers without models: they claim, tell and end jobs by the service's own functions, and compute nothing.

For benchmarks/scale.py, which starts them as processes and speaks to them over a pipe, a JSON object a message:

    python -m benchmarks.simulated_workers inference FD   one inference worker, whose batches take 20 ms
    python -m benchmarks.simulated_workers training FD    as many training workers as there are jobs

A training worker of the service holds one job. Here one process holds all, under one `Lease`, which renews and looks at
each of them as often as a worker of its own would.
"""

import json
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flowpp.checkpoint import MODEL, checkpoint_name, write_directory
from flowpp.config import ModelConfig
from worker.jobs import Job, Progress, Queue, StaleAttempt
from worker.lease import Lease
from worker.pace import Pace
from worker.presence import Presence
from worker.queue import listener
from worker.reaper import Reaper
from worker.record_images import from_record
from worker.recorder import LEAVE_SECONDS, Recorder
from worker.service import Service
from worker.settings import settings

FORWARD_SECONDS = 0.02
LINGER_SECONDS, LOOK_SECONDS, AWAKE_SECONDS = 1.0, 0.005, 2.0
"""As those of worker.inference."""

WEIGHTS = 4_096
"""Bytes of a simulated checkpoint's."""

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def imports_torch() -> bool:
    """Whether this process has: then it does not measure what it says."""
    return "torch" in sys.modules


def write_checkpoint(directory: Path, model: ModelConfig, step: int, metrics: dict[str, float]) -> Path:
    """A complete checkpoint of `WEIGHTS` bytes that are no weights."""
    path = directory / checkpoint_name(step)
    writers = {MODEL: lambda file: file.write_bytes(bytes(WEIGHTS))}
    write_directory(path, writers, model=model, step=step, images_seen=16 * step, metrics=metrics)
    return path


def metrics(step: int) -> dict[str, float]:
    """A row as training tells it."""
    return {
        "step": step,
        "images_seen": 16 * step,
        "learning_rate": 0.0003,
        "train_bits_per_dim": 4 + 1 / (step + 1),
        "gradient_norm": 1.2345678901234567,
        "images_per_second": 1234.5678901234567,
    }


class Inference:
    """Answers likelihood requests in batches, with figures of the same size as a model's."""

    def __init__(self, service: Service, name: str) -> None:
        self._service = service
        self._name = name
        self._batch_size = service.settings.batch_size

    def drain(self, job_id: str) -> None:
        """Answers all that waits, and what comes shortly after."""
        until = time.monotonic()
        with Lease(self._service.jobs, []) as lease:
            while True:
                if jobs := self._claim():
                    self._answer(jobs, lease)
                    until = time.monotonic() + LINGER_SECONDS
                elif time.monotonic() < until:
                    time.sleep(LOOK_SECONDS)
                elif self._service.jobs.sleep("inference", self._name):
                    return

    def _claim(self) -> list[Job]:
        size = self._batch_size
        return self._service.jobs.claim(
            "inference", self._name, size, large=size, larges=2, awake_seconds=AWAKE_SECONDS
        )

    def _answer(self, jobs: list[Job], lease: Lease) -> None:
        for job in jobs:
            lease.hold(job)
        results = [result(job) for job in jobs]
        time.sleep(FORWARD_SECONDS)
        for job in jobs:
            lease.let_go(job)
        done = Progress.at(1, 1)
        ended = self._service.jobs.succeed([(job, result, "", done) for job, result in zip(jobs, results, strict=True)])
        for job, status in zip(jobs, ended, strict=True):
            lease.ended(job, status)


def result(job: Job) -> dict[str, Any]:
    """The result of a likelihood job on images sent: all fields of a true one."""
    images, names = from_record(job.plan["images"])
    bits = 4 + images.mean() / 1024
    nats = -float(bits) * images[0].size * 0.6931471805599453
    rows = [
        {
            "name": name,
            "log_likelihood": nats,
            "bits_per_dim": float(bits),
            "importance_samples": 1,
            "effective_sample_size": 1.0,
            "log_likelihood_standard_error": None,
            "bits_per_dim_standard_error": None,
        }
        for name in names
    ]
    return {
        "bits_per_dim": float(bits),
        "standard_error": None,
        "sampling_standard_error": None,
        "split": {"prior": 2.027012345678901, "log_det": 1.997212345678901, "dequantizer": 0.0127, "importance": 0.0},
        "log_likelihood": nats,
        "num_images": len(names),
        "dimensions": images[0].size,
        "importance_samples": 1,
        "effective_sample_size": 1.0,
        "seed": 0,
        "checkpoint_sha256": "0" * 64,
        "dataset_sha256": "0" * 64,
        "checkpoint": job.plan["checkpoint"],
        "images": rows,
        "cold_start_seconds": 0.0,
    }


class Fleet:
    """Training workers, each with a job. While the gate is closed they take none."""

    def __init__(self, service: Service, name: str, lease: Lease, directory: Path) -> None:
        self._service = service
        self._name = name
        self._lease = lease
        self._directory = directory
        self._gate = threading.Event()
        self._held: dict[str, Job] = {}
        self._steps: dict[str, int] = {}
        self._paces: dict[str, Pace] = {}
        self._gate.set()

    def claim(self, job_id: str) -> None:
        """What a bell does: a worker takes the job whose turn it is."""
        self._gate.wait()
        for job in self._service.jobs.claim("training", self._name):
            self._lease.hold(job)
            self._paces[job.id] = Pace(job.plan["training"]["steps"])
            self._held[job.id] = job  # also one that an attempt before has lost

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the benchmark asks of it."""
        match asked["do"]:
            case "close":
                self._gate.clear()
            case "open":
                self._gate.set()
            case "tell":
                jobs = [self._held[job_id] for job_id in asked["jobs"]]
                return {
                    "events": self._side_by_side(lambda job: self._tell(job, asked["steps"]), jobs, asked["at_once"])
                }
            case "checkpoint":
                jobs = [job for job in self._held.values() if not self._service.checkpoints.of_job(job.id)]
                return {"events": self._side_by_side(self._checkpoint, jobs, asked["at_once"])}
            case "end":
                return {"events": self._side_by_side(self._end, list(self._held.values()), asked["at_once"])}
        return {"held": len(self._held), "lost": sum(job.attempt - 1 for job in self._held.values())}

    def _side_by_side(self, work: Callable[[Job], int], jobs: list[Job], at_once: int) -> int:
        def one(job: Job) -> int:
            try:
                return work(job)
            except StaleAttempt as error:  # its lease has run out, and a bell brings it back
                logging.warning("%s", error)
                return 0

        with ThreadPoolExecutor(at_once) as threads:
            return sum(threads.map(one, jobs))

    def _tell(self, job: Job, steps: int) -> int:
        """As the supervisor of a training process tells what it finds in metrics.jsonl: the events written."""
        first = self._steps.get(job.id, 0) + 1
        for step in range(first, first + steps):
            self._service.events.append(job, "metrics", metrics(step))
        self._steps[job.id] = first + steps - 1
        self._service.jobs.set_progress(job, self._paces[job.id].at(self._steps[job.id]))
        return steps

    def _checkpoint(self, job: Job) -> int:
        step, model = self._steps.get(job.id, 0), ModelConfig(**job.plan["model"])
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            path = write_checkpoint(Path(directory), model, step, {"train_bits_per_dim": 4.0})
            checkpoint = self._service.checkpoints.register(path, job)
        self._service.jobs.forgive(job)
        data = {"id": checkpoint.id, "step": step, "metrics": checkpoint.metrics}
        self._service.events.append(job, "checkpoint", data)
        return 1

    def _end(self, job: Job) -> int:
        self._lease.let_go(job)
        del self._held[job.id]
        status = self._service.jobs.end(job, "succeeded", result={"step": self._steps.get(job.id, 0)})
        self._lease.ended(job, status)
        return 1


def serve(pipe: Connection, answer: Answer) -> None:
    """Answers what is asked over the pipe, until it is closed."""
    while True:
        try:
            asked = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            said = answer(asked)
        except Exception as error:
            logging.exception("%s", asked)
            said = {"error": f"{type(error).__name__}: {error}"}
        pipe.send_bytes(json.dumps(said | {"torch": imports_torch()}).encode())


def run(queue: Queue, pipe: Connection) -> int:
    """Answers the bells of a queue, until SIGTERM; the exit status."""
    name = f"{queue}@simulated"
    leave = 0 if queue == "training" else LEAVE_SECONDS
    with (
        Service(settings(), 60) as service,
        Reaper(service),
        Recorder(service, leave),
        Lease(service.jobs, []) as lease,
        tempfile.TemporaryDirectory() as directory,
    ):
        if queue == "training":
            fleet = Fleet(service, name, lease, Path(directory))
            task, answer = fleet.claim, fleet.ask
        else:
            task, answer = Inference(service, name).drain, lambda asked: {}
        threading.Thread(target=serve, args=(pipe, answer), daemon=True).start()
        service.celery.task(task, name=queue)
        worker = listener(service.celery, queue, name)
        with Presence(service.redis, queue, name):
            worker.start()
        return int(worker.exitcode or 0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("celery").setLevel(logging.WARNING)
    wanted: Queue = "training" if sys.argv[1] == "training" else "inference"
    sys.exit(run(wanted, Connection(int(sys.argv[2]))))
