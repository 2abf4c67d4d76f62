"""Likelihoods of image sets: batched, in nats and bits/dim, with their error."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpp.config import ModelConfig, Shape
from flowpp.data import BadImages, reduce_bits
from flowpp.decoration import decoration
from flowpp.durable import replace_file
from flowpp.lanes import side_by_side
from flowpp.model import FlowPP
from flowpp.seeds import seed_of

BATCH_SIZE = 64
"""Rows of a forward pass, each an image under one draw of the dequantizer."""


COLUMNS = ("log_prob", "effective_sample_size", "standard_error", "prior", "log_det", "dequantizer")
"""Of the estimates, float64 [N, 6], a row an image.

log_prob is the estimate of log P(image), in nats: with one importance sample the variational lower bound, with more
the importance-weighted one. effective_sample_size is (sum w)^2 / sum w^2 of the importance weights w, from 1 to their
number. standard_error is that of log_prob over other draws, in nats: sqrt((k / ESS - 1) / (k - 1)), by the delta
method; NaN for k = 1, which cannot tell, and at most 1, where a single weight dominates. prior, log_det and
dequantizer are means over the samples of log N(z; 0, I), the main flow's log|det| and -log q(u|x), in nats.
"""


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The `estimates` [N, 6] of N images of `dimensions` channel values each, as `likelihood` gives them."""

    estimates: np.ndarray
    dimensions: int
    importance_samples: int
    seed: int
    checkpoint_sha256: str | None = None
    dataset_sha256: str | None = None

    def column(self, name: str) -> np.ndarray:
        """One of `COLUMNS`, float64 [N]."""
        return self.estimates[:, COLUMNS.index(name)]

    @property
    def log_prob(self) -> np.ndarray:
        """In nats, float64 [N]."""
        return self.column("log_prob")

    @property
    def bits_per_dim(self) -> np.ndarray:
        """-log2 P(image) / dimensions, float64 [N]."""
        return self._in_bits(self.log_prob)

    @property
    def mean(self) -> float:
        """Mean over the images, in bits/dim."""
        return float(self.bits_per_dim.mean())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over the images, in bits/dim; none for a single image."""
        n = len(self.log_prob)
        return float(self.bits_per_dim.std(ddof=1) / math.sqrt(n)) if n > 1 else None

    @property
    def sampling_standard_error(self) -> float | None:
        """The part of it that other noise would change, in bits/dim; none for one importance sample."""
        errors = self.column("standard_error")
        if self.importance_samples == 1:
            return None
        return float(-self._in_bits(math.sqrt(np.square(errors).sum()) / len(errors)))

    def split(self) -> dict[str, float]:
        """The mean bits/dim in parts that sum to it.

        prior, log_det and dequantizer make up the variational bound; importance is what the importance weights take
        off it, and not above zero.
        """
        parts = {name: float(self._in_bits(self.column(name)).mean()) for name in ("prior", "log_det", "dequantizer")}
        return parts | {"importance": min(0.0, self.mean - sum(parts.values()))}

    def summary(self) -> dict[str, Any]:
        """What likelihood.json holds."""
        return {
            "bits_per_dim": self.mean,
            "standard_error": self.standard_error,
            "sampling_standard_error": self.sampling_standard_error,
            "split": self.split(),
            "log_likelihood": float(self.log_prob.mean()),
            "num_images": len(self.log_prob),
            "dimensions": self.dimensions,
            "importance_samples": self.importance_samples,
            "effective_sample_size": float(self.column("effective_sample_size").mean()),
            "seed": self.seed,
            "checkpoint_sha256": self.checkpoint_sha256,
            "dataset_sha256": self.dataset_sha256,
        }

    def rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What likelihood.csv holds of each image; standard errors are of the estimate over other noise."""
        per_nat = -self._in_bits(1.0)
        for name, bits, (log_prob, effective, error, *_) in zip(
            names, self.bits_per_dim.tolist(), self.estimates.tolist(), strict=True
        ):
            known = not math.isnan(error)
            yield {
                "name": name,
                "log_likelihood": log_prob,
                "bits_per_dim": bits,
                "importance_samples": self.importance_samples,
                "effective_sample_size": effective,
                "log_likelihood_standard_error": error if known else None,
                "bits_per_dim_standard_error": error * per_nat if known else None,
            }

    def write(self, directory: Path, names: Sequence[str]) -> None:
        """Writes likelihood.json (the summary), likelihood.csv (a row an image) and likelihood.png (a histogram)."""
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / "likelihood.json", json.dumps(self.summary(), indent=2).encode() + b"\n")
        table = io.StringIO()
        rows = list(self.rows(names))
        writer = csv.DictWriter(table, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        replace_file(directory / "likelihood.csv", table.getvalue().encode(errors="backslashreplace"))
        with decoration(directory / "likelihood.png"):
            from flowpp.plots import write_histogram

            write_histogram(self, directory / "likelihood.png")

    def _in_bits(self, nats: Any) -> Any:
        return nats / (-math.log(2) * self.dimensions)


def likelihood(
    model: FlowPP,
    images: np.ndarray,
    importance_samples: int = 1,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Batch for batch estimates, float64 [b, 6], of 8-bit images, uint8 [N, H, W, C], in their order.

    The dequantizer's noise is a function of (seed, index of the image, importance sample) alone: another batch
    size gives the same numbers but for rounding. `first` is the index of the first image, in a part of a set. Raises
    `BadImages` for images that are not of the model's shape.
    """
    step = max(1, batch_size // importance_samples)
    for start in range(0, len(images), step):
        batch = images[start : start + step]
        seeds = [seed_of(seed, first + start + i) for i in range(len(batch))]
        yield estimate(model, batch, seeds, importance_samples, batch_size)


@torch.no_grad()
def estimate(
    model: FlowPP,
    images: np.ndarray,
    seeds: Sequence[int],
    importance_samples: int = 1,
    batch_size: int = BATCH_SIZE,
) -> np.ndarray:
    """Estimates, float64 [b, 6], of 8-bit images, uint8 [b, H, W, C], each under the noise of its own seed.

    Importance samples pass in chunks of `batch_size` rows under a running logsumexp in float64, so that memory does
    not grow with their number.
    """
    device = next(model.parameters()).device
    symbols = to_symbols(images, model)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    log_sum = torch.full((len(images),), -math.inf, dtype=torch.float64, device=device)
    log_sum_of_squares = log_sum
    parts = torch.zeros((3, len(images)), dtype=torch.float64, device=device)
    chunk = max(1, batch_size // len(images))
    for start in range(0, importance_samples, chunk):
        samples = min(chunk, importance_samples - start)
        noise = torch.cat([model.draw_noise(1, generator) for generator in generators for _ in range(samples)])
        terms = _weight_terms(model, symbols.repeat_interleave(samples, 0), noise).unflatten(1, (-1, samples))
        log_weight = terms.sum(0)
        log_sum = torch.logaddexp(log_sum, log_weight.logsumexp(1))
        log_sum_of_squares = torch.logaddexp(log_sum_of_squares, (2 * log_weight).logsumexp(1))
        parts += terms.sum(2)
    k = importance_samples
    effective = torch.exp(2 * log_sum - log_sum_of_squares).clamp(1, k)
    error = torch.sqrt((k / effective - 1) / (k - 1)) if k > 1 else torch.full_like(effective, math.nan)
    return torch.stack([log_sum - math.log(k), effective, error, *(parts / k)], dim=1).cpu().numpy()


def _weight_terms(model: FlowPP, symbols: Tensor, noise: Tensor) -> Tensor:
    """The terms of each row's log weight, float64 [3, rows]."""

    def terms(part: slice) -> Tensor:
        return torch.stack(model.weight_terms(symbols[part], noise[part])).double()

    return torch.cat(side_by_side(terms, len(symbols), symbols.device), dim=1)


@torch.no_grad()
def bits_maps(model: FlowPP, images: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Batch for batch where the bits are spent, float32 bits [b, H, W, C], of 8-bit images, uint8 [N, H, W, C].

    As `FlowPP.bits_map`, under the noise of an image's first importance sample in `likelihood`: with one importance
    sample its sum over D is the image's bits/dim.
    """
    for batch, noise in _with_noise(model, images, seed):
        yield model.bits_map(batch, noise).permute(0, 2, 3, 1).float().cpu().numpy()


def gradients(model: FlowPP, images: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Batch for batch the gradient of log p(v), float32 nats [b, H, W, C] a channel value, of 8-bit images.

    v is the image with the dequantizer's noise, as in `bits_maps`. The gradient points to where images are likelier.
    """
    for batch, noise in _with_noise(model, images, seed):
        with torch.no_grad():
            v = model.dequantize(batch, noise)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(model.log_density(v.requires_grad_()).sum(), v)
        yield gradient.permute(0, 2, 3, 1).float().cpu().numpy()


def _with_noise(model: FlowPP, images: np.ndarray, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for start in range(0, len(images), BATCH_SIZE):
        batch = to_symbols(images[start : start + BATCH_SIZE], model)
        seeds = (seed_of(seed, start + i) for i in range(len(batch)))
        yield batch, torch.cat([model.draw_noise(1, torch.Generator(device).manual_seed(each)) for each in seeds])


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
