"""Real images to measure on: CIFAR-10 of ../shared/data where it is there, else the demo's photograph patches.

A machine that is sent the repository alone may have it in shared/data, and a part of the training images is enough.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from examples import photographs

ROOT = Path(__file__).resolve().parents[1]
SHARED = next((at for at in (ROOT / "shared" / "data", ROOT.parent / "shared" / "data") if at.is_dir()), None)
TILE, COLUMNS = 32, 100
CIFAR10 = "CIFAR-10"
COUNTS = {"train_0": 10_000, "train_1": 10_000, "train_2": 10_000, "train_3": 10_000, "train_4": 9_927, "test_0": 5_000}


class RealImages(NamedTuple):
    """Two sets of images, uint8 [N, 32, 32, 3], without a common pixel, and what they are."""

    name: str
    training: np.ndarray
    test: np.ndarray


def real_images() -> RealImages:
    """CIFAR-10's mosaics, or patches of photographs."""
    there = {part: path for part in COUNTS if SHARED and (path := SHARED / f"cifar10_{part}.webp").is_file()}
    training = [_tiles(path, COUNTS[part]) for part, path in there.items() if part.startswith("train")]
    if training and "test_0" in there:
        return RealImages(CIFAR10, np.concatenate(training), _tiles(there["test_0"], COUNTS["test_0"]))
    return RealImages("photograph patches", *photographs.patches())


def _tiles(path: Path, count: int) -> np.ndarray:
    with Image.open(path) as image:
        mosaic = np.asarray(image.convert("RGB"))
    tiles = mosaic.reshape(-1, TILE, COLUMNS, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    return tiles[:count]
