"""Samples of a model, its latents and what they decode to, batch for batch, and their files."""

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from flowpp.data import encode_png, expand_bits
from flowpp.durable import replace_file
from flowpp.likelihood import BATCH_SIZE, to_symbols
from flowpp.model import FlowPP
from flowpp.seeds import seed_of


def sample(
    model: FlowPP, n: int, temperature: float = 1.0, seed: int = 0, batch_size: int = BATCH_SIZE
) -> Iterator[np.ndarray]:
    """n samples batch for batch, uint8 [b, H, W, C] with values from 0 to 255.

    A sample's latent is a function of (seed, index of the sample) alone, times the temperature.
    """
    for start in range(0, n, batch_size):
        indices = range(start, min(start + batch_size, n))
        yield sample_of_seeds(model, [seed_of(seed, index) for index in indices], temperature)


def sample_of_seeds(model: FlowPP, seeds: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """A sample for each seed, uint8 [b, H, W, C], in one pass."""
    parameter = next(model.parameters())
    shape = (1, *model.config.latent_shape)
    latents = [
        torch.randn(
            shape,
            generator=torch.Generator(parameter.device).manual_seed(seed),
            dtype=parameter.dtype,
            device=parameter.device,
        )
        for seed in seeds
    ]
    return _to_images(model.decode(temperature * torch.cat(latents)), model)


def encode(model: FlowPP, images: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Batch for batch latents, float32 [b, *latent_shape], of 8-bit images, uint8 [N, H, W, C].

    The dequantizer's noise comes from `seed`; what the latents decode to does not depend on it.
    """
    device = next(model.parameters()).device
    for start in range(0, len(images), BATCH_SIZE):
        generator = torch.Generator(device).manual_seed(seed_of(seed, start))
        latents = model.encode(to_symbols(images[start : start + BATCH_SIZE], model), generator)
        yield latents.float().cpu().numpy()


def decode(model: FlowPP, latents: np.ndarray) -> Iterator[np.ndarray]:
    """Batch for batch images, uint8 [b, H, W, C] with values from 0 to 255, of latents, float [N, *latent_shape]."""
    parameter = next(model.parameters())
    for start in range(0, len(latents), BATCH_SIZE):
        batch = torch.from_numpy(np.ascontiguousarray(latents[start : start + BATCH_SIZE])).to(parameter)
        yield _to_images(model.decode(batch), model)


def image_grid(images: np.ndarray) -> np.ndarray:
    """Images, uint8 [N, H, W, C], in one of uint8 [rows * H, columns * W, C], nearly square; empty places black."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:n] = images
    return grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, -1, channels)


GRID_IMAGES = 400
"""Images in grid.png, at the most."""


def write_samples(directory: Path, images: np.ndarray) -> None:
    """Writes images, uint8 [N, H, W, C]: grid.png (the first 400), samples.npz (`images`) and png/0000.png, ..."""
    (directory / "png").mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        (directory / "png" / f"{index:04d}.png").write_bytes(encode_png(image))
    replace_file(directory / "grid.png", encode_png(image_grid(images[:GRID_IMAGES])))
    write_arrays(directory / "samples.npz", images=images)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes a compressed .npz, whole or not at all."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def _to_images(symbols: torch.Tensor, model: FlowPP) -> np.ndarray:
    """[b, C, H, W] in 0..levels-1 -> 8-bit [b, H, W, C]."""
    return expand_bits(symbols.cpu().numpy().transpose(0, 2, 3, 1), model.config.bits)
