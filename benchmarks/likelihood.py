"""How far the numbers can be trusted: `make bench-likelihood`.

Trains `small` on real images (kept in benchmark_output/, so that a second call need not), takes `cifar10` some steps
far, and measures float32 against float64, pixels changed by encode and decode, evaluations of the inverse beside
bisection's, and the importance-weighted bound. Writes its section of benchmarks/RESULTS.md.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import RealImages, real_images
from benchmarks.results import table, write_section
from flowpp import logistic
from flowpp.batches import Batches
from flowpp.config import TrainingConfig
from flowpp.data import ImageSet, build_image_set
from flowpp.devices import resolve_device
from flowpp.learner import Learner
from flowpp.likelihood import Likelihood, likelihood, to_symbols
from flowpp.model import FlowPP
from flowpp.presets import PRESETS
from flowpp.processes import Processes
from flowpp.sampling import decode, encode, latent_of_seed
from flowpp.training import train

OUTPUT = Path("benchmark_output")
K = (1, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cifar10-steps", type=int, default=30, help="training steps of `cifar10`, 4 images each")
    parser.add_argument("--cifar10-images", type=int, default=64, help="images that go through `cifar10` and back")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    images = real_images()
    say(f"{images.name}: {len(images.training):,} images to train on, {len(images.test):,} to score")

    small = trained_small(images, device)
    steps, n = arguments.cifar10_steps, arguments.cifar10_images
    fresh, stepped = cifar10(images, device, steps)
    models = {"small, trained": small, "cifar10, initialized": fresh, f"cifar10, {steps} steps of 4 images": stepped}
    scored = [images.test[:count] for count in (1000, 16, 16)]
    carried = [cycled(images, count) for count in (10_000, n, n)]
    parts = [
        f"`small` is trained by its recipe on {images.name}; images are {images.name}'s, held out where they suffice.",
        precision(models, scored),
        round_trips(models, carried),
        solver(models, (256, 8, 8)),
        bound(small, images.test[:256]),
    ]
    body = "\n\n".join(parts)
    print(body)
    write_section("Likelihoods", "make bench-likelihood", body, device)


def trained_small(images: RealImages, device: torch.device) -> FlowPP:
    """`small` after its recipe, with its EMA weights."""
    name = images.name.lower().replace(" ", "-")
    data = OUTPUT / f"{name}-images"
    if not data.exists():
        validation = images.test[:128]
        OUTPUT.mkdir(exist_ok=True)
        np.savez(OUTPUT / f"{name}.npz", train=images.training, validation=validation)
        build_image_set(OUTPUT / f"{name}.npz", data)
        (OUTPUT / f"{name}.npz").unlink()
    preset = PRESETS["small"]
    run, image_set = OUTPUT / f"small-{name}", ImageSet.open(data)
    if (run / "config.json").exists():
        events = train(run, device=device)
    else:
        events = train(run, model=preset.model, training=preset.training, images=image_set, device=device)
    for event in events:
        if event.metrics and event.step % 50 == 0:
            say(f"small: step {event.step}, {event.metrics['train_bits_per_dim']:.3f} bits/dim")
    return FlowPP.load(run / "checkpoints" / f"step-{preset.training.steps:08d}", device)


def cifar10(images: RealImages, device: torch.device, steps: int) -> tuple[FlowPP, FlowPP]:
    """The paper's model as initialized, and after some steps."""
    recipe = TrainingConfig(steps=steps, batch_size=4, init_batch_size=32, warmup_steps=0, learning_rate=3e-4)
    alone = Processes(0, 1, device)
    batches = Batches(images.training, recipe, alone)
    learner = Learner(PRESETS["cifar10"].model, recipe, alone)
    say("cifar10: initialization")
    learner.initialize(to_symbols(batches.first(), learner.model))
    fresh = deepcopy(learner.model).eval()
    for _ in range(steps):
        learner.take_step(to_symbols(batches.after(learner.images_seen), learner.model))
        if learner.step % 10 == 0:
            say(f"cifar10: step {learner.step}")
    return fresh, learner.model.eval()


def precision(models: dict[str, FlowPP], sets: Sequence[np.ndarray]) -> str:
    """float32 against float64, under the same noise."""
    rows = []
    for (name, model), images in zip(models.items(), sets, strict=True):
        say(f"{name}: float32 and float64 of {len(images):,} images")
        exact = deepcopy(model).double()
        differences = []
        for start in range(0, len(images), 64):
            symbols = to_symbols(images[start : start + 64], model)
            noise = model.draw_noise(len(symbols), torch.Generator(symbols.device).manual_seed(start))
            with torch.no_grad():
                nats = model.log_prob(symbols, noise=noise) - exact.log_prob(symbols, noise=noise)
            differences.append((nats / (math.log(2) * model.config.dimensions)).abs().cpu())
        difference = torch.cat(differences)
        rows.append([name, f"{len(images):,}", f"{difference.max():.1e}", f"{difference.mean():.1e}"])
    return "float32 against float64, bits/dim an image:\n\n" + table(["model", "images", "largest", "mean"], rows)


