"""Training processes that are held still: what a test does to a run comes in time, however fast it trains."""

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
    """A job of `submit` for which `reached` holds and that has steps to go, and its processes of `find`, suspended.

    A job that was too quick ends, and another is submitted.
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
    """Lets them go on, those that are still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def resume_when_told_to_end(processes: list[psutil.Process]) -> None:
    """Lets them go on as soon as SIGTERM waits for one of them."""
    until(lambda: any(map(_told_to_end, processes)), "no process gets SIGTERM")
    resume(processes)


def _told_to_end(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (pending,) = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")]
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)
