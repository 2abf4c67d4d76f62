"""flowpp beside the plain baseline on a CPU: training, likelihood, sampling and peak memory. `make bench`.

Both have one model and one batch of real images, and agree in log-likelihood before anything is timed. Their timings
alternate; figures are medians. Each is timed in a process of its own, as it would be used: the kernels let glibc keep
freed memory, which would speed up the baseline, too. Writes its section of benchmarks/RESULTS.md.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.contenders import (
    MEASURES,
    Baseline,
    Contender,
    Flowpp,
    disagreement,
    interleave,
    learner_of,
    timed,
    to_tensor,
    unlike_samples,
    without_kernels,
)
from benchmarks.images import real_images
from benchmarks.memory import resident
from benchmarks.results import table, write_section
from flowpp import FlowPP
from flowpp.config import DequantizerConfig, ModelConfig, TrainingConfig
from flowpp.presets import PRESETS

CPU = torch.device("cpu")
INITIALIZING = 32
SECONDS = {"training": 55.0, "likelihood": 20.0, "sampling": 25.0}
"""Of the rounds of a measure, all that is compared in it together."""
OF_LIKELIHOOD = 0.8
PLAIN, OURS, EAGER, BFLOAT16 = "baseline", "ours", "ours, no kernels", "ours, bfloat16"


class Size(NamedTuple):
    """A model, the images a batch, and how many times faster, or smaller, than the baseline is aimed at."""

    name: str
    model: ModelConfig
    batch: int
    aims: dict[str, float]
    bfloat16: bool = False
    """Whether training with conditioners in bfloat16 is measured, too."""

    def recipe(self, precision: str = "float32") -> TrainingConfig:
        return TrainingConfig.model_validate({"batch_size": self.batch, "conditioner_precision": precision})


SIZES = (
    Size(
        "cifar10",
        PRESETS["cifar10"].model,
        4,
        {"training": 2, "likelihood": 1.5, "sampling": 2.5, "memory": 2},
        bfloat16=True,
    ),
    Size(
        "32 filters",
        ModelConfig(filters=32, blocks=3, components=8, dequantizer=DequantizerConfig(blocks=2)),
        16,
        {"training": 5, "likelihood": 4, "sampling": 6, "memory": 3},
    ),
)


class Row(NamedTuple):
    """A measure, in images/s or GiB. `ratio` is how many times better the second figure is than the first."""

    measure: str
    first: float
    second: float
    ratio: float
    aim: float | None = None
    spread: tuple[float, float] | None = None
    eager: float | None = None


class Measured(NamedTuple):
    """Of a size: the rows, and before them the `disagreement` in likelihood and the `unlike_samples`."""

    size: Size
    disagreement: float
    unlike: float
    rows: list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print, and leave RESULTS.md as it is")
    arguments = parser.parse_args()
    images = real_images()
    with Progress() as progress:
        task = progress.add_task("measuring", total=len(SIZES) * (1 + len(MEASURES)))
        found = [measure(size, images.training, lambda: progress.advance(task)) for size in SIZES]
    text = report(found, images.name)
    print(text)
    if not arguments.dry_run:
        write_section("Speed", "make bench", text, CPU)


def measure(
    size: Size, images: np.ndarray, advance: Callable[[], object], seconds: dict[str, float] = SECONDS
) -> Measured:
    """On the first of images, uint8 [N, H, W, C]. `advance` is called after each of 1 + len(MEASURES) parts."""
    contenders = build(size, images)
    measured = Measured(
        size,
        disagreement(contenders[OURS], contenders[PLAIN]),
        unlike_samples(contenders[OURS], contenders[PLAIN]),
        [],
    )
    names = [name for name in contenders if name != BFLOAT16 or size.bfloat16]
    with ExitStack() as children:
        processes = {name: children.enter_context(Process(size, name, images)) for name in names}
        memory = {name: process.ask("peak") / 2**30 for name, process in processes.items()}
        advance()
        for name in MEASURES:
            measured.rows.extend(compare(size, name, processes, seconds[name]))
            advance()
    rates = {row.measure: row.second for row in measured.rows}
    of_likelihood = rates["sampling"] / rates["likelihood"]
    ours = Row("sampling beside our likelihood", rates["likelihood"], rates["sampling"], of_likelihood, OF_LIKELIHOOD)
    peaks = memory[PLAIN], memory[OURS], memory[PLAIN] / memory[OURS]
    measured.rows.extend([ours, Row("memory of training, GiB", *peaks, size.aims["memory"], eager=memory[EAGER])])
    return measured


def build(size: Size, images: np.ndarray) -> dict[str, Contender]:
    """All that are measured, with the same weights."""
    batch = images[: size.batch]
    ours = learner_of(size.model, size.recipe(), CPU, to_tensor(images[:INITIALIZING]))
    start, plain = ours.ema, FlowPP(size.model)
    plain.load_state_dict(start.state_dict())
    contenders: dict[str, Contender] = {
        PLAIN: Baseline(plain, batch),
        OURS: Flowpp(ours, batch),
        EAGER: Flowpp(without_kernels(learner_of(size.model, size.recipe(), CPU, start)), batch),
    }
    if size.bfloat16:
        contenders[BFLOAT16] = Flowpp(learner_of(size.model, size.recipe("bfloat16"), CPU, start), batch)
    return contenders


def compare(size: Size, measure: str, processes: dict[str, "Process"], seconds: float) -> list[Row]:
    """The row of a measure, and another for training in bfloat16."""
    names = [name for name in processes if name != BFLOAT16 or measure == "training"]
    times = interleave([partial(processes[name].ask, measure) for name in names], seconds)
    rate = dict(zip(names, size.batch / np.median(times, axis=0), strict=True))
    pairs = dict(zip(names, (times[:, :1] / times).T, strict=True))
    rows = []
    for name in (OURS, BFLOAT16):
        if name in names:
            rows.append(
                Row(
                    measure if name == OURS else f"{measure}, bfloat16",
                    rate[PLAIN],
                    rate[name],
                    rate[name] / rate[PLAIN],
                    size.aims[measure] if name == OURS else None,
                    (pairs[name].min(), pairs[name].max()),
                    rate[EAGER] if name == OURS else None,
                )
            )
    return rows


class Process:
    """A process that has one contender and does what it is asked to."""

    def __init__(self, size: Size, name: str, images: np.ndarray) -> None:
        code = "import sys; from benchmarks.speed import serve; serve(*sys.argv[1:])"
        arguments = [size.model.model_dump_json(), str(size.batch), name]
        self._child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._child.stdin is not None
        self._child.stdin.write(images[:INITIALIZING].tobytes())

    def ask(self, what: str) -> float:
        """Seconds of one of `MEASURES`, or, before anything else, the bytes at the "peak" of training."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{what}\n".encode())
        self._child.stdin.flush()
        return float(self._child.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate(timeout=60)


def serve(model: str, batch: str, name: str) -> None:
    """Answers what stdin asks, a line each, on the images that come before."""
    size = Size("", ModelConfig.model_validate_json(model), int(batch), {})
    channels, height, width = size.model.image_shape
    given = sys.stdin.buffer.read(INITIALIZING * channels * height * width)
    images = np.frombuffer(given, np.uint8).reshape(-1, height, width, channels)
    torch.nn.functional.conv2d(torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3))  # what libraries allocate at first use
    before = resident("VmRSS")
    contender = _contender(size, name, images)
    for line in sys.stdin.buffer:
        if (asked := line.decode().strip()) == "peak":
            for _ in range(2):
                contender.train()
            print(resident("VmHWM") - before, flush=True)
        else:
            print(timed(partial(MEASURES[asked], contender), CPU), flush=True)


