"""Real images to measure on: CIFAR-10 of ../shared/data where it is there, else the demo's photograph patches."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from examples import photographs

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TILE, COLUMNS = 32, 100
COUNTS = {"train_0": 10_000, "train_1": 10_000, "train_2": 10_000, "train_3": 10_000, "train_4": 9_927, "test_0": 5_000}


class RealImages(NamedTuple):
    """Two sets of images, uint8 [N, 32, 32, 3], without a common pixel, and what they are."""

    name: str
    training: np.ndarray
    test: np.ndarray


def real_images() -> RealImages:
    """CIFAR-10's mosaics, or patches of photographs."""
    if (SHARED / "cifar10_test_0.webp").is_file():
        parts = [_tiles(part) for part in COUNTS if part.startswith("train")]
        return RealImages("CIFAR-10", np.concatenate(parts), _tiles("test_0"))
    training, test = photographs.patches()
    return RealImages("photograph patches", training, test)


def _tiles(part: str) -> np.ndarray:
    with Image.open(SHARED / f"cifar10_{part}.webp") as image:
        mosaic = np.asarray(image.convert("RGB"))
    tiles = mosaic.reshape(-1, TILE, COLUMNS, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    return tiles[: COUNTS[part]]
