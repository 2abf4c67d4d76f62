"""What the recipes beyond the paper do: `small` on few images for many epochs, with and without. `make bench-recipes`.

Few images and a small model overfit within minutes, which is where flips and decay are to help; a model of the paper
on 50,000 images takes days to. Writes its section of benchmarks/RESULTS.md.
"""

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.images import real_images
from benchmarks.results import table, write_section
from flowpp.data import ImageSet, build_image_set
from flowpp.devices import resolve_device
from flowpp.presets import PRESETS, resolve_model
from flowpp.training import train

BATCH, VALIDATION, EVALUATIONS = 16, 500, 6

CONSTANT: dict[str, Any] = {"cooldown_steps": 0}
Scores = tuple[float, float, float]

RECIPES: dict[str, dict[str, Any]] = {
    "Adam, constant learning rate": CONSTANT,
    "horizontal flips": CONSTANT | {"horizontal_flips": True},
    "AdamW, decay 0.1": CONSTANT | {"weight_decay": 0.1},
    "cooldown over the last 40 %": {},
    "bfloat16 conditioners": CONSTANT | {"conditioner_precision": "bfloat16"},
    "flips, decay and cooldown": {"horizontal_flips": True, "weight_decay": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help=f"training steps of {BATCH} images")
    parser.add_argument("--images", type=int, default=500, help="images to train on")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each recipe")
    arguments = parser.parse_args()
    images = real_images()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        np.savez(
            Path(directory) / "images.npz",
            train=images.training[: arguments.images],
            validation=images.test[:VALIDATION],
        )
        image_set = build_image_set(Path(directory) / "images.npz", Path(directory) / "set")
        cases = [(name, seed) for name in RECIPES for seed in range(arguments.seeds)]
        found: dict[str, list[Scores]] = {name: [] for name in RECIPES}
        for name, seed in track(cases, "runs"):
            run = Path(directory) / f"{len(found[name])}-{name.replace(' ', '-')}"
            found[name].append(scores(image_set, run, arguments.steps, seed, RECIPES[name]))
    for name, ends in found.items():
        training, best, last = (list(column) for column in zip(*ends, strict=True))
        rows.append([name, *(f"{statistics.mean(column):.3f}" for column in (training, best, last)), spread(last)])
    epochs = arguments.steps * BATCH / arguments.images
    text = (
        f"`small` on {arguments.images} images of {images.name} for {arguments.steps} steps of {BATCH} ({epochs:.0f} "
        f"epochs), validated on {VALIDATION} others; means of {arguments.seeds} seeds, in bits/dim.\n\n"
    )
    shown = table(["recipe", "training", "validation, best", "validation, last", "half range of last"], rows)
    print(shown)
    command = " ".join(["python -m benchmarks.recipes", *sys.argv[1:]])
    write_section("Recipes beyond the paper", command, text + shown, resolve_device(None))


def scores(
    image_set: ImageSet, run: Path, steps: int, seed: int, changes: dict[str, Any]
) -> tuple[float, float, float]:
    """Training bits/dim at the end, validation bits/dim at best and at the end."""
    every = max(1, steps // EVALUATIONS)
    recipe = PRESETS["small"].training.model_copy(
        update={
            "steps": steps,
            "batch_size": BATCH,
            "seed": seed,
            "warmup_steps": steps // 12,
            "cooldown_steps": 2 * steps // 5,
            "evaluation_every": every,
            "evaluation_images": VALIDATION,
            "log_every": every,
            "checkpoint_every": steps,
            "sample_every": steps,
            **changes,
        }
    )
    model = resolve_model("small", {}, image_set.shape)
    rows = [event.metrics for event in train(run, model=model, training=recipe, images=image_set) if event.metrics]
    validation = [row["validation_bits_per_dim"] for row in rows if "validation_bits_per_dim" in row]
    return rows[-1]["train_bits_per_dim"], min(validation, default=math.nan), validation[-1]


def spread(values: list[float]) -> str:
    return f"{(max(values) - min(values)) / 2:.3f}"


if __name__ == "__main__":
    main()
