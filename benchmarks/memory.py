"""How far the memory estimate, by which runs are planned, is from the peak of a process: `make bench-memory`.

Each case trains two steps in a process of its own, on a CPU or, where there is one, a GPU. On a CPU the peak is that of
the resident set. Then plans for so much memory, likewise, and what their choices cost.
"""

import json
import subprocess
import sys
import time

import torch
from rich.progress import track

from benchmarks.results import table, write_section
from flowpp.config import LEAST_IMAGES
from flowpp.devices import resolve_device
from flowpp.memory import EVALUATION_BATCH, estimate, micro_batch
from flowpp.plan import choose
from flowpp.presets import PRESETS

CASES: list[tuple[str, int, bool, str]] = [
    ("small", 64, False, "float32"),
    ("small", 64, True, "float32"),
    ("cifar10", 4, False, "float32"),
    ("cifar10", 4, True, "float32"),
    ("cifar10", 4, False, "bfloat16"),
    ("imagenet64", 2, False, "float32"),
    ("imagenet64", 2, True, "float32"),
    ("imagenet64", 8, True, "float32"),
]
"""Preset, images a forward pass, activation checkpointing, precision of the conditioners."""

PLANS: list[tuple[str, float]] = [("small", 0.75), ("cifar10", 1.6), ("cifar10", 2), ("cifar10", 3), ("imagenet64", 3)]
"""Preset, and GiB that its batch is planned for."""

SPEEDS: list[tuple[str, tuple[int, ...], int]] = [("small", (1, 2, 4, 8, 16), 8), ("cifar10", (1, 2, 4, 8), 3)]
"""Preset, images a forward pass, of a batch of the most, and rounds, of which the fastest counts."""


def main() -> None:
    rows = []
    for preset, images, recompute, precision in track(CASES, "cases"):
        measured = _peak(preset, images, recompute, precision, 1)
        options = {"activation_checkpointing": recompute, "conditioner_precision": precision}
        estimated = estimate(PRESETS[preset].model, PRESETS[preset].training.model_copy(update=options)).at(images)
        name = f"{preset}{', activation checkpointing' if recompute else ''}{', bfloat16' * (precision != 'float32')}"
        rows.append(
            [
                name,
                str(images),
                *(f"{size / 2**30:.2f}" for size in (estimated, measured)),
                f"{estimated / measured:.2f}",
            ]
        )
    shown = table(["model", "images", "estimated GiB", "peak GiB", "ratio"], rows)
    options = {"activation_checkpointing": True}
    recipe = PRESETS["imagenet64"].training.model_copy(update=options)
    large = estimate(PRESETS["imagenet64"].model, recipe).at(32) / 2**30
    text = f"By the estimate, imagenet64 with activation checkpointing at 32 images takes {large:.1f} GiB.\n\n"
    shown = f"{text}{shown}\n\n{_plans()}\n\n{_speeds()}"
    write_section("Memory", "make bench-memory", shown, resolve_device(None))
    print(shown)


def _peak(preset: str, images: int, recompute: bool, precision: str, passes: int) -> float:
    """Bytes of a process that trains two steps, each of so many passes, as `measure` does."""
    case = json.dumps([preset, images, recompute, precision, passes])
    child = subprocess.run(
        [sys.executable, "-c", f"from benchmarks.memory import measure; measure({case!r})"],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(child.stdout)


def _plans() -> str:
    """What is chosen for a preset's batch in so much memory, and the peak of it: all but that steps have two passes."""
    rows = []
    for preset, gib in track(PLANS, "plans"):
        model, training = PRESETS[preset].model, PRESETS[preset].training
        plan = choose(model, training, gib * 2**30, cuda=resolve_device(None).type == "cuda")
        recompute, images = bool(plan.activation_checkpointing), micro_batch(plan)
        peak = _peak(preset, images, recompute, "float32", 2) / 2**30
        chosen = [f"{images} of {training.batch_size}", "yes" if recompute else "no"]
        rows.append([preset, f"{gib:.2f}", *chosen, f"{peak:.2f}", f"{peak / gib:.2f}"])
    return table(["planned", "for GiB", "images", "computed anew", "peak GiB", "of it"], rows)


def _speeds() -> str:
    rows = []
    for preset, sizes, rounds in track(SPEEDS, "speeds"):
        found = {recompute: speeds(preset, sizes, rounds, recompute) for recompute in (False, True)}
        for images in sizes:
            rates = [found[recompute][images] for recompute in (False, True)]
            rows.append([preset, str(images), *(f"{rate:.2f}" for rate in rates)])
    return table(["model", "images a pass", "images/s", "images/s, couplings computed anew"], rows)


def speeds(preset: str, sizes: tuple[int, ...], rounds: int, recompute: bool) -> dict[int, float]:
    """Training images/s of a batch of the most images, by how many of them pass at once."""
    from flowpp.learner import Learner
    from flowpp.processes import Processes

    device, model, batch = resolve_device(None), PRESETS[preset].model, max(sizes)
    recipe = PRESETS[preset].training.model_copy(
        update={"batch_size": batch, "activation_checkpointing": recompute, "init_batch_size": LEAST_IMAGES}
    )
    learner = Learner(model, recipe, Processes(0, 1, device))
    images = torch.randint(0, model.levels, (batch, *model.image_shape), dtype=torch.uint8)
    learner.initialize(images[:LEAST_IMAGES])
    fastest = dict.fromkeys(sizes, 0.0)
    for _ in range(rounds):
        for size in sizes:
            learner.training = recipe.model_copy(update={"micro_batch_size": size})
            start = time.perf_counter()
            learner.take_step(images)
            learner.unlogged.read()  # waits for a GPU
            fastest[size] = max(fastest[size], batch / (time.perf_counter() - start))
    return fastest


def measure(case: str) -> None:
    """Prints the bytes that two steps take, in a process that does nothing else.

    Where they are of several passes, those of the recipe's initialization and an evaluation, too.
    """
    from flowpp.evaluation import evaluate
    from flowpp.learner import Learner
    from flowpp.processes import Processes

    preset, count, recompute, precision, passes = json.loads(case)
    batch = count * passes
    device = resolve_device(None)
    options = {"activation_checkpointing": recompute, "conditioner_precision": precision, "batch_size": batch}
    options["micro_batch_size"] = count
    recipe = PRESETS[preset].training.model_copy(update=options)
    model = PRESETS[preset].model
    images = torch.randint(0, model.levels, (batch, *model.image_shape), dtype=torch.uint8)
    learner = Learner(model, recipe, Processes(0, 1, device))
    if passes > 1:
        first = torch.randint(0, model.levels, (recipe.init_batch_size, *model.image_shape), dtype=torch.uint8)
        learner.initialize(first)
        evaluate(learner, first[:EVALUATION_BATCH].permute(0, 2, 3, 1).contiguous().numpy(), lambda: False)
    else:
        learner.initialize(images)
    for _ in range(2):
        learner.take_step(images)
    print(torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM"))


def resident(name: str) -> int:
    """VmRSS, the bytes of this process that are in memory, or VmHWM, the most that ever were."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
