"""flowpp on a CUDA device: images/s, TFLOP/s, GB/s, memory, and time to bits/dim. `make bench-gpu`.

Ends within eight minutes. Without a device it says so and has status 2. `--smoke` takes every path with a tiny model
on any device, in seconds, and writes nothing; else it writes its section of benchmarks/RESULTS.md.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from math import inf

import numpy as np
import torch

from benchmarks import time_to_bits
from benchmarks.contenders import (
    MEASURES,
    Baseline,
    Contender,
    Flowpp,
    disagreement,
    interleave_calls,
    learner_of,
    to_tensor,
)
from benchmarks.gpu_measures import (
    FULL,
    INITIALIZING,
    SMOKE,
    Case,
    Plan,
    Trained,
    fitting,
    inference,
    kernels,
    latencies,
    train,
)
from benchmarks.images import CIFAR10, RealImages, real_images
from benchmarks.results import table, write_section
from flowpp import FlowPP
from flowpp.devices import resolve_device

GFLOP = {"training": 77.6, "likelihood": 25.9, "sampling": 21.7}
"""Of an image under `cifar10`: multiplications and additions of convolutions and attention."""

PEAKS = {"H100": (989.0, 3_350.0), "H200": (989.0, 4_800.0)}
"""By the card's name, of its SXM form: TFLOP/s of dense bfloat16, and GB/s of memory."""

TF32_TOLERANCE = 1e-3
"""Of log-likelihoods, relative: cuDNN may round a float32 convolution's inputs to TF32, of each in its own way."""

TOTAL_SECONDS = 440
"""Of everything; where the rest took long, the run to bits/dim is shorter."""

NO_MEMORY = "out of memory"

