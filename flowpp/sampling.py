"""Samples of a model, its latents and what they decode to, batch for batch, and their files."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from flowpp.arguments import MOST_SEED, form_of, real, whole
from flowpp.data import encode_png, expand_bits
from flowpp.decoration import decoration
from flowpp.durable import replace_file
from flowpp.images import image_grid
from flowpp.lanes import side_by_side
from flowpp.likelihood import BATCH_SIZE, check_images, to_symbols
from flowpp.model import FlowPP
from flowpp.seeds import seed_of


def sample(
    model: FlowPP, n: int, temperature: float = 1.0, seed: int = 0, batch_size: int = BATCH_SIZE
) -> Iterator[np.ndarray]:
    """n samples batch for batch, uint8 [b, H, W, C] with values from 0 to 255.

    A sample's latent is a function of (seed, index of the sample) alone, times the temperature. Raises `ValueError` for
    numbers out of range before the first batch, and `NotFinite` for a model that has diverged.
    """
    n, batch_size = whole("n", n, 0), whole("batch_size", batch_size, 1)
    seed, temperature = whole("seed", seed, 0), real("temperature", temperature, 0)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, n, batch_size):
            indices = range(start, min(start + batch_size, n))
            yield sample_of_seeds(model, [seed_of(seed, index) for index in indices], temperature)

    return batches()


def sample_of_seeds(model: FlowPP, seeds: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """A sample for each seed, uint8 [b, H, W, C], in one pass."""
    return images_of_latents(model, temperature * torch.cat([latent_of_seed(model, seed) for seed in seeds]))


def latent_of_seed(model: FlowPP, seed: int) -> torch.Tensor:
    """A latent of the prior, [1, *latent_shape]."""
    parameter = model.parameter
    generator = torch.Generator(parameter.device).manual_seed(whole("seed", seed, 0, MOST_SEED))
    shape = (1, *model.config.latent_shape)
    return torch.randn(shape, generator=generator, dtype=parameter.dtype, device=parameter.device)


def images_of_latents(model: FlowPP, latents: torch.Tensor) -> np.ndarray:
    """8-bit images, uint8 [b, H, W, C], of latents [b, *latent_shape], in one pass."""
    parts = side_by_side(lambda part: model.decode(latents[part]), len(latents), latents.device)
    return _to_images(torch.cat(parts), model)


def interpolate(first: torch.Tensor, second: torch.Tensor, part: float) -> torch.Tensor:
    """The latent a part from 0 to 1 of the way from `first` to `second`, of their shape.

    Along the great circle between them, their lengths interpolated linearly: typical latents of a normal prior all
    have nearly one length, of which a straight line would fall short. At 0 and 1 it is the end itself.
    """
    if part in (0, 1):
        return second if part else first
    lengths = first.norm(), second.norm()
    one, two = first / lengths[0], second / lengths[1]
    angle = torch.arccos((one * two).sum().clamp(-1, 1))
    if angle < 1e-3:  # the sines vanish, and the chord is the arc
        direction = (1 - part) * one + part * two
    else:
        direction = (torch.sin((1 - part) * angle) * one + torch.sin(part * angle) * two) / torch.sin(angle)
    return ((1 - part) * lengths[0] + part * lengths[1]) * direction


def interpolation(model: FlowPP, ends: np.ndarray, n: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Batch for batch n >= 2 images, uint8 [b, H, W, C], on the way between two, uint8 [2, H, W, C].

    The first and the last are the two images, as `encode` and `interpolate` lead from one to the other. Raises
    `ValueError` for other arguments.
    """
    n, seed = whole("n", n, 2), whole("seed", seed, 0)
    check_images(ends, model.config)
    if len(ends) != 2:
        raise ValueError(f"{len(ends):,} images; an interpolation is between two")
    first, second = latents_of_ends(model, ends, seed)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, n, BATCH_SIZE):
            parts = [index / (n - 1) for index in range(start, min(start + BATCH_SIZE, n))]
            yield images_of_latents(model, torch.cat([interpolate(first, second, part) for part in parts]))

    return batches()


