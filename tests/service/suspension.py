"""Suspended training processes: a test can act on a run in time, however fast the run trains."""

import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from flowpp.run_directory import RunDirectory
from tests.waiting import until
from worker.jobs import Job
from worker.service import Service


def caught(
    service: Service,
    submit: Callable[[], Job],
    reached: Callable[[Job], object],
    find: Callable[[], list[psutil.Process]],
) -> tuple[Job, list[psutil.Process]]:
    """Submits a job, waits until `reached` holds, and suspends the processes that `find` returns. Returns both.

    The job has steps left. If it was too quick, it ends, and another is submitted.
    """
    while True:
        job = submit()

        def now(job: Job = job) -> Job:
            return service.jobs.get(job.id)

        until(lambda job=job, now=now: reached(job) or now().finished, now)
        processes = find()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        rows = RunDirectory(service.run_directory(job.id) / "1").read_metrics()
        if processes and rows and rows[-1]["step"] < job.plan["training"]["steps"]:
            return job, processes
        resume(processes)
        until(lambda now=now: now().finished, now)


def resume(processes: Iterable[psutil.Process]) -> None:
    """Resumes the processes that still exist."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def resume_when_told_to_end(processes: list[psutil.Process]) -> None:
    """Resumes them as soon as SIGTERM is pending for one of them."""
    until(lambda: any(map(_told_to_end, processes)), "no process gets SIGTERM")
    resume(processes)


def _told_to_end(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (pending,) = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")]
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)
