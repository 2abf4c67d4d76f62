"""Real images: CIFAR-10's mosaics where they are, and photographs where not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import images


def write_mosaic(directory: Path, part: str, seed: int) -> np.ndarray:
    """Writes a mosaic of one row of tiles, which are returned, uint8 [100, 32, 32, 3]."""
    tiles = np.random.default_rng(seed).integers(0, 256, (images.COLUMNS, 32, 32, 3), np.uint8)
    mosaic = tiles.transpose(1, 0, 2, 3).reshape(32, -1, 3)
    Image.fromarray(mosaic).save(directory / f"cifar10_{part}.webp", lossless=True, method=0)
    return tiles


def test_the_training_images_are_those_of_the_parts_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {part: write_mosaic(tmp_path, part, seed) for seed, part in enumerate(("train_1", "train_4", "test_0"))}
    monkeypatch.setattr(images, "SHARED", tmp_path)
    found = images.real_images()
    assert found.name == "CIFAR-10"
    assert np.array_equal(found.training, np.concatenate([parts["train_1"], parts["train_4"]]))
    assert np.array_equal(found.test, parts["test_0"])


@pytest.mark.parametrize("part", ["train_0", "test_0"])
def test_one_kind_of_images_alone_is_not_enough(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mosaic(tmp_path, part, 0)
    monkeypatch.setattr(images, "SHARED", tmp_path)
    assert images.real_images().name == "photograph patches"


def test_without_a_shared_directory_there_are_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SHARED", None)
    found = images.real_images()
    assert found.name == "photograph patches"
    assert found.training.shape[1:] == found.test.shape[1:] == (32, 32, 3)
