"""Samples, latents and their files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flowpp.data import BadImages, ImageSet, decode_image
from flowpp.images import image_grid
from flowpp.model import FlowPP
from flowpp.presets import PRESETS
from flowpp.sampling import decode, encode, sample, sample_of_seeds, write_arrays, write_samples
from flowpp.seeds import seed_of
from flowpp.sources import read_latents


@pytest.fixture(scope="session")
def model(finished_run: Path) -> FlowPP:
    return FlowPP.load(finished_run / "checkpoints" / "step-00000020")


def drawn(model: FlowPP, n: int, **arguments: float) -> np.ndarray:
    return np.concatenate(list(sample(model, n, **arguments)))


def test_a_sample_depends_on_seed_and_index_alone(model: FlowPP) -> None:
    images = drawn(model, 10, seed=4)
    assert images.shape == (10, 8, 8, 3)
    assert images.dtype == np.uint8
    for batch_size in (1, 3):
        np.testing.assert_array_equal(drawn(model, 10, seed=4, batch_size=batch_size), images)
    np.testing.assert_array_equal(drawn(model, 4, seed=4), images[:4])
    np.testing.assert_array_equal(sample_of_seeds(model, [seed_of(4, 2)])[0], images[2])
    assert (drawn(model, 10, seed=5) != images).any(axis=(1, 2, 3)).all()


def test_temperature_zero_is_the_image_of_the_zero_latent(model: FlowPP) -> None:
    images = drawn(model, 3, temperature=0.0)
    (zero,) = decode(model, np.zeros((1, *model.config.latent_shape), np.float32))
    np.testing.assert_array_equal(images, zero.repeat(3, 0))


def test_latents_decode_to_the_images_they_encode(model: FlowPP, image_set: ImageSet) -> None:
    latents = np.concatenate(list(encode(model, image_set.images)))
    assert latents.shape == (120, *model.config.latent_shape)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(list(decode(model, latents))), image_set.images)


def test_a_model_of_fewer_bits_makes_images_of_the_whole_range(image_set: ImageSet) -> None:
    torch.manual_seed(0)
    config = PRESETS["tiny"].model.model_copy(update={"bits": 1, "height": 8, "width": 8})
    model = FlowPP(config).eval()
    model.initialize(torch.from_numpy((image_set.training[:32] >> 7).transpose(0, 3, 1, 2).copy()))
    assert set(np.unique(drawn(model, 8))) == {0, 255}


def test_a_grid_shows_every_image_in_its_place() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 1), dtype=np.uint8)
    grid = image_grid(images)
    assert grid.shape == (4, 9, 1)
    for index in range(5):
        row, column = divmod(index, 3)
        np.testing.assert_array_equal(grid[2 * row : 2 * row + 2, 3 * column : 3 * column + 3], images[index])
    assert not grid[2:, 6:].any()


def test_samples_are_written_as_grid_array_and_single_files(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    write_samples(tmp_path, images)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["images"], images)
    for index, name in enumerate(["0000.png", "0001.png", "0002.png"]):
        np.testing.assert_array_equal(decode_image((tmp_path / "png" / name).read_bytes(), name), images[index])
    assert decode_image((tmp_path / "grid.png").read_bytes(), "grid.png").shape == (8, 8, 3)


def test_only_the_models_latents_are_read(model: FlowPP, tmp_path: Path) -> None:
    shape = (2, *model.config.latent_shape)
    good = np.ones(shape, np.float32)
    path = tmp_path / "latents.npz"
    write_arrays(path, latents=good)
    np.testing.assert_array_equal(read_latents(path, model.config), good)
    bad = {
        "no array": {"images": good},
        r"\[2, 192\]": {"latents": good.reshape(2, -1)},
        "float64": {"latents": good.astype(float)},
        "not finite": {"latents": good * np.nan},
        r"\[0, ": {"latents": good[:0]},
    }
    for sentence, arrays in bad.items():
        write_arrays(path, **arrays)
        with pytest.raises(BadImages, match=sentence):
            read_latents(path, model.config)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", b"\x93NUMPY\1\0"])
def test_a_file_that_holds_no_arrays_is_refused(model: FlowPP, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "latents.npz").write_bytes(content)
    with pytest.raises(BadImages, match=r"latents\.npz: is no \.npz file"):
        read_latents(tmp_path / "latents.npz", model.config)


def test_pickled_latents_are_refused(model: FlowPP, tmp_path: Path) -> None:
    np.savez(tmp_path / "latents.npz", latents=np.array([{}], dtype=object))
    with pytest.raises(BadImages, match="is no"):
        read_latents(tmp_path / "latents.npz", model.config)
