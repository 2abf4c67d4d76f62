"""Image patches from the photographs inside scikit-image, and what PNG and WebP make of them.

    python -m examples.photographs photographs.zip

Training patches come from the left three quarters of each photograph, validation patches from the right
quarter, so that no pixel is in both. Training patches overlap (stride 8); validation patches do not overlap one
another, so that the standard error of their mean is honest. No photograph gives more than `MAX_TRAINING` or
`MAX_VALIDATION`: without this bound the retina alone, 2 megapixels, would be half of all patches.
"""

import argparse
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowpp.data import encode_png

SIZE = 32
TRAINING_STRIDE = 8
MAX_TRAINING = 2_500
MAX_VALIDATION = 64
ZIP_TRAINING = 1_000
ZIP_VALIDATION = 100


@dataclass(frozen=True)
class Photograph:
    """A file of `skimage/data`, with what the docstring of its function in `skimage.data` says of its rights."""

    name: str
    file: str
    licence: str
    source: str


# Every colour photograph in the wheel whose docstring states a licence or the public domain. Left out for want of
# one: stereo_motorcycle (states none), immunohistochemistry ("no known copyright restrictions").
PHOTOGRAPHS = (
    Photograph("astronaut", "astronaut.png", "public domain", "NASA Great Images database"),
    Photograph("chelsea", "chelsea.png", "CC0", "the photographer, Stefan van der Walt"),
    Photograph("coffee", "coffee.png", "CC0", "the photographer, Rachel Michetti; Pikolo Espresso Bar"),
    Photograph("hubble_deep_field", "hubble_deep_field.jpg", "public domain", "NASA, HubbleSite release 2012-37"),
    Photograph("retina", "retina.jpg", "CC0", "Mikael Häggström, Wikimedia Commons"),
    Photograph("rocket", "rocket.jpg", "public domain", "SpaceX Photos"),
)


def read(photograph: Photograph) -> np.ndarray:
    """The photograph, uint8 [H, W, 3]."""
    with (files("skimage") / "data" / photograph.file).open("rb") as file, Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def corners(photograph: Photograph, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Top left corners (y, x) of the training and of the validation patches, int [N, 2] each."""
    height, width = shape[:2]
    border = width * 3 // 4
    training = _grid(height, 0, border, TRAINING_STRIDE)
    validation = _grid(height, border, width, SIZE)
    random = np.random.RandomState(PHOTOGRAPHS.index(photograph))  # this class's stream is frozen for good
    return random.permutation(training)[:MAX_TRAINING], random.permutation(validation)[:MAX_VALIDATION]


def patches() -> tuple[np.ndarray, np.ndarray]:
    """Training and validation patches of all photographs in a fixed random order, uint8 [N, 32, 32, 3] each."""
    training: list[np.ndarray] = []
    validation: list[np.ndarray] = []
    for photograph in PHOTOGRAPHS:
        image = read(photograph)
        for chosen, into in zip(corners(photograph, image.shape), (training, validation), strict=True):
            into.extend(image[y : y + SIZE, x : x + SIZE] for y, x in chosen)
    random = np.random.RandomState(0)
    return random.permutation(np.stack(training)), random.permutation(np.stack(validation))


def write(path: Path) -> Path:
    """Writes an .npz with arrays `train` and `validation`, the same bytes each time."""
    training, validation = patches()
    np.savez(path, train=training, validation=validation)
    return path


def write_zip(path: Path) -> Path:
    """Writes some of the patches as PNG files in folders train/ and validation/, the same bytes each time."""
    training, validation = patches()
    with zipfile.ZipFile(path, "w") as archive:
        for folder, images in (("train", training[:ZIP_TRAINING]), ("validation", validation[:ZIP_VALIDATION])):
            for index, image in enumerate(images):
                archive.writestr(zipfile.ZipInfo(f"{folder}/{index:04}.png"), encode_png(image))
    return path


def png_bits_per_dim(images: np.ndarray) -> np.ndarray:
    """Bits a channel value of each of uint8 [N, H, W, C] as an optimised PNG file of its own, float64 [N]."""
    return _bits_per_dim(images, format="PNG", optimize=True)


def webp_bits_per_dim(images: np.ndarray) -> np.ndarray:
    """Bits a channel value of each of uint8 [N, H, W, C] as a lossless WebP file of its own, float64 [N].

    At the default effort, which makes these patches smaller than the highest does.
    """
    return _bits_per_dim(images, format="WEBP", lossless=True)


def _grid(height: int, left: int, right: int, stride: int) -> np.ndarray:
    """Corners of the patches that lie wholly inside the columns left..right-1, int [N, 2]."""
    rows = range(0, height - SIZE + 1, stride)
    columns = range(left, right - SIZE + 1, stride)
    return np.array([(y, x) for y in rows for x in columns])


def _bits_per_dim(images: np.ndarray, **save: Any) -> np.ndarray:
    return np.array([8 * len(_file(image, **save)) / image.size for image in images])


def _file(image: np.ndarray, **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **save)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write some of the patches as a zip of PNG files.")
    parser.add_argument("path", type=Path)
    write_zip(parser.parse_args().path)
