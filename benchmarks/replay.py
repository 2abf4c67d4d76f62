"""Recorded passes beside the same passes computed anew: time, memory and numbers. `make bench-replay`.

Likelihoods and samples of real images' size on a CPU. Writes its section of benchmarks/RESULTS.md.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from rich.progress import track

from benchmarks.contenders import interleave_calls, timed
from benchmarks.images import real_images
from benchmarks.results import table, write_section
from flowpp import FlowPP
from flowpp.likelihood import estimate
from flowpp.sampling import sample_of_seeds
from flowpp.seeds import seed_of

CASES = (("small", 1), ("small", 8), ("small", 64), ("cifar10", 1), ("cifar10", 8), ("cifar10", 64))
CPU = torch.device("cpu")


def compared(anew: Callable[[], object], replayed: Callable[[], object], images: int, seconds: float) -> list[str]:
    """Median milliseconds an image of both, timed in turns, and their ratio."""
    first, second = 1e3 * np.median(interleave_calls([anew, replayed], seconds, CPU), axis=0) / images
    return [f"{first:.2f}", f"{second:.2f}", f"{first / second:.2f}"]


def measure(preset: str, n: int, images: np.ndarray, seconds: float) -> list[str]:
    """A row of the table, of the first n images, uint8 [N, H, W, C]."""
    torch.manual_seed(0)
    model = FlowPP(preset).eval().requires_grad_(False)
    model.initialize(torch.from_numpy(images[:8]).permute(0, 3, 1, 2))
    recorded = FlowPP(preset).eval().requires_grad_(False)
    recorded.load_state_dict(model.state_dict())
    recorded.replay()
    batch, seeds = images[:n], [seed_of(0, index) for index in range(n)]
    first = timed(lambda: estimate(recorded, batch, seeds), CPU) - timed(lambda: estimate(model, batch, seeds), CPU)
    off = float(np.abs(estimate(recorded, batch, seeds) - estimate(model, batch, seeds))[:, 0].max())
    likelihood = compared(lambda: estimate(model, batch, seeds), lambda: estimate(recorded, batch, seeds), n, seconds)
    sampling = compared(lambda: sample_of_seeds(model, seeds), lambda: sample_of_seeds(recorded, seeds), n, seconds)
    assert recorded.replays is not None
    weights = sum(parameter.nbytes for parameter in recorded.parameters())
    memory = f"{(recorded.replays.nbytes - weights) / 2**20:.0f}"
    return [preset, str(n), *likelihood, *sampling, f"{first:.2f}", memory, f"{off:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave RESULTS.md as it is")
    arguments = parser.parse_args()
    images = real_images().test[:64]
    rows = [measure(preset, n, images, arguments.seconds) for preset, n in track(CASES, description="measuring")]
    header = ["model", "images", "likelihood ms", "replayed ms", "ratio", "sampling ms", "replayed ms", "ratio"]
    header += ["first pass: more s", "more MiB", "nats off, most"]
    text = (
        f"Milliseconds an image, medians of passes computed anew and replayed in turns for {arguments.seconds:g} s. "
        "The first pass of each size records it; what that takes beside a pass computed anew, and what recordings of "
        "likelihood and sampling hold beside the weights, is in the columns behind."
    )
    print(body := f"{table(header, rows)}\n\n{text}")
    if not arguments.dry_run:
        write_section("Replays", "make bench-replay", body, CPU)


if __name__ == "__main__":
    main()