Section = tuple[str, str]
"""A heading and its text."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to measure; any but cuda only with --smoke")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; leaves RESULTS.md as it is")
    parser.add_argument("--bits-seconds", type=float, help="spent on the run to 3.8 and 3.6 bits/dim (180)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device on this machine; make bench-gpu needs one", file=sys.stderr)
        return 2
    device = resolve_device(options.device)
    if device.type != "cuda" and not options.smoke:
        parser.error("figures of a GPU are measured on cuda; make bench measures a CPU")
    if device.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # triton asks when it is imported, which torch may do at any time
    plan = SMOKE if options.smoke else FULL
    if options.bits_seconds is not None:
        plan = plan._replace(bits_seconds=options.bits_seconds)
    begin = time.perf_counter()
    text = ""
    for heading, body in sections(plan, real_images(), device):
        print(f"{heading} ({time.perf_counter() - begin:.0f} s)\n\n{body}\n", flush=True)
        text += f"{heading}\n\n{body}\n\n"
    if not options.smoke:
        write_section("Speed on a GPU", "make bench-gpu", text, device)
    return 0


def sections(plan: Plan, images: RealImages, device: torch.device) -> Iterator[Section]:
    """What is measured, in the order of its worth: whoever has little time has the first."""
    begin = time.perf_counter()
    trained = {case: fitting(partial(train, case, images.training, device, plan.seconds)) for case in plan.cases()}
    yield "### Training", training_text(plan, trained, device)
    rates = inference(plan, images.training, device)
    yield "### Likelihood and sampling", inference_text(plan, rates, device)
    p50, p99 = latencies(plan, images.training, device)
    yield "### One sample", f"A batch of one: p50 {1e3 * p50:.1f} ms, p99 {1e3 * p99:.1f} ms, of {plan.singles}."
    yield "### Aims", aims_text(plan, trained, rates, p50)
    yield "### Mixture kernels", kernels_text(plan, device)
    yield "### Beside the baseline", baseline_text(plan, images.training, device)
    left = min(plan.bits_seconds, TOTAL_SECONDS - (time.perf_counter() - begin))
    yield "### Time to bits/dim", bits_text(plan._replace(bits_seconds=left), images, device)


def baseline_text(plan: Plan, images: np.ndarray, device: torch.device) -> str:
    """The two in turns at the smaller batch, in float32."""
    batch = images[: plan.batches[0]]
    recipe = plan.cases()[0].recipe()
    ours = Flowpp(learner_of(plan.model, recipe, device, to_tensor(images[:INITIALIZING])), batch)
    model = FlowPP(plan.model).to(device)
    model.load_state_dict(ours.learner.ema.state_dict())
    contenders: list[Contender] = [Baseline(model, batch), ours]
    difference = disagreement(ours, contenders[0], TF32_TOLERANCE)
    rows = []
    for name, measure in MEASURES.items():
        calls = [partial(measure, contender) for contender in contenders]
        times = fitting(partial(interleave_calls, calls, plan.seconds, device))
        if times is None:
            rows.append([name, *[NO_MEMORY] * 4])
            continue
        plain_rate, rate = len(batch) / np.median(times, axis=0)
        pairs = times[:, 0] / times[:, 1]
        spread = f"{pairs.min():.2f} to {pairs.max():.2f}"
        rows.append([name, f"{plain_rate:.1f}", f"{rate:.1f}", f"{rate / plain_rate:.2f}", spread])
    return (
        f"Batches of {len(batch)} in float32; log-likelihoods differ by at most {difference:.1e} of them.\n\n"
        + table(["measure", "baseline images/s", "ours images/s", "ratio", "of pairs"], rows)
    )


def bits_text(plan: Plan, images: RealImages, device: torch.device) -> str:
    if plan.real and images.name != CIFAR10:
        return "Skipped: no CIFAR-10 shards in shared/data beside the repository or in it."
    held_out = images._replace(test=images.test[: plan.validation])
    run = time_to_bits.train_to(
        plan.targets, plan.model, plan.recipe, held_out, device, window=plan.window, seconds=plan.bits_seconds
    )
    recipe = plan.recipe
    return (
        f"On {len(images.training):,} images of {images.name} in batches of {recipe.batch_size}, learning rate "
        f"{recipe.learning_rate:g} after {recipe.warmup_steps} steps, conditioners in {recipe.conditioner_precision}; "
        f"training bits/dim over the last {plan.window:,} images, validation of the moving average on "
        f"{len(held_out.test):,} held-out ones. Seconds are of the steps; the run had {plan.bits_seconds:.0f}.\n\n"
        + time_to_bits.report(run, plan.targets)
    )


def training_text(plan: Plan, trained: dict[Case, Trained | None], device: torch.device) -> str:
    rows = []
    for case, found in trained.items():
        name = case.name + ", activation checkpointing" * case.recompute
        of_cost = found.rate if found and case.model == plan.model and plan.real else None
        figures = [f"{found.rate:.1f}", *achieved("training", of_cost, device), f"{found.peak:.1f}"] if found else []
        rows.append([name, str(case.batch), case.precision, *(figures or [NO_MEMORY, "", "", ""])])
    return peak_text(device) + table(
        ["model", "batch", "conditioners", "images/s", "TFLOP/s", "MFU, %", "peak memory, GB"], rows
    )


def inference_text(plan: Plan, rates: dict[tuple[str, int], float | None], device: torch.device) -> str:
    rows = [
        [measure, str(batch), f"{rate:.1f}", *achieved(measure, rate if plan.real else None, device)]
        if rate
        else [measure, str(batch), NO_MEMORY, "", ""]
        for (measure, batch), rate in rates.items()
    ]
    return table(["measure", "batch", "images/s", "TFLOP/s", "MFU, %"], rows)


def kernels_text(plan: Plan, device: torch.device) -> str:
    if find_spec("triton") is None:
        return "Skipped: triton is not installed."
    peaks = peaks_of(device)
    rows = []
    for name, seconds, size in kernels(plan, device):
        rate = size / seconds / 1e9
        share = f"{100 * rate / peaks[1]:.0f}" if peaks else ""
        rows.append([name, f"{size / 1e6:.1f}", f"{1e6 * seconds:.0f}", f"{rate:.1f}", share])
    header = ["kernel", "must move, MB", "microseconds", "GB/s", "% of the memory's"]
    shape = "x".join(map(str, plan.coupling))
    return f"float32, {shape} elements, {plan.model.components} components.\n\n" + table(header, rows)


def aims_text(
    plan: Plan, trained: dict[Case, Trained | None], rates: dict[tuple[str, int], float | None], p50: float
) -> str:
    """What was aimed at, and whether it was reached."""
    large = plan.batches[1]
    best = max((found.rate for case, found in trained.items() if found and case.name == "cifar10"), default=0)
    fastest = {
        measure: max(rate or 0 for (name, _), rate in rates.items() if name == measure)
        for measure in ("likelihood", "sampling")
    }
    rows = [
        aim("training, images/s", best, 2_500),
        aim("training, images/s, then", best, 4_000),
        aim("likelihood, images/s", fastest["likelihood"], 7_500),
        aim("sampling, images/s", fastest["sampling"], 8_000),
        aim("one sample, p50 ms", 1e3 * p50, 10, less=True),
        aim(f"training at batch {large}, GB", least_peak(trained, "cifar10", large), 16, less=True),
        aim(
            f"training 64x64 at batch {plan.large_batch}, GB",
            least_peak(trained, "imagenet64", plan.large_batch),
            24,
            less=True,
        ),
    ]
    return table(["best of", "measured", "aim", "reached"], rows)


def least_peak(trained: dict[Case, Trained | None], name: str, batch: int) -> float:
    peaks = (found.peak for case, found in trained.items() if found and (case.name, case.batch) == (name, batch))
    return min(peaks, default=inf)


def aim(name: str, measured: float, wanted: float, *, less: bool = False) -> list[str]:
    reached = measured <= wanted if less else measured >= wanted
    return [name, f"{measured:,.1f}" if 0 < measured < inf else NO_MEMORY, f"{wanted:,g}", "yes" if reached else "no"]


def achieved(measure: str, rate: float | None, device: torch.device) -> list[str]:
    """TFLOP/s and MFU in percent at `rate` images/s, where it is known what an image costs."""
    if rate is None:
        return ["", ""]
    tera = rate * GFLOP[measure] / 1e3
    peaks = peaks_of(device)
    return [f"{tera:.1f}", f"{100 * tera / peaks[0]:.1f}" if peaks else ""]


def peaks_of(device: torch.device) -> tuple[float, float] | None:
    """TFLOP/s and GB/s that the card can do, where its name is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peaks for card, peaks in PEAKS.items() if card in name and "PCIe" not in name), None)


def peak_text(device: torch.device) -> str:
    peaks = peaks_of(device)
    if peaks is None:
        return "The peak of this device is not known here, and so no MFU.\n\n"
    return f"MFU is the part of {peaks[0]:g} TFLOP/s, dense bfloat16; an image costs {GFLOP['training']} GFLOP.\n\n"


if __name__ == "__main__":
    sys.exit(main())
