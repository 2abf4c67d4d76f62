"""Likelihoods of image sets: batched, in nats and bits/dim, with their error."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpp.arguments import CAUSE, MOST_SEED, NotFinite, check_finite, form_of, whole
from flowpp.config import ModelConfig, Shape
from flowpp.data import BadImages, reduce_bits
from flowpp.decoration import decoration
from flowpp.durable import replace_file
from flowpp.lanes import side_by_side
from flowpp.model import FlowPP
from flowpp.precision import without_autocast
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
    """The `estimates` [N, 6] of N >= 1 images of `dimensions` channel values each, as `likelihood` gives them.

    They may be NaN or infinite, if the model has diverged: `check_finite` then raises, and the files hold null.
    """

    estimates: np.ndarray
    dimensions: int
    importance_samples: int
    seed: int
    checkpoint_sha256: str | None = None
    dataset_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.estimates.ndim != 2 or self.estimates.shape[1] != len(COLUMNS) or not len(self.estimates):
            expected = f"(N, {len(COLUMNS)}), N at least 1"
            raise ValueError(f"estimates of shape {self.estimates.shape}; expected is {expected}")

    def check_finite(self) -> None:
        """Raises `NotFinite` if an estimate is NaN or infinite; the standard error of one importance sample is NaN."""
        known = [index for index, name in enumerate(COLUMNS) if name != "standard_error" or self.importance_samples > 1]
        finite = np.isfinite(self.estimates[:, known]).all(1)
        if not finite.all():
            bad, n = int((~finite).sum()), len(finite)
            raise NotFinite(f"the log-likelihoods of {bad:,} of {n:,} images are not finite (NaN or infinite): {CAUSE}")

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

    @np.errstate(invalid="ignore")
    def summary(self) -> dict[str, Any]:
        """The content of likelihood.json; None for figures that are NaN or infinite, which JSON does not have."""
        return {
            "bits_per_dim": _finite(self.mean),
            "standard_error": _finite(self.standard_error),
            "sampling_standard_error": _finite(self.sampling_standard_error),
            "split": {name: _finite(bits) for name, bits in self.split().items()},
            "log_likelihood": _finite(float(self.log_prob.mean())),
            "num_images": len(self.log_prob),
            "dimensions": self.dimensions,
            "importance_samples": self.importance_samples,
            "effective_sample_size": _finite(float(self.column("effective_sample_size").mean())),
            "seed": self.seed,
            "checkpoint_sha256": self.checkpoint_sha256,
            "dataset_sha256": self.dataset_sha256,
        }

    def rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of likelihood.csv, one an image; standard errors are of the estimate over other noise.

        NaN and infinity become None.
        """
        per_nat = -self._in_bits(1.0)
        for name, bits, (log_prob, effective, error, *_) in zip(
            names, self.bits_per_dim.tolist(), self.estimates.tolist(), strict=True
        ):
            yield {
                "name": name,
                "log_likelihood": _finite(log_prob),
                "bits_per_dim": _finite(bits),
                "importance_samples": self.importance_samples,
                "effective_sample_size": _finite(effective),
                "log_likelihood_standard_error": _finite(error),
                "bits_per_dim_standard_error": _finite(error * per_nat),
            }

    def write(self, directory: Path, names: Sequence[str]) -> None:
        """Writes likelihood.json (the summary), likelihood.csv (a row an image) and likelihood.png (a histogram).

        The histogram shows finite log-likelihoods, and is not written if there are none.
        """
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / "likelihood.json", json.dumps(self.summary(), indent=2).encode() + b"\n")
        table = io.StringIO()
        rows = list(self.rows(names))
        writer = csv.DictWriter(table, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        replace_file(directory / "likelihood.csv", table.getvalue().encode(errors="backslashreplace"))
        finite = np.isfinite(self.log_prob)
        if finite.any():
            with decoration(directory / "likelihood.png"):
                from flowpp.plots import write_histogram

                write_histogram(replace(self, estimates=self.estimates[finite]), directory / "likelihood.png")

    def _in_bits(self, nats: Any) -> Any:
        return nats / (-math.log(2) * self.dimensions)


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None


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
    size gives the same numbers but for rounding. `first` is the index of the first image, in a part of a set.

    Raises `BadImages` for images that are not of the model's shape, and `ValueError` for numbers out of range, both
    before the first batch. Estimates of a model that has diverged are NaN or infinite.
    """
    check_images(images, model.config)
    samples, batch_size = whole("importance_samples", importance_samples, 1), whole("batch_size", batch_size, 1)
    seed, first = whole("seed", seed, 0), whole("first", first, 0)
    step = max(1, batch_size // samples)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(images), step):
            batch = images[start : start + step]
            seeds = [seed_of(seed, first + start + i) for i in range(len(batch))]
            yield estimate(model, batch, seeds, samples, batch_size)

    return batches()


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
    not grow with their number. Raises as `likelihood`.
    """
    importance_samples = whole("importance_samples", importance_samples, 1)
    batch_size = whole("batch_size", batch_size, 1)
    if len(seeds) != len(images):
        raise ValueError(f"{len(seeds):,} seeds for {len(images):,} images; each image has its own")
    device = next(model.parameters()).device
    symbols = to_symbols(images, model)
    generators = [torch.Generator(device).manual_seed(whole("seed", seed, 0, MOST_SEED)) for seed in seeds]
    log_sum = torch.full((len(images),), -math.inf, dtype=torch.float64, device=device)
    log_sum_of_squares = log_sum
    parts = torch.zeros((3, len(images)), dtype=torch.float64, device=device)
    chunk = max(1, batch_size // max(1, len(images)))
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


def bits_maps(model: FlowPP, images: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Batch for batch where the bits are spent, float32 bits [b, H, W, C], of 8-bit images, uint8 [N, H, W, C].

    As `FlowPP.bits_map`, under the noise of an image's first importance sample in `likelihood`: with one importance
    sample its sum over D is the image's bits/dim.
    """
    pairs = _with_noise(model, images, seed)
    return (model.bits_map(batch, noise).permute(0, 2, 3, 1).float().cpu().numpy() for batch, noise in pairs)


def gradients(model: FlowPP, images: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Batch for batch the gradient of log p(v), float32 nats [b, H, W, C] a channel value, of 8-bit images.

    v is the image with the dequantizer's noise, as in `bits_maps`. The gradient points to where images are likelier.
    """
    pairs = _with_noise(model, images, seed)
    return (_gradient(model, batch, noise).permute(0, 2, 3, 1).float().cpu().numpy() for batch, noise in pairs)


@torch.inference_mode(False)
def _gradient(model: FlowPP, images: Tensor, noise: Tensor) -> Tensor:
    with torch.no_grad():
        v = model.dequantize(images, noise)
    with torch.enable_grad(), without_autocast(v.device):
        (gradient,) = torch.autograd.grad(model.log_density(v.requires_grad_()).sum(), v)
    check_finite("the gradients", gradient)
    return gradient


def _with_noise(model: FlowPP, images: np.ndarray, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch for batch images and their noise. Raises `BadImages` and `ValueError` before the first batch."""
    check_images(images, model.config)
    seed = whole("seed", seed, 0)
    device = next(model.parameters()).device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(images), BATCH_SIZE):
            batch = to_symbols(images[start : start + BATCH_SIZE], model)
            seeds = (seed_of(seed, start + i) for i in range(len(batch)))
            yield batch, torch.cat([model.draw_noise(1, torch.Generator(device).manual_seed(each)) for each in seeds])

    return batches()


def to_symbols(images: np.ndarray, model: FlowPP) -> Tensor:
    """8-bit images, uint8 [b, H, W, C] -> what `FlowPP` takes, [b, C, H, W] on its device. Raises `BadImages`."""
    check_images(images, model.config)
    symbols = reduce_bits(images, model.config.bits).transpose(0, 3, 1, 2)
    # a copy, since torch warns of memory that is not to be written to, such as that of a file
    return torch.from_numpy(np.array(symbols, order="C")).to(next(model.parameters()).device)


def check_images(images: np.ndarray, config: ModelConfig) -> None:
    """Raises `BadImages` unless `images` are 8-bit images, uint8 [N, H, W, C], that fit the model."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        raise BadImages(
            "unsupported_array", f"the images are {form_of(images)}; expected is a NumPy array, uint8 [N, H, W, C]"
        )
    check_shape((images.shape[3], *images.shape[1:3]), config)


def check_shape(shape: Shape, config: ModelConfig) -> None:
    """Raises `BadImages` where images of (channels, height, width) do not fit the model."""
    if shape != config.image_shape:
        raise BadImages(
            "wrong_image_shape", f"the images are {_describe(shape)}; the model takes {_describe(config.image_shape)}"
        )


def _describe(shape: Shape) -> str:
    channels, height, width = shape
    return f"{'grey' if channels == 1 else 'RGB'}, {width} pixels wide and {height} high"
