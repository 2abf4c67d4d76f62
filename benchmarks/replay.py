"""Recorded passes beside the same passes computed anew: time, memory and numbers. `make bench-replay`.

Likelihoods and samples of real images' size on a CPU. Writes its section of benchmarks/RESULTS.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track

from benchmarks.images import real_images
from benchmarks.results import table, write_section
from flowpp import FlowPP
from flowpp.likelihood import estimate
from flowpp.sampling import sample_of_seeds
from flowpp.seeds import seed_of

CASES = (("small", 1), ("small", 8), ("small", 64), ("cifar10", 1), ("cifar10", 8), ("cifar10", 64))
ROUNDS = 5


@dataclass(frozen=True)
class Timed:
    """Median milliseconds an image, computed anew and replayed."""

    anew: float
    replayed: float

    def cells(self) -> list[str]:
        return [f"{self.anew:.2f}", f"{self.replayed:.2f}", f"{self.anew / self.replayed:.2f}"]


def timed(anew: Callable[[], object], replayed: Callable[[], object], images: int, seconds: float) -> Timed:
    """Of both in turns, each for so long a round."""
    found: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for times, function in zip(found, (anew, replayed), strict=True):
            function()
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                function()
                count += 1
            times.append(1e3 * (time.perf_counter() - began) / (count * images))
    return Timed(*map(statistics.median, found))


def measure(preset: str, n: int, images: np.ndarray, seconds: float) -> list[str]:
    torch.manual_seed(0)
    model = FlowPP(preset).eval().requires_grad_(False)
    model.initialize(torch.from_numpy(images[:8]).permute(0, 3, 1, 2))
    recorded = FlowPP(preset).eval().requires_grad_(False)
    recorded.load_state_dict(model.state_dict())
    recorded.replay()
    batch, seeds = images[:n], [seed_of(0, index) for index in range(n)]
    began = time.perf_counter()
    found = estimate(recorded, batch, seeds)
    first = time.perf_counter() - began
    began = time.perf_counter()
    expected = estimate(model, batch, seeds)
    first -= time.perf_counter() - began
    off = float(np.abs(found[:, 0] - expected[:, 0]).max())
    likelihood = timed(lambda: estimate(model, batch, seeds), lambda: estimate(recorded, batch, seeds), n, seconds)
    sampling = timed(lambda: sample_of_seeds(model, seeds), lambda: sample_of_seeds(recorded, seeds), n, seconds)
    assert recorded.replays is not None
    weights = sum(parameter.nbytes for parameter in recorded.parameters())
    memory = f"{(recorded.replays.nbytes - weights) / 2**20:.0f}"
    return [preset, str(n), *likelihood.cells(), *sampling.cells(), f"{first:.2f}", memory, f"{off:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement in each of the rounds")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave RESULTS.md as it is")
    arguments = parser.parse_args()
    images = real_images().test[:64]
    rows = [measure(preset, n, images, arguments.seconds) for preset, n in track(CASES, description="measuring")]
    header = ["model", "images", "likelihood ms", "replayed ms", "ratio", "sampling ms", "replayed ms", "ratio"]
    header += ["first pass: more s", "more MiB", "nats off, most"]
    text = (
        f"Milliseconds an image, medians of {ROUNDS} rounds of {arguments.seconds:g} s in which both were timed. "
        "The first pass of each size records it; what that takes beside a pass computed anew, and what recordings of "
        "likelihood and sampling hold beside the weights, is in the columns behind."
    )
    print(body := f"{table(header, rows)}\n\n{text}")
    if not arguments.dry_run:
        write_section("Replays", "make bench-replay", body, torch.device("cpu"))


if __name__ == "__main__":
    main()
