"""A worker: `python -m worker training` or `python -m worker inference`, until SIGTERM.

SIGTERM lets the job at hand write a checkpoint and puts it back into the queue; the exit status is then 0.
"""

import argparse
import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from celery.signals import setup_logging, worker_ready, worker_shutting_down

from flowpp import logs, tracing
from flowpp.environment import BrokenVariable
from flowpp.garbage_collection import settle
from worker.artifacts import UnusableStore
from worker.jobs import Queue
from worker.metrics import GpuMetrics, claimed, serving, together
from worker.presence import Presence, own_offer
from worker.queue import QUEUES, listener
from worker.reaper import Reaper
from worker.recorder import LEAVE_SECONDS, Recorder
from worker.service import Service
from worker.settings import settings

log = logging.getLogger("worker")

PATIENCE = 60
"""Retries of a Redis command, about a second each, before an attempt is given up."""


def run(queue: Queue) -> int:
    """Answers the bells of a queue; the exit status."""
    name = f"{queue}@{socket.gethostname()}-{os.getpid()}"
    shutdown = threading.Event()
    leave = 0 if queue == "training" else LEAVE_SECONDS
    # What goes round by itself needs no patience, and is not to hold up the end where Redis is away.
    with Service(settings(), PATIENCE) as service, Service(settings()) as house, Reaper(house), Recorder(house, leave):
        answer = _training(service, name, shutdown) if queue == "training" else _inference(service, name, shutdown)
        service.celery.task(answer, name=queue)

        def stop(**_: Any) -> None:
            log.info("%s stops", name)
            shutdown.set()

        def ready(**_: Any) -> None:
            log.info("%s waits for jobs", name)

        worker_shutting_down.connect(stop)
        worker_ready.connect(ready)
        worker = listener(service.celery, queue, name)
        offer = own_offer(house.settings.max_processes)
        with Presence(house.redis, queue, name, offer), serving(service.settings.metrics_port, together(GpuMetrics())):
            settle()
            worker.start()
        return int(worker.exitcode or 0)


def _training(service: Service, name: str, shutdown: threading.Event) -> Any:
    from worker.training import train

    def training(job_id: str) -> None:
        """Runs the training job that has waited longest."""
        if not shutdown.is_set():
            jobs = service.jobs.claim("training", name)
            claimed(jobs)
            for job in jobs:
                train(service, job, shutdown)

    return training


def _inference(service: Service, name: str, shutdown: threading.Event) -> Any:
    from worker.inference import Inference

    worker = Inference(service, name, shutdown)

    def inference(job_id: str) -> None:
        """Answers the inference jobs that wait."""
        worker.drain()

    return inference


def _quieten_celery() -> None:
    """Leaves what Celery and kombu warn of: what a worker does, its own lines say."""
    for name in ("celery", "kombu"):
        logging.getLogger(name).setLevel(logging.WARNING)
    setup_logging.connect(_leave_logging_as_it_is)
    # Celery writes its farewell there, as text
    sys.__stdout__ = Path(os.devnull).open("w")  # type: ignore[misc]  # noqa: SIM115


def _leave_logging_as_it_is(**_: Any) -> None:
    pass  # Celery asks nothing but whether somebody listens


def main() -> int:
    """Exit codes: 0 ended by SIGTERM, 1 failed, 2 bad arguments or settings."""
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__.partition("\n")[0])
    parser.add_argument("queue", choices=list(QUEUES))
    queue: Queue = parser.parse_args().queue
    if logs.as_json():
        logs.install()
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _quieten_celery()
    try:
        settings()
        with tracing.sending("flowpp-worker"):
            return run(queue)
    except (BrokenVariable, UnusableStore, tracing.TracingError) as error:
        print(f"worker: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
