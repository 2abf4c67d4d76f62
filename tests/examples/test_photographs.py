"""The demo's images: rights, separation, determinism, and the codecs they are measured against."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from examples import photographs
from examples.photographs import (
    MAX_TRAINING,
    MAX_VALIDATION,
    PHOTOGRAPHS,
    SIZE,
    ZIP_TRAINING,
    ZIP_VALIDATION,
    Photograph,
)
from flowpp.data import build_image_set


def covered(corners: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How many of the patches at `corners` cover each pixel, int [H, W]."""
    count = np.zeros(shape[:2], int)
    for y, x in corners:
        count[y : y + SIZE, x : x + SIZE] += 1
    return count


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.name)
def test_no_pixel_is_in_a_training_and_a_validation_patch(photograph: Photograph) -> None:
    shape = photographs.read(photograph).shape
    training, validation = (covered(corners, shape) for corners in photographs.corners(photograph, shape))
    assert not np.any((training > 0) & (validation > 0))
    assert training[:, shape[1] * 3 // 4 :].sum() == 0
    assert validation.max() == 1, "validation patches overlap one another"
    assert training.sum() > 0


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.name)
def test_the_installed_docstring_states_the_licence(photograph: Photograph) -> None:
    stated = " ".join((getattr(data, photograph.name).__doc__ or "").split())
    evidence = {"CC0": ["CC0"], "public domain": ["in the public domain", "into the public domain"]}
    assert any(words in stated for words in evidence[photograph.licence]), stated
    assert photograph.source


def test_patches_are_deterministic_and_no_photograph_dominates(tmp_path: Path) -> None:
    digests = {
        hashlib.sha256(photographs.write(tmp_path / name).read_bytes()).hexdigest() for name in ("a.npz", "b.npz")
    }
    assert len(digests) == 1
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["train", "validation"]
        for name, most in (("train", MAX_TRAINING), ("validation", MAX_VALIDATION)):
            assert arrays[name].dtype == np.uint8
            assert arrays[name].shape[1:] == (SIZE, SIZE, 3)
            assert len(PHOTOGRAPHS) * most / 2 < len(arrays[name]) <= len(PHOTOGRAPHS) * most


def test_the_zip_holds_patches_of_the_npz_and_keeps_the_split(tmp_path: Path) -> None:
    training, validation = photographs.patches()
    images = build_image_set(photographs.write_zip(tmp_path / "a.zip"), tmp_path / "set")
    assert (images.num_images, images.num_validation) == (ZIP_TRAINING + ZIP_VALIDATION, ZIP_VALIDATION)
    assert np.array_equal(images.training, training[:ZIP_TRAINING])
    assert np.array_equal(images.validation, validation[:ZIP_VALIDATION])


def test_codecs_are_lossless_and_their_bits_are_those_of_the_files() -> None:
    images = photographs.patches()[1][:8]
    for bits, save in (
        (photographs.png_bits_per_dim(images), {"format": "PNG", "optimize": True}),
        (photographs.webp_bits_per_dim(images), {"format": "WEBP", "lossless": True}),
    ):
        for image, value in zip(images, bits, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, **save)
            assert value == len(buffer.getvalue()) * 8 / (SIZE * SIZE * 3)
            assert np.array_equal(np.asarray(Image.open(buffer).convert("RGB")), image)


def test_a_flat_image_costs_a_codec_less_than_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    for bits_per_dim in (photographs.png_bits_per_dim, photographs.webp_bits_per_dim):
        assert bits_per_dim(np.zeros_like(noise))[0] < 0.5
        assert bits_per_dim(noise)[0] > 8
