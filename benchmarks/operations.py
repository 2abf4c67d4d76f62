"""What the service takes on a machine, and what Redis's durability costs. `make bench-operations`.

Sizing: the processes of `flowpp serve`, at rest and after a little work of each kind. Durability: likelihood jobs
submitted, as the API does it, to a Redis server at each `appendfsync`. Writes its section of benchmarks/RESULTS.md.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from rich.progress import track

from api.client import Client
from api.stack import Stack
from benchmarks.results import table, write_section
from benchmarks.simulated_workers import metrics, write_checkpoint
from flowpp.data import encode_png
from flowpp.presets import resolve_model
from worker.jobs import Job
from worker.redis_server import RedisServer
from worker.requests import LikelihoodRequest
from worker.service import Service
from worker.settings import Settings
from worker.submission import prepare_likelihood, submit_one

MODES = ("always", "everysec", "no", "no append-only file")
SUBMITTERS = (1, 16)
MANY = 10**9
MiB = 2**20


def sizing(seconds: float) -> str:
    """A row a process: resident memory at rest and after work, CPU at rest."""
    with tempfile.TemporaryDirectory() as name, Stack(Path(name) / "data", port=0) as stack:
        pids = {name: process.pid for name, process in stack.children.items()}
        time.sleep(2)
        before = {name: _cpu_seconds(pid) for name, pid in pids.items()}
        time.sleep(seconds)
        busy = {name: 100 * (_cpu_seconds(pid) - before[name]) / seconds for name, pid in pids.items()}
        rest = {name: _resident(pid) for name, pid in pids.items()}
        trained = _work(stack, Path(name))
        after = {name: _resident(pid) for name, pid in pids.items()}
    rows = [[name, _mib(rest[name]), _mib(after[name]), f"{busy[name]:.1f}"] for name in sorted(pids)]
    rows.append(["the process that trained `small`", "", _mib(trained), ""])
    return table(["process", "MiB at rest", "MiB after work", "% of a core at rest"], rows)


def _work(stack: Stack, directory: Path) -> int:
    """A few steps, and the bits/dim of images; the most resident bytes of the process that trained."""
    images = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    np.save(directory / "images.npy", images)
    trained = 0
    with Client(stack.url) as client:
        dataset = client.datasets.upload(directory / "images.npy")
        job = client.training_jobs.create(dataset=dataset.id, model={"preset": "small"}, training={"steps": 4})
        while not (job := client.jobs.get(job.id)).finished:
            processes = psutil.Process(stack.children["training"].pid).children(recursive=True)
            trained = max([trained, *(_resident(process.pid) for process in processes)])
            time.sleep(0.1)
        if job.status != "succeeded":
            raise RuntimeError(f"the training job {job.status}: {job.error}")
        for image in images:
            client.likelihood_jobs.create(model=job.id, images=[("image.png", encode_png(image))], wait=60)
    return trained


def durability(jobs: int) -> str:
    """A row an `appendfsync`: submissions and events a second, their latency, and what a SIGKILL of Redis loses."""
    rows = []
    for mode in track(MODES, description="durability"):
        with served(mode) as (server, service):
            cells = [mode]
            for at_once in SUBMITTERS:
                submitted = _timed(partial(_submit, service), jobs, at_once)
                cells += [f"{submitted.per_second:,.0f}", f"{submitted.p50:.1f}", f"{submitted.p99:.1f}"]
            told = _timed(partial(_tell, service, _running(service)), jobs, 1)
            cells.append(f"{told.per_second:,.0f}")
            before = service.redis.zcard("flowpp:jobs")
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            server.start()
            cells.append(f"{before - service.redis.zcard('flowpp:jobs'):,} of {before:,}")
        rows.append(cells)
    each = [f"jobs/s, {at_once} at once | p50 ms | p99 ms" for at_once in SUBMITTERS]
    return table(["`appendfsync`", *" | ".join(each).split(" | "), "events/s", "jobs lost by SIGKILL"], rows)


@contextmanager
def served(mode: str) -> Iterator[tuple[RedisServer, Service]]:
    """A Redis server of one durability, and a service with a checkpoint over it."""
    with tempfile.TemporaryDirectory() as name, RedisServer(Path(name) / "redis") as server:
        settings = Settings(
            redis_url=server.url,
            data_directory=Path(name) / "data",
            max_queued_inference=MANY,
            max_jobs_per_owner=MANY,
        )
        with Service(settings, 60) as service:
            if mode == MODES[-1]:
                service.redis.config_set("appendonly", "no")
            else:
                service.redis.config_set("appendfsync", mode)
            model = resolve_model("small", {}, (3, 32, 32))
            service.checkpoints.register(write_checkpoint(Path(name), model, 1, {}))
            yield server, service


@dataclass(frozen=True)
class Timed:
    """Latencies in milliseconds."""

    per_second: float
    p50: float
    p99: float


def _timed(work: Callable[[], object], count: int, at_once: int) -> Timed:
    def one(_: int) -> float:
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    start = time.monotonic()
    with ThreadPoolExecutor(at_once) as threads:
        found = list(threads.map(one, range(count)))
    cuts = statistics.quantiles(found, n=100, method="inclusive")
    return Timed(count / (time.monotonic() - start), cuts[49], cuts[98])


def _submit(service: Service) -> None:
    """As the API does upon a request with one image."""
    (checkpoint,) = service.checkpoints.page(limit=1).data
    submit_one(
        service,
        prepare_likelihood(
            service, LikelihoodRequest(model=checkpoint.id), np.zeros((1, 32, 32, 3), np.uint8), ["image.png"]
        ),
    )


def _running(service: Service) -> Job:
    (job,) = service.jobs.claim("inference", "a worker")
    return job


def _tell(service: Service, job: Job) -> None:
    """As a training worker does at each step."""
    service.events.append(job, "metrics", metrics(1))


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _mib(count: int) -> str:
    return f"{count / MiB:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for which CPU at rest is measured")
    parser.add_argument("--jobs", type=int, default=2_000, help="submitted at each durability, and number of clients")
    parser.add_argument("--note", default="", help="a sentence for RESULTS.md, say on who else used the machine")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave RESULTS.md as it is")
    arguments = parser.parse_args()
    sizes = sizing(arguments.seconds)
    print(sizes)
    durable = durability(arguments.jobs)
    print(durable)
    if not arguments.dry_run:
        body = f"`flowpp serve`, after 4 training steps of `small` and 100 likelihood requests:\n\n{sizes}\n\n"
        body += f"{arguments.jobs:,} likelihood jobs of one 32x32 image, submitted as the API does:\n\n{durable}"
        write_section("Operations", "make bench-operations", f"{body}\n\n{arguments.note}", None)


if __name__ == "__main__":
    main()
