"""How far the memory estimate, by which jobs are admitted, is from the peak of a process: `make bench-memory`.

Each case trains two steps in a process of its own, on a CPU or, where there is one, a
GPU. On a CPU the peak is that of the resident set, less what it was before the model was made.
"""

import json
import subprocess
import sys

import torch
from rich.progress import track

from benchmarks.results import table, write_section
from flowpp.devices import resolve_device
from flowpp.memory import estimate
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


def main() -> None:
    rows = []
    for preset, images, recompute, precision in track(CASES, "cases"):
        case = json.dumps([preset, images, recompute, precision])
        child = subprocess.run(
            [sys.executable, "-c", f"from benchmarks.memory import measure; measure({case!r})"],
            check=True,
            capture_output=True,
            text=True,
        )
        measured = float(child.stdout)
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
    write_section("Memory", "make bench-memory", text + shown, resolve_device(None))
    print(shown)


def measure(case: str) -> None:
    """Prints the bytes that two steps take, in a process that has done nothing else."""
    from flowpp.learner import Learner
    from flowpp.processes import Processes

    preset, count, recompute, precision = json.loads(case)
    device = resolve_device(None)
    options = {"activation_checkpointing": recompute, "conditioner_precision": precision, "batch_size": count}
    recipe = PRESETS[preset].training.model_copy(update=options)
    model = PRESETS[preset].model
    images = torch.randint(0, model.levels, (count, *model.image_shape), dtype=torch.uint8)
    torch.nn.functional.conv2d(torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3))  # what libraries allocate at first use
    before = resident("VmRSS")
    learner = Learner(model, recipe, Processes(0, 1, device))
    learner.initialize(images)
    for _ in range(2):
        learner.take_step(images)
    print(torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before)


def resident(name: str) -> int:
    """VmRSS, the bytes of this process that are in memory, or VmHWM, the most that ever were."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
