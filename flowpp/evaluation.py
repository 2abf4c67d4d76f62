"""What a run looks at every so often: validation bits/dim and samples of its average weights, unless it is to stop."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from flowpp.arguments import NotFinite
from flowpp.learner import Learner, NonFiniteLoss
from flowpp.likelihood import COLUMNS, Likelihood, likelihood
from flowpp.memory import EVALUATION_BATCH
from flowpp.sampling import sample
from flowpp.seeds import Stream, seed_of

SAMPLES, SAMPLES_BATCH = 16, 4


def spread(images: np.ndarray, most: int) -> np.ndarray:
    """At most `most` images, evenly spaced: neighbours in a set are often alike."""
    n = min(most, len(images))
    return images[np.arange(n) * len(images) // max(n, 1)]


@dataclass(frozen=True)
class Looked:
    """What a look came to: `metrics`, and the bits/dim of the validation images at 0, 1, ..., 100 %, where scored."""

    metrics: dict[str, float]
    validation_quantiles: list[float] | None = None


def evaluate(learner: Learner, images: np.ndarray, stop: Callable[[], bool]) -> Looked | None:
    """Of uint8 validation images [N, H, W, C], under noise that is the same each time; none where stopped.

    Each process scores its share of the images. Raises `NonFiniteLoss`.
    """
    processes, seed = learner.processes, learner.training.seed
    share = processes.share(len(images))
    estimates = np.zeros((len(images), len(COLUMNS)))
    most = -(-len(images) // processes.size)
    for start in range(0, most, EVALUATION_BATCH):  # as many rounds in each process, for they agree in each
        if processes.any(stop()):
            return None
        rows = slice(share.start + start, min(share.stop, share.start + start + EVALUATION_BATCH))
        if rows.start < rows.stop:
            scored = likelihood(
                learner.ema,
                images[rows],
                seed=seed_of(seed, Stream.VALIDATION),
                first=rows.start,
                batch_size=EVALUATION_BATCH,
            )
            estimates[rows] = np.concatenate(list(scored))
    estimates = processes.sum(torch.from_numpy(estimates).to(processes.device)).cpu().numpy()
    scores = Likelihood(estimates, learner.ema.config.dimensions, importance_samples=1, seed=seed)
    metrics = {"validation_bits_per_dim": scores.mean}
    if scores.standard_error is not None:
        metrics["validation_standard_error"] = scores.standard_error
    if not np.isfinite(list(metrics.values())).all():
        message = f"at step {learner.step} the validation images had {scores.mean:.4g} bits/dim"
        raise NonFiniteLoss(learner.step, message)
    return Looked(metrics, np.quantile(scores.bits_per_dim, np.linspace(0, 1, 101)).tolist())


def draw_samples(learner: Learner, stop: Callable[[], bool]) -> np.ndarray | None:
    """16 samples, always of the same latents, uint8 [16, H, W, C]. Returns None if the run stops.

    The leader draws them, and the others return 0 of them. The leader also returns 0 if they are not finite: a model
    can have finite bits/dim, and latents that it cannot decode.
    """
    channels, height, width = learner.ema.config.image_shape
    drawn = [np.zeros((0, height, width, channels), np.uint8)]
    if learner.processes.leader:
        seed = seed_of(learner.training.seed, Stream.SAMPLES)
        try:
            for batch in sample(learner.ema, SAMPLES, seed=seed, batch_size=SAMPLES_BATCH):
                drawn.append(batch)
                if stop():
                    break
        except NotFinite:
            del drawn[1:]
    return None if learner.processes.any(stop()) else np.concatenate(drawn)
