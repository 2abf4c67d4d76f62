"""Bits/dim of one 32x32 image over HTTP, by clients at once: the service beside a plain endpoint. `make bench-service`.

The plain endpoint is what one would write first: FastAPI, the same model in the same process, one request at a time,
each decoded and answered as the service does, without records, queue or batches. A second one replays its passes, as
our workers do. All serve the same untrained `small` model with all cores, in turns, to the same clients of a process of
their own. Writes its section of benchmarks/RESULTS.md.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch
import uvloop
from rich.progress import track

from api.stack import REDIS_URL, Stack
from benchmarks.connection import Connection, connection, written
from benchmarks.images import real_images
from benchmarks.results import table, write_section
from flowpp import FlowPP
from flowpp.data import encode_png, read_images
from flowpp.likelihood import Likelihood, estimate
from flowpp.seeds import seed_of
from worker import child
from worker.redis_server import free_port
from worker.service import Service
from worker.settings import Settings

CLIENTS = (1, 8, 32, 128)
ROUNDS = 3
"""In which the sides are measured in turns, since the machine is not equally fast at all times."""
WARM_SECONDS = 3
BATCH = 16
"""Images; more are no faster an image."""
MODEL = "FLOWPP_BENCHMARK_MODEL"
REPLAY = "FLOWPP_BENCHMARK_REPLAY"
PLAIN, REPLAYED, OURS = "plain", "plain, model.replay()", "flowpp"


def plain_app():  # type: ignore[no-untyped-def]  # for uvicorn
    """The plain endpoint."""
    from fastapi import FastAPI, UploadFile

    app, turn = FastAPI(), threading.Lock()
    model = FlowPP.load(Path(os.environ[MODEL])).eval().requires_grad_(False)
    if REPLAY in os.environ:
        model.replay()

    @app.post("/score")
    def score(file: UploadFile) -> dict[str, float]:
        images = read_images([(file.filename or "image", file.file.read())])
        with turn:
            found = estimate(model, images, [seed_of(0, 0)])
        return {"bits_per_dim": Likelihood(found, model.config.dimensions, 1, 0).mean}

    @app.post("/decode")
    def decode(file: UploadFile) -> dict[str, float]:
        return {"bits_per_dim": float(read_images([(file.filename or "image", file.file.read())]).mean())}

    return app


@dataclass(frozen=True)
class Measured:
    """Of one side at one number of clients: the latencies, in milliseconds, of what was answered in so many seconds."""

    latencies: list[float]
    seconds: float

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, percent: int) -> float:
        """Milliseconds."""
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


def whole(rounds: Sequence[Measured]) -> Measured:
    """All rounds as one."""
    return Measured([each for one in rounds for each in one.latencies], sum(one.seconds for one in rounds))


@dataclass(frozen=True)
class Side:
    """One of the two, and how it is asked for the bits/dim of a PNG."""

    name: str
    url: str
    field: str
    data: dict[str, str]

    def question(self, png: bytes) -> bytes:
        files, headers = {self.field: ("image.png", png, "image/png")}, {"Prefer": "wait=60"}
        return written(httpx.Request("POST", self.url, data=self.data, files=files, headers=headers))

    async def ask(self, http: Connection, question: bytes) -> float:
        status, body = await http.ask(question)
        if status != 200:
            raise RuntimeError(f"{self.name} answered {status}: {body[:500].decode(errors='replace')}")
        said = json.loads(body)
        return float(said.get("bits_per_dim") or said["result"]["bits_per_dim"])


async def load(side: Side, pngs: list[bytes], clients: int, seconds: float) -> Measured:
    """Each client sends its next request when the last is answered; those count that end within `seconds`.

    The seconds begin after `WARM_SECONDS` of the same load, when batches have their size.
    """
    latencies: list[float] = []
    questions = [side.question(png) for png in pngs]
    first = time.perf_counter() + WARM_SECONDS
    last = first + seconds

    async def one(index: int) -> None:
        async with connection(side.url) as http:
            while (begin := time.perf_counter()) < last:
                await side.ask(http, questions[index % len(questions)])
                end = time.perf_counter()
                if first <= end < last:
                    latencies.append(1e3 * (end - begin))
                index += clients

    await asyncio.gather(*(one(index) for index in range(clients)))
    return Measured(latencies, seconds)


async def measure(sides: list[Side], pngs: list[bytes], seconds: float) -> dict[tuple[str, int], list[Measured]]:
    """Each round of each side at each number of clients."""
    for png in pngs[:4]:  # warm, and the same answers
        found = []
        for side in sides:
            async with connection(side.url) as http:
                found.append(await side.ask(http, side.question(png)))
        if max(found) - min(found) > 1e-4:
            raise RuntimeError(f"they differ: {found} bits/dim")
    measured: dict[tuple[str, int], list[Measured]] = {}
    turns = [(clients, side) for _ in range(ROUNDS) for clients in CLIENTS for side in sides]
    for clients, side in track(turns, description="measuring"):
        measured.setdefault((side.name, clients), []).append(await load(side, pngs, clients, seconds / ROUNDS))
    return measured


@dataclass(frozen=True)
class Least:
    """CPU milliseconds that a request takes whatever serves it."""

    http: float
    """Of FastAPI with a decoded image, and of the client."""
    model: float
    """Of an image in a batch."""

    def most(self) -> float:
        """Requests/s of all cores, were there nothing else to do."""
        return 1e3 * (os.cpu_count() or 1) / (self.http + self.model)


async def least(side: Side, process: psutil.Process, pngs: list[bytes], model: FlowPP, seconds: float) -> Least:
    """What `process` and this one spend on a request of `side`, and all cores on an image in batches of `BATCH`."""

    def spent() -> float:
        of_server = process.cpu_times()
        return of_server.user + of_server.system + time.process_time()

    began = spent()
    measured = await load(side, pngs, 32, seconds)
    http = (spent() - began) / (measured.per_second * (seconds + WARM_SECONDS))
    cores = os.cpu_count() or 1
    images = read_images([("image.png", png) for png in pngs])[:BATCH]
    of_torch = torch.get_num_threads()
    torch.set_num_threads(1)
    last = time.perf_counter() + seconds

    def batches(_: int) -> int:
        count = 0
        while time.perf_counter() < last:
            estimate(model, images, [seed_of(0, index) for index in range(len(images))])
            count += 1
        return count

    with ThreadPoolExecutor(cores) as threads:
        done = sum(threads.map(batches, range(cores)))
    torch.set_num_threads(of_torch)
    return Least(1e3 * http, 1e3 * cores * seconds / (done * len(images)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=15, help="measured of each side at each number of clients")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave RESULTS.md as it is")
    arguments = parser.parse_args()
    images = real_images().test[:64]
    pngs = [encode_png(image) for image in images]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = FlowPP("small")
        model.initialize(torch.from_numpy(images).permute(0, 3, 1, 2))
        model.save(directory / "model")
        with (
            _plain(directory, "plain") as (plain, process),
            _plain(directory, "replayed", {REPLAY: "1"}) as (replayed, _),
        ):
            with Stack(directory / "stack", port=0) as stack:
                url = (stack.data / REDIS_URL).read_text()
                with Service(Settings(redis_url=url, data_directory=stack.data)) as service:
                    checkpoint = service.checkpoints.register(directory / "model")
                sides = [
                    Side(PLAIN, f"{plain}/score", "file", {}),
                    Side(REPLAYED, f"{replayed}/score", "file", {}),
                    Side(OURS, f"{stack.url}/v1/likelihood-jobs", "files", {"model": checkpoint.id}),
                ]
                found = uvloop.run(measure(sides, pngs, arguments.seconds))
            decoding = Side(PLAIN, f"{plain}/decode", "file", {})
            fast = FlowPP.load(directory / "model").eval().requires_grad_(False)
            fast.replay()
            bound = uvloop.run(least(decoding, process, pngs, fast, arguments.seconds))
    report(found, bound, arguments.seconds, write=not arguments.dry_run)


@contextmanager
def _plain(directory: Path, name: str, settings: Mapping[str, str] = {}) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a plain endpoint of the model in `directory`, and its process."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "uvicorn", "benchmarks.service:plain_app", "--factory", "--port", str(port)]
    environment = {**os.environ, MODEL: str(directory / "model"), **settings}
    log = directory / f"{name}.log"
    process = child.start([*command, "--no-access-log"], log, environment)
    try:
        _wait_for(url, log)
        yield url, psutil.Process(process.pid)
    finally:
        child.stop(process)


def _wait_for(url: str, log: Path) -> None:
    """Returns when the plain endpoint listens."""
    deadline = time.monotonic() + 120
    while True:
        try:
            httpx.get(url, trust_env=False)
            return
        except httpx.TransportError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the plain endpoint does not listen: {child.tail(log)}") from error
            time.sleep(0.1)


def report(rounds: dict[tuple[str, int], list[Measured]], bound: Least, seconds: float, write: bool) -> None:
    found = {key: whole(each) for key, each in rounds.items()}
    rows = []
    for clients in CLIENTS:
        three = [found[side, clients] for side in (PLAIN, REPLAYED, OURS)]
        figures = [each for side in three for each in (side.per_second, side.percentile(50), side.percentile(99))]
        ratios = [_ratio(rounds[OURS, clients], rounds[side, clients]) for side in (PLAIN, REPLAYED)]
        rows.append([str(clients), *(f"{each:.0f}" for each in figures), *ratios])
    header = ["clients", *(title for side in (PLAIN, REPLAYED, OURS) for title in (f"{side}: /s", "p50 ms", "p99 ms"))]
    header += ["flowpp to plain", "to replayed"]
    body = table(header, rows)
    text = (
        f"Bits/dim of one 32x32 PNG under `small`, {seconds:g} s each in {ROUNDS} rounds, service, plain endpoint and "
        "clients on the same machine; behind the ratios are the least and the greatest of a round. The plain endpoint "
        "computes an image as `flowpp.likelihood.estimate` does by itself, the second after `model.replay()`, as "
        "flowpp's workers do. Both write nothing; flowpp writes each request to disk before it is computed, and its "
        "answer before it is given.\n\n"
        f"What no service can save: FastAPI with a decoded image and this client take {bound.http:.1f} ms of CPU a "
        f"request (the plain endpoint without its model, 32 clients), the model {bound.model:.1f} ms an image in "
        f"batches of {BATCH} on every core. Without queue, records and Redis that would be {bound.most():.0f} "
        f"requests/s, {bound.most() / found[PLAIN, 32].per_second:.1f} times the plain endpoint's at 32 clients."
    )
    print(f"{body}\n\n{text}")
    if write:
        write_section("Service", "make bench-service", f"{body}\n\n{text}", torch.device("cpu"))


def _ratio(ours: Sequence[Measured], theirs: Sequence[Measured]) -> str:
    """Of requests/s: of all rounds, and the least and the greatest of one."""
    of_rounds = [one.per_second / other.per_second for one, other in zip(ours, theirs, strict=True)]
    of_all = whole(ours).per_second / whole(theirs).per_second
    return f"{of_all:.2f} ({min(of_rounds):.1f} to {max(of_rounds):.1f})"


if __name__ == "__main__":
    main()
