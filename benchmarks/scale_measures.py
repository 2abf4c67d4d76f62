"""What benchmarks/scale.py measures of a service at one size; each function gives rows of its table."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.scale_house import House
from worker.queue import QUEUES
from worker.reaper import reap

MOST_SECONDS = 5
"""That one kind of request is repeated for."""

SENDERS = 8
FOLLOWERS = 50
FOLLOWED_STEPS = 20
EXPIRING = 100
RESTORE = Path(__file__).parents[1] / "examples" / "restore.sh"


async def training_jobs(house: House, count: int, steps: int) -> dict[str, str]:
    """So many more, all waiting, then all running, then each telling `steps` steps and storing a checkpoint."""
    memory = _used(house)
    house.ask_fleet("close")
    held = house.ask_fleet("held")["held"]
    created = await _many(house.train, count, SENDERS)
    waiting = _passes(house, 5)
    house.service.redis.delete(QUEUES["training"])
    (lost,) = _passes(house, 1)
    house.ask_fleet("open")
    begun = house.until(lambda: house.ask_fleet("held")["held"] == held + count, "jobs wait", 600)
    new = house.jobs[-count:]
    alone = _rate(house, "tell", jobs=new[:1], steps=200, at_once=1)
    written = _rate(house, "tell", jobs=new, steps=steps, at_once=SENDERS)
    _rate(house, "checkpoint", at_once=SENDERS)
    each = (_used(house) - memory) / count
    return {
        "training jobs: create, ms": _shown(created),
        "reaper's pass while the new training jobs wait, ms": f"{statistics.median(waiting):.1f}",
        "reaper's pass that finds their bells lost, ms": f"{lost:.0f}",
        "all of them running after, s": f"{begun:.1f}",
        "events/s written, one after the other": f"{alone:,.0f}",
        f"events/s written, {SENDERS} at once": f"{written:,.0f}",
        f"Redis: kB a training job of {steps} steps": f"{each / 1e3:.1f}",
    }


async def likelihood_requests(house: House, count: int, clients: int, advance: Callable[[], object]) -> dict[str, str]:
    """So many more, by clients each of which waits for its answer."""
    memory, start = _used(house), time.monotonic()
    cpu = {name: house.cpu_seconds(name) for name in house.children}

    async def ask() -> None:
        await house.score(wait=True)
        advance()

    answered = await _many(ask, count, clients)
    seconds = time.monotonic() - start
    used = {name: 1e3 * (house.cpu_seconds(name) - before) / count for name, before in cpu.items()}
    return {
        f"likelihood requests/s answered to {clients} clients": f"{count / seconds:.0f}",
        f"likelihood request answered to {clients} clients, ms": _shown(answered),
        "CPU ms a request: API": f"{used['api']:.1f}",
        "CPU ms a request: Redis": f"{used['redis']:.2f}",
        "CPU ms a request: inference worker": f"{used['inference']:.1f}",
        "Redis: kB a likelihood job": f"{(_used(house) - memory) / count / 1e3:.1f}",
    }


def recording(house: House) -> dict[str, str]:
    """How far the recorder is behind, and what it leaves in the store."""
    behind = int(house.service.redis.zcard("flowpp:changed"))
    seconds = house.until(lambda: not house.service.redis.zcard("flowpp:changed"), "jobs are not stored", 900)
    last = house.service.jobs.page(type="likelihood", limit=20).data
    each = [_disk_bytes(house.directory / "data" / "store" / "jobs" / job.id) for job in last]
    return {
        "recorder: jobs not stored yet when the last was answered": f"{behind:,}",
        "recorder: seconds until all were stored": f"{seconds:.1f}",
        "store: kB on disk a likelihood job": f"{statistics.mean(each) / 1e3:.1f}",
    }


async def quiet_requests(house: House, repeats: int) -> dict[str, str]:
    """Each kind of request, sent by one client."""
    job, middle = house.jobs[-1], house.jobs[len(house.jobs) // 2]
    asked: dict[str, Callable[[], Awaitable[object]]] = {
        "create a likelihood job": lambda: house.score(wait=False),
        "a likelihood job, answered": lambda: house.score(wait=True),
        "get a job": lambda: house.get(f"/v1/jobs/{job}"),
        "list, first page": lambda: house.get("/v1/jobs"),
        "list, behind a job in the middle": lambda: house.get(f"/v1/jobs?after={middle}"),
        "list, type=training": lambda: house.get("/v1/jobs?type=training"),
        "list, status=running": lambda: house.get("/v1/jobs?status=running"),
        "list, status=failed, of which there is none": lambda: house.get("/v1/jobs?status=failed"),
        "list, metadata of the oldest job": lambda: house.get("/v1/jobs?metadata[run]=0"),
        "events, a page of 100": lambda: house.get(f"/v1/jobs/{job}/events"),
    }
    found = {}
    for name, ask in asked.items():
        await ask()
        found[f"{name}, ms"] = _shown(await _many(ask, repeats, 1, MOST_SECONDS))
    return found


async def events(house: House, running: int) -> dict[str, str]:
    """Streams: what is told already, and what comes, to many at once."""
    replayed, seconds = 0, time.monotonic()
    for job in house.jobs[-min(20, running) :]:
        replayed += await _read(house, job, None, 100, [])
    rate = replayed / (time.monotonic() - seconds)
    followed = house.jobs[-min(FOLLOWERS, running) :]
    lags: list[float] = []
    behind = f"{int(1e3 * time.time())}-0"
    following = [asyncio.create_task(_read(house, job, behind, FOLLOWED_STEPS, lags)) for job in followed]
    await asyncio.sleep(2)
    start = time.monotonic()
    what = {"jobs": followed, "steps": FOLLOWED_STEPS, "at_once": SENDERS}
    await asyncio.to_thread(house.ask_fleet, "tell", **what)
    _, silent = await asyncio.wait(following, timeout=60)  # of a job whose lease was lost meanwhile
    for task in silent:
        task.cancel()
    live = len(lags) / (time.monotonic() - start)
    return {
        "events/s read over SSE, one client, told before": f"{rate:,.0f}",
        f"events/s read over SSE by up to {FOLLOWERS} followers as they are told": f"{live:,.0f}",
        "of these, from the event to the client, ms": _shown(lags),
    }


def reaping(house: House, repeats: int) -> dict[str, str]:
    """The reaper's pass, where nothing is to be done, and where jobs have expired."""
    quiet = _passes(house, min(50, repeats))
    jobs = house.service.jobs.page(type="likelihood", limit=EXPIRING, order="asc", owner=None).data[: EXPIRING // 2]
    finished = [job.id for job in jobs if job.finished]
    house.service.redis.zadd("flowpp:expiring", dict.fromkeys(finished, 1))
    start = time.monotonic()
    while house.service.jobs.expired():
        reap(house.service)
    each = 1e3 * (time.monotonic() - start) / len(finished)
    return {
        "reaper's pass where nothing is to be done, ms": _shown(quiet),
        "reaper: ms to delete an expired job": f"{each:.1f}",
    }


def processes(house: House) -> dict[str, str]:
    """What is used while nobody asks."""
    time.sleep(1)
    before, start = house.cpu_seconds("redis"), time.monotonic()
    time.sleep(3)
    busy = (house.cpu_seconds("redis") - before) / (time.monotonic() - start)
    log = sum(path.stat().st_size for path in (house.directory / "redis").rglob("*.aof"))
    return {
        "leases lost so far": f"{house.ask_fleet('held')['lost']}",
        "Redis while nobody asks, % of a core": f"{100 * busy:.1f}",
        "Redis: MB of data": f"{_used(house) / 1e6:.1f}",
        "Redis: MB resident": f"{house.resident_bytes('redis') / 1e6:.0f}",
        "Redis: MB of append-only file": f"{log / 1e6:.1f}",
        "API: MB resident": f"{house.resident_bytes('api') / 1e6:.0f}",
    }


def restoring(house: House) -> dict[str, str]:
    """A backup beside the service, and examples/restore.sh on an empty machine."""
    directory = Path(tempfile.mkdtemp(dir=house.directory))  # deleted with all else: that takes as long
    flowpp = Path(sys.executable).with_name("flowpp")
    start = time.monotonic()
    _run(flowpp, "backup", directory / "backup", "--data", house.directory / "data")
    made = time.monotonic()
    _run("bash", RESTORE, directory / "backup", directory / "restored")
    done = time.monotonic()
    return {"flowpp backup, s": f"{made - start:.0f}", "examples/restore.sh, s": f"{done - made:.0f}"}


def _run(*command: str | Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLOWPP_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{command} ended with {ran.returncode}: {ran.stderr}")


async def _many(
    ask: Callable[[], Awaitable[object]], count: int, at_once: int, most_seconds: float = float("inf")
) -> list[float]:
    """Milliseconds that each took; none begins after `most_seconds`."""
    found: list[float] = []
    left, end = iter(range(count)), time.monotonic() + most_seconds

    async def client() -> None:
        for _ in left:
            start = time.perf_counter()
            await ask()
            found.append(1e3 * (time.perf_counter() - start))
            if time.monotonic() > end:
                return

    await asyncio.gather(*(client() for _ in range(at_once)))
    return found


async def _read(house: House, job: str, behind: str | None, count: int, lags: list[float]) -> int:
    """Reads so many events of a job's stream as they come, and notes in milliseconds how old each is then."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": behind} if behind else {})
    got = 0
    async with house.http.get(f"/v1/jobs/{job}/events", headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: "):
                lags.append(1e3 * (time.time() - json.loads(line[6:])["created_at"]))
                got += 1
                if got == count:
                    break
    return got


def _rate(house: House, do: str, **what: object) -> float:
    """Of what the simulated training workers do, a second."""
    start = time.monotonic()
    done = house.ask_fleet(do, **what)["events"]
    return float(done / (time.monotonic() - start))


def _passes(house: House, count: int) -> list[float]:
    """Milliseconds that the reaper's pass takes, each time."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        reap(house.service)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def _used(house: House) -> int:
    return int(house.info("memory")["used_memory"])


def _disk_bytes(directory: Path) -> int:
    return sum(512 * path.lstat().st_blocks for path in (directory, *directory.rglob("*")))


def _shown(milliseconds: list[float]) -> str:
    """p50 / p99."""
    if len(milliseconds) < 2:
        return f"{milliseconds[0]:.1f}" if milliseconds else ""
    cuts = statistics.quantiles(milliseconds, n=100, method="inclusive")
    return f"{cuts[49]:.1f} / {cuts[98]:.1f}"
