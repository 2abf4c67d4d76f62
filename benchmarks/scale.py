"""What the service costs as jobs grow in number: 1,000 training jobs, 100,000 likelihood requests. `make bench-scale`.

The real API, Redis server, queues, reapers and recorders, with the workers of benchmarks/simulated_workers.py, which
compute nothing: no process imports torch. At each size the benchmark sends what is missing, first training jobs, which
then all run at once, then likelihood requests, each of which a client waits for; and measures, all of it beside the
leases of the jobs that run. Writes its section of benchmarks/RESULTS.md.
"""

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar

from benchmarks import scale_measures as measures
from benchmarks.results import table, write_section
from benchmarks.scale_house import House
from benchmarks.simulated_workers import imports_torch

SIZES = (100, 1_000, 10_000, 100_000)
LIKELIHOODS_A_TRAINING = 100
STEPS = 100
CLIENTS = 32

Row = dict[str, str]


def trainings(size: int) -> int:
    """How many run beside so many likelihood requests."""
    return max(1, size // LIKELIHOODS_A_TRAINING)


async def grow(house: House, size: int, before: int, bar: Bar, repeats: int) -> Row:
    """Brings the service from `before` likelihood jobs to `size`, and says what that and the rest has cost."""
    found: Row = {}
    task = bar.add_task(f"{size:,}", total=size - before)
    new = trainings(size) - (trainings(before) if before else 0)
    if new:
        found |= await measures.training_jobs(house, new, STEPS)
    found |= await measures.likelihood_requests(house, size - before, CLIENTS, lambda: bar.advance(task))
    found |= measures.recording(house)
    found |= await measures.quiet_requests(house, repeats)
    found |= await measures.events(house, trainings(size))
    found |= measures.reaping(house, repeats)
    found |= measures.processes(house)
    found |= measures.restoring(house)
    return found


async def measure(house: House, sizes: Sequence[int], repeats: int) -> dict[int, Row]:
    """What each size has cost."""
    found: dict[int, Row] = {}
    with Bar(console=Console(stderr=True, width=200)) as bar:
        async with house.session() as house.http:
            await house.prepare()
            for before, size in zip((0, *sizes), sizes, strict=False):
                found[size] = await grow(house, size, before, bar, repeats)
                bar.print(report({size: found[size]}), markup=False)
            house.ask_fleet("end", at_once=8)
    return found


def report(found: dict[int, Row]) -> str:
    """A column a size."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    header = ["", *(f"{trainings(size):,} + {size:,}" for size in found)]
    return table(header, [[name, *(row.get(name, "") for row in found.values())] for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="likelihood requests, growing")
    parser.add_argument("--repeats", type=int, default=200, help="of each request that is timed alone")
    parser.add_argument("--note", default="", help="a sentence for RESULTS.md, say on who else used the machine")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave RESULTS.md as it is")
    arguments = parser.parse_args()
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="flowpp-scale-"))
    try:
        with House(directory) as house:
            found = asyncio.run(measure(house, arguments.sizes, arguments.repeats))
            if imports_torch() or house.imports_torch:
                raise RuntimeError("a process of the benchmark has imported torch")
        body = report(found)
        minutes = (time.monotonic() - began) / 60
        print(body, f"\n{minutes:.1f} minutes; what it has stored is being deleted")
        if not arguments.dry_run:
            write_section("Scale", "make bench-scale", f"{body}\n\n{_explained(minutes)} {arguments.note}", None)
    finally:
        shutil.rmtree(directory)


def _explained(minutes: float) -> str:
    return (
        "A column is a number of training jobs, all of them running, and of likelihood requests, each with one 32x32 "
        "PNG, since the start. One API process, one Redis server with `appendfsync always`, one process of simulated "
        f"inference workers and one of simulated training workers, and {CLIENTS} clients, on the same "
        f"{os.cpu_count()} cores; with authentication, a key that sees its own. Latencies are p50 / p99. What is timed "
        "alone is timed by one client beside the leases of the running jobs, each renewed and looked at four times a "
        f"second. The whole took {minutes:.0f} minutes."
    )


if __name__ == "__main__":
    main()
