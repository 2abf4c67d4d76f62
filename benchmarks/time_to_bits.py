"""How long training takes to bits/dim: seconds and images until the mean over a window of images is low enough."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.contenders import learner_of, to_tensor
from benchmarks.images import RealImages
from benchmarks.results import table
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.learner import Learner, NonFiniteLoss, Sums
from flowpp.likelihood import Likelihood, likelihood


class Point(NamedTuple):
    """Where a run stands: seconds spent on its steps, images seen, and bits/dim by the window and by validation."""

    seconds: float
    images: int
    training: float
    validation: float


class Run(NamedTuple):
    """The points of a run, a window of images each, and why it ended before its time, if it did."""

    points: list[Point]
    failure: str | None = None

    def first(self, measure: str, target: float) -> Point | None:
        """Where `training` or `validation` first came down to the target."""
        return next((point for point in self.points if getattr(point, measure) <= target), None)


def train_to(
    targets: Sequence[float],
    model: ModelConfig,
    recipe: TrainingConfig,
    images: RealImages,
    device: torch.device,
    *,
    window: int,
    seconds: float,
) -> Run:
    """Trains until both measures have reached all targets, or `seconds` are over; `window` in images.

    The clock counts the steps, with whatever is compiled in the first of them; neither initialization nor validation.
    The images lie on the device, in a new order each epoch.
    """
    begin = time.perf_counter()
    learner = learner_of(model, recipe, device, to_tensor(images.training[: recipe.init_batch_size]))
    data = to_tensor(images.training).to(device)
    order = torch.Generator(device).manual_seed(recipe.seed)
    points: list[Point] = []
    spent, waiting = 0.0, torch.empty(0, dtype=torch.long, device=device)
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        try:
            for _ in range(max(1, window // recipe.batch_size)):
                if len(waiting) < recipe.batch_size:
                    waiting = torch.randperm(len(data), generator=order, device=device)
                learner.take_step(data[waiting[: recipe.batch_size]])
                waiting = waiting[recipe.batch_size :]
            training = learner.unlogged.means().get("train_bits_per_dim", math.nan)  # waits for the device
        except NonFiniteLoss as error:
            return Run(points, str(error))
        spent += time.perf_counter() - start
        learner.unlogged = Sums(learner.processes)
        points.append(Point(spent, learner.images_seen, training, validation(learner, images.test)))
        if max(training, points[-1].validation) <= min(targets):
            break
    return Run(points)


def validation(learner: Learner, images: np.ndarray) -> float:
    """Mean bits/dim of the moving average on images, uint8 [N, H, W, C]."""
    estimates = np.concatenate(list(likelihood(learner.ema, images)))
    return Likelihood(estimates, learner.model.config.dimensions, 1, 0).mean


def report(run: Run, targets: Sequence[float]) -> str:
    """A table of what was reached when, and where the run ended."""
    rows = []
    for target in targets:
        for measure in ("training", "validation"):
            point = run.first(measure, target)
            reached = [f"{point.seconds:.0f}", f"{point.images:,}"] if point else ["not reached", ""]
            rows.append([f"{target:g}, {measure}", *reached])
    text = table(["bits/dim", "seconds", "images"], rows)
    if run.points:
        last = run.points[-1]
        text += (
            f"\n\nAt the end, after {last.seconds:.0f} s and {last.images:,} images: {last.training:.3f} bits/dim in "
            f"training, {last.validation:.3f} on held-out images."
        )
    return text + (f"\n\nThe run ended early: {run.failure}." if run.failure else "")