def latents_of_ends(model: FlowPP, ends: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents [1, *latent_shape] of two images, uint8 [2, H, W, C], both under the same noise.

    Noise of their own would be a difference that is none of the images'.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed_of(seed, 0))
    noise = model.draw_noise(1, generator).expand(2, -1, -1, -1)
    first, second = model.encode(to_symbols(ends, model), noise=noise).split(1)
    return first, second


def encode(model: FlowPP, images: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Batch for batch latents, float32 [b, *latent_shape], of 8-bit images, uint8 [N, H, W, C].

    The dequantizer's noise comes from `seed`; what the latents decode to does not depend on it. Raises `BadImages` and
    `ValueError` for other arguments, and `NotFinite` for a model that has diverged.
    """
    check_images(images, model.config)
    seed = whole("seed", seed, 0)
    device = next(model.parameters()).device

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(images), BATCH_SIZE):
            generator = torch.Generator(device).manual_seed(seed_of(seed, start))
            latents = model.encode(to_symbols(images[start : start + BATCH_SIZE], model), generator)
            yield latents.float().cpu().numpy()

    return batches()


def decode(model: FlowPP, latents: np.ndarray) -> Iterator[np.ndarray]:
    """Batch for batch images, uint8 [b, H, W, C] with values from 0 to 255, of latents, float [N, *latent_shape].

    Raises `ValueError` for other arrays before the first batch, and `NotFinite` for latents and images that are NaN or
    infinite.
    """
    shape = model.config.latent_shape
    if not isinstance(latents, np.ndarray) or latents.dtype.kind != "f" or latents.shape[1:] != shape:
        expected = f"a NumPy array, floating-point [N, {', '.join(map(str, shape))}]"
        raise ValueError(f"the latents are {form_of(latents)}; expected is {expected}")
    parameter = model.parameter
    # torch has no long double and no foreign byte order
    dtype = np.float64 if parameter.dtype == torch.float64 else np.float32

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(latents), BATCH_SIZE):
            batch = np.array(latents[start : start + BATCH_SIZE], dtype, order="C")
            yield images_of_latents(model, torch.from_numpy(batch).to(parameter.device))

    return batches()


GRID_IMAGES = 400
"""Images in grid.png, at the most."""


def write_samples(directory: Path, images: np.ndarray) -> None:
    """Writes images, uint8 [N, H, W, C]: samples.npz (`images`), png/0000.png, ... and grid.png (the first 400)."""
    write_arrays(directory / "samples.npz", images=images)
    (directory / "png").mkdir(exist_ok=True)
    for index, image in enumerate(images):
        (directory / "png" / f"{index:04d}.png").write_bytes(encode_png(image))
    with decoration(directory / "grid.png"):
        replace_file(directory / "grid.png", encode_png(image_grid(images[:GRID_IMAGES])))


def write_bits_map(directory: Path, images: np.ndarray, bits: np.ndarray, names: Sequence[str]) -> None:
    """Writes bits_map.npz (`bits`, float32 [N, H, W, C], and `names`) and bits_map.png (bits a pixel, the first 16)."""
    write_arrays(directory / "bits_map.npz", bits=bits, names=np.array(names))
    _draw_maps(directory / "bits_map.png", images, bits.sum(3), names, "bits a pixel")


def write_gradients(directory: Path, images: np.ndarray, gradients: np.ndarray, names: Sequence[str]) -> None:
    """Writes gradient.npz (`gradient`, float32 [N, H, W, C] nats a channel value, and `names`) and gradient.png."""
    write_arrays(directory / "gradient.npz", gradient=gradients, names=np.array(names))
    magnitude = np.linalg.norm(gradients, axis=3)
    _draw_maps(directory / "gradient.png", images, magnitude, names, "|gradient|, nats a channel value")


def _draw_maps(path: Path, images: np.ndarray, maps: np.ndarray, names: Sequence[str], label: str) -> None:
    """Draws images, uint8 [N, H, W, C], above their maps, float [N, H, W]; a failure costs the drawing alone."""
    with decoration(path):
        from flowpp.plots import write_maps

        write_maps(images, maps, names, label, path)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes a compressed .npz, whole or not at all."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def _to_images(symbols: torch.Tensor, model: FlowPP) -> np.ndarray:
    """[b, C, H, W] in 0..levels-1 -> 8-bit [b, H, W, C]."""
    return expand_bits(symbols.cpu().numpy().transpose(0, 2, 3, 1), model.config.bits)