def round_trips(models: dict[str, FlowPP], sets: Sequence[np.ndarray]) -> str:
    """Pixels that encode and decode change in float32, and how far u moves, of which 1/16 would be too far."""
    rows = []
    for (name, model), images in zip(models.items(), sets, strict=True):
        say(f"{name}: {len(images):,} images there and back")
        changed, furthest, start = 0, 0.0, time.perf_counter()
        for first in range(0, len(images), 256):
            batch = images[first : first + 256]
            latents = np.concatenate(list(encode(model, batch, seed=first)))
            changed += int((np.concatenate(list(decode(model, latents))) != batch).sum())
            furthest = max(furthest, displacement(model, batch[:8]))
        seconds = time.perf_counter() - start
        rows.append([name, f"{len(images):,}", f"{changed:,}", f"{furthest:.1e}", f"{len(images) / seconds:.1f}"])
    head = ["model", "images", "channel values changed", "largest shift of u", "images/s"]
    return "decode(encode(images)) in float32 (an image is encoded at least 1/16 from a boundary):\n\n" + table(
        head, rows
    )


@torch.no_grad()
def displacement(model: FlowPP, images: np.ndarray) -> float:
    """Greatest |f^-1(f(v)) - v|, in channel values."""
    symbols = to_symbols(images, model)
    v = model.dequantize(symbols, model.draw_noise(len(symbols), torch.Generator(symbols.device).manual_seed(0)))
    z, _ = model.flow(v)
    return float((model.decode(z, continuous=True) - v).abs().max())


def solver(models: dict[str, FlowPP], samples: Sequence[int]) -> str:
    """Evaluations of the mixture an element, of ours and of the authors' bisection, for the couplings of samples.

    Counted in plain PyTorch: the kernels, which go the same way, do not say how many they took.
    """
    rows = []
    for (name, model), n in zip(models.items(), samples, strict=True):
        say(f"{name}: evaluations of the inverse for {n} samples")
        plain = deepcopy(model)
        plain.fuse(False)
        with recorded_solves() as solves:
            plain.decode(torch.cat([latent_of_seed(model, seed) for seed in range(n)]))
        counts = np.concatenate([evaluations for evaluations, _ in solves])
        bisections = np.array([iterations for _, iterations in solves])
        rows.append(
            [name, f"{counts.mean():.1f}", f"{counts.max()}", f"{bisections.mean():.1f}", f"{bisections.max()}"]
        )
    head = ["model", "ours, mean", "ours, most", "bisection, mean of couplings", "bisection, most"]
    return "Evaluations of the mixture to invert its CDF, an element:\n\n" + table(head, rows)


@contextmanager
def recorded_solves() -> Iterator[list[tuple[np.ndarray, int]]]:
    """Each solve's evaluations, and the iterations that bisection takes for the same equations."""
    solves: list[tuple[np.ndarray, int]] = []
    solve = logistic.solve

    def recording(u: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, dim: int) -> logistic.Solution:
        found = solve(u, logits, means, log_scales, dim)
        iterations = bisect(u, logits, means, log_scales, dim)
        solves.append((found.evaluations.flatten().cpu().numpy(), iterations))
        return found

    logistic.solve = recording
    try:
        yield solves
    finally:
        logistic.solve = solve


def bisect(u: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, dim: int) -> int:
    """Iterations of bisection as the authors do it: within means -/+ 200 sum of scales, all elements together, until
    none moves by more than 1e-12 (in float32: at all), 200 at the most (flows/logistic.py, mixlogistic_invcdf)."""
    log_scales = log_scales.clamp(min=logistic.LOG_SCALE_FLOOR)
    reach = 200 * log_scales.exp().sum(dim, keepdim=True)
    low, high = (means - reach).amin(dim), (means + reach).amax(dim)
    x, target = torch.zeros_like(u), torch.sigmoid(u)
    for iteration in range(1, 201):
        log_cdf, _, _ = logistic.mixture_logs(x, logits, means, log_scales, dim)
        above = log_cdf.exp() > target
        low, high = torch.where(above, low, x), torch.where(above, x, high)
        middle = (low + high) / 2
        moved, x = (middle - x).abs().max(), middle
        if moved <= 1e-12:
            return iteration
    return 200


def bound(model: FlowPP, images: np.ndarray) -> str:
    """The importance-weighted bound over the number of samples."""
    rows = []
    for k in K:
        say(f"small, trained: {k} importance samples of {len(images)} images")
        start = time.perf_counter()
        estimates = np.concatenate(list(likelihood(model, images, k, seed=1)))
        scored = Likelihood(estimates, model.config.dimensions, k, seed=1)
        seconds = time.perf_counter() - start
        summary = scored.summary()
        error = summary["sampling_standard_error"]
        cells = [f"{k}", f"{scored.mean:.4f}", f"{scored.standard_error:.4f}", "" if error is None else f"{error:.1e}"]
        parts = [f"{value:.4f}" for value in summary["split"].values()]
        rows.append([*cells, f"{summary['effective_sample_size']:.1f}", *parts, f"{k * len(images) / seconds:.0f}"])
    head = ["k", "bits/dim", "standard error", "of it by noise", "effective samples"]
    head += ["prior", "log-det", "dequantizer", "importance", "passes/s"]
    return f"Importance-weighted bound of `small` on {len(images)} images:\n\n" + table(head, rows)


def cycled(images: RealImages, n: int) -> np.ndarray:
    """n real images: held-out ones, then those trained on."""
    return np.concatenate([images.test, images.training])[:n]


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
