"""Likelihoods of image sets: batched, in nats and bits/dim, with their error."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowpp.config import ModelConfig, Shape
from flowpp.data import BadImages, reduce_bits
from flowpp.durable import replace_file
from flowpp.model import FlowPP
from flowpp.seeds import seed_of

BATCH_SIZE = 64
"""Rows of a forward pass, each an image under one draw of the dequantizer."""


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Estimated log P(image) in nats, float64 [N], of images of `dimensions` channel values each.

    With one importance sample it is the variational lower bound, with more the importance-weighted one.
    """

    log_prob: np.ndarray
    dimensions: int
    importance_samples: int
    seed: int

    @property
    def bits_per_dim(self) -> np.ndarray:
        """-log2 P(image) / dimensions, float64 [N]."""
        return self.log_prob / (-math.log(2) * self.dimensions)

    @property
    def mean(self) -> float:
        """Mean over the images, in bits/dim."""
        return float(self.bits_per_dim.mean())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over the images, in bits/dim; none for a single image."""
        n = len(self.log_prob)
        return float(self.bits_per_dim.std(ddof=1) / math.sqrt(n)) if n > 1 else None

    def summary(self) -> dict[str, float | int | None]:
        """What likelihood.json holds."""
        return {
            "bits_per_dim": self.mean,
            "standard_error": self.standard_error,
            "log_likelihood": float(self.log_prob.mean()),
            "num_images": len(self.log_prob),
            "dimensions": self.dimensions,
            "importance_samples": self.importance_samples,
            "seed": self.seed,
        }

    def write(self, directory: Path, names: Sequence[str]) -> None:
        """Writes likelihood.json (the summary), likelihood.csv (a row an image) and likelihood.png (a histogram)."""
        from flowpp.plots import write_histogram

        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / "likelihood.json", json.dumps(self.summary(), indent=2).encode() + b"\n")
        replace_file(directory / "likelihood.csv", self._csv(names))
        write_histogram(self, directory / "likelihood.png")

    def _csv(self, names: Sequence[str]) -> bytes:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["name", "log_likelihood", "bits_per_dim"])
        writer.writerows(zip(names, self.log_prob.tolist(), self.bits_per_dim.tolist(), strict=True))
        return table.getvalue().encode(errors="backslashreplace")


def likelihood(
    model: FlowPP, images: np.ndarray, importance_samples: int = 1, batch_size: int = BATCH_SIZE, seed: int = 0
) -> Iterator[np.ndarray]:
    """Batch for batch log P in nats, float64 [b], of 8-bit images, uint8 [N, H, W, C], in their order.

    The dequantizer's noise is a function of (seed, index of the image, importance sample) alone: another batch
    size gives the same numbers but for rounding. Raises `BadImages` for images that are not of the model's shape.
    """
    step = max(1, batch_size // importance_samples)
    for start in range(0, len(images), step):
        batch = images[start : start + step]
        seeds = [seed_of(seed, start + i) for i in range(len(batch))]
        yield log_likelihood(model, batch, seeds, importance_samples, batch_size)


@torch.no_grad()
def log_likelihood(
    model: FlowPP,
    images: np.ndarray,
    seeds: Sequence[int],
    importance_samples: int = 1,
    batch_size: int = BATCH_SIZE,
) -> np.ndarray:
    """log P in nats, float64 [b], of 8-bit images, uint8 [b, H, W, C], each under the noise of its own seed.

    Importance samples pass in chunks, so that memory does not grow with their number.
    """
    device = next(model.parameters()).device
    symbols = to_symbols(images, model)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    total = torch.full((len(images),), -math.inf, dtype=torch.float64, device=device)
    chunk = max(1, batch_size // len(images))
    for start in range(0, importance_samples, chunk):
        samples = min(chunk, importance_samples - start)
        noise = torch.cat([model.draw_noise(1, generator) for generator in generators for _ in range(samples)])
        log_weight = model.log_weight(symbols.repeat_interleave(samples, 0), noise).double()
        total = torch.logaddexp(total, log_weight.unflatten(0, (-1, samples)).logsumexp(1))
    return (total - math.log(importance_samples)).cpu().numpy()


def to_symbols(images: np.ndarray, model: FlowPP) -> Tensor:
    """8-bit images, uint8 [b, H, W, C] -> what `FlowPP` takes, [b, C, H, W] on its device. Raises `BadImages`."""
    check_shape((images.shape[3], *images.shape[1:3]), model.config)
    symbols = reduce_bits(images, model.config.bits).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(symbols)).to(next(model.parameters()).device)


def check_shape(shape: Shape, config: ModelConfig) -> None:
    """Raises `BadImages` where images of (channels, height, width) do not fit the model."""
    if shape != config.image_shape:
        raise BadImages(
            "wrong_image_shape", f"the images are {_describe(shape)}; the model takes {_describe(config.image_shape)}"
        )


def _describe(shape: Shape) -> str:
    channels, height, width = shape
    return f"{'grey' if channels == 1 else 'RGB'}, {width} pixels wide and {height} high"