def _contender(size: Size, name: str, images: np.ndarray) -> Contender:
    batch = images[: size.batch]
    if name == PLAIN:
        plain = FlowPP(size.model)
        plain.fuse(False)
        plain.initialize(to_tensor(images))
        return Baseline(plain, batch)
    recipe = size.recipe("bfloat16" if name == BFLOAT16 else "float32")
    learner = learner_of(size.model, recipe, CPU, to_tensor(images))
    return Flowpp(without_kernels(learner) if name == EAGER else learner, batch)


def report(found: list[Measured], images: str) -> str:
    """The section's text."""
    header = ["model", "measure", "baseline", "ours, no kernels", "ours", "ratio", "of pairs", "aim", "reached"]
    rows = [[measured.size.name, *cells(row)] for measured in found for row in measured.rows]
    sizes = "; ".join(f"`{one.size.name}` in batches of {one.size.batch}" for one in found)
    agreements = "; ".join(
        f"of `{one.size.name}` log-likelihoods differ by at most {one.disagreement:.1e} of them, and "
        f"{1e6 * one.unlike:,.0f} in a million channel values of their samples differ"
        for one in found
    )
    return (
        f"Images/s and GiB on {images}: {sizes}. The baseline is `benchmarks/baseline.py`, the authors' algorithm in "
        "plain PyTorch, which bisects to invert. A training step is a whole one, of ours with clipping and moving "
        "average. The ratio is of medians; beside it are the least and the greatest of the rounds in which the two "
        'were timed one after the other. What "sampling beside our likelihood" has under baseline is the rate of our '
        f"likelihood.\n\nThe two compute the same: {agreements}.\n\n" + table(header, rows)
    )


def cells(row: Row) -> list[str]:
    eager = "" if row.eager is None else f"{row.eager:.2f}"
    spread = "" if row.spread is None else f"{row.spread[0]:.2f} to {row.spread[1]:.2f}"
    aim = ["", ""] if row.aim is None else [f"{row.aim:g}", "yes" if row.ratio >= row.aim else "no"]
    return [row.measure, f"{row.first:.2f}", eager, f"{row.second:.2f}", f"{row.ratio:.2f}", spread, *aim]


if __name__ == "__main__":
    main()
