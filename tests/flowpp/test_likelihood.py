"""Likelihoods of image sets: the model's own numbers, whatever the batches."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowpp.config import PRESETS
from flowpp.data import BadImages, ImageSet
from flowpp.likelihood import Likelihood, likelihood, log_likelihood, to_symbols
from flowpp.model import FlowPP
from flowpp.seeds import seed_of


@pytest.fixture(scope="session")
def model(finished_run: Path) -> FlowPP:
    """In float64, so that rounding does not hide what is not equal."""
    return FlowPP.load(finished_run / "checkpoints" / "step-00000020").double()


@pytest.fixture
def images(image_set: ImageSet) -> np.ndarray:
    return image_set.validation[:7]


def scored(model: FlowPP, images: np.ndarray, **arguments: int) -> np.ndarray:
    return np.concatenate(list(likelihood(model, images, **arguments)))


@pytest.mark.parametrize("importance_samples", [1, 5])
def test_the_numbers_do_not_depend_on_the_batches(model: FlowPP, images: np.ndarray, importance_samples: int) -> None:
    expected = scored(model, images, importance_samples=importance_samples)
    for batch_size in (1, 3, 12):
        found = scored(model, images, importance_samples=importance_samples, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_seed_repeats_and_another_one_does_not(model: FlowPP, images: np.ndarray) -> None:
    one = scored(model, images, seed=1)
    np.testing.assert_array_equal(scored(model, images, seed=1), one)
    assert (scored(model, images, seed=2) != one).all()


def test_equal_images_in_one_set_meet_different_noise(model: FlowPP, images: np.ndarray) -> None:
    twice = scored(model, images[[0, 0]])
    assert twice[0] != twice[1]


def test_the_bound_is_the_mean_of_weights_under_the_images_own_noise(model: FlowPP, images: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(seed_of(3, 0))
    with torch.no_grad():
        symbols = to_symbols(images[:1], model)
        weights = [model.log_weight(symbols, model.draw_noise(1, generator)).item() for _ in range(4)]
    expected = np.logaddexp.reduce(weights) - math.log(4)
    assert scored(model, images[:1], importance_samples=4, seed=3)[0] == pytest.approx(expected, rel=1e-12)


def test_rows_of_different_requests_share_a_batch_and_keep_their_numbers(model: FlowPP, images: np.ndarray) -> None:
    seeds = [seed_of(1, 0), seed_of(8, 0)]
    together = log_likelihood(model, images[:2], seeds, importance_samples=2)
    alone = [log_likelihood(model, images[i : i + 1], seeds[i : i + 1], importance_samples=2)[0] for i in range(2)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_the_bound_rises_with_samples(model: FlowPP, image_set: ImageSet) -> None:
    images = image_set.validation
    one, many = (scored(model, images, importance_samples=k).mean() for k in (1, 16))
    assert many > one


def test_images_of_another_shape_are_refused(model: FlowPP, images: np.ndarray) -> None:
    with pytest.raises(BadImages, match="4 pixels wide and 8 high; the model takes RGB, 8 pixels wide"):
        scored(model, images[:, :, :4])


def test_a_model_of_fewer_bits_sees_the_upper_ones(images: np.ndarray) -> None:
    config = PRESETS["tiny"].model.model_copy(update={"bits": 3, "height": 8, "width": 8})
    symbols = to_symbols(images, FlowPP(config))
    np.testing.assert_array_equal(symbols.numpy().transpose(0, 2, 3, 1), images // 32)


def test_bits_per_dim_mean_and_standard_error_are_those_of_the_images(tmp_path: Path) -> None:
    log_prob = np.array([-100.0, -140.0, -120.0])
    result = Likelihood(log_prob, dimensions=48, importance_samples=2, seed=0)
    bits = [100 / math.log(2) / 48, 140 / math.log(2) / 48, 120 / math.log(2) / 48]
    np.testing.assert_allclose(result.bits_per_dim, bits)
    assert result.mean == pytest.approx(bits[2])
    assert result.standard_error == pytest.approx((bits[1] - bits[2]) / math.sqrt(3))
    assert Likelihood(log_prob[:1], 48, 1, 0).standard_error is None

    result.write(tmp_path, ["a.png", "b,c.png", "\udce4.png"])
    assert json.loads((tmp_path / "likelihood.json").read_text())["bits_per_dim"] == result.mean
    with (tmp_path / "likelihood.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a.png", "b,c.png", "\\udce4.png"]
    assert [float(row["log_likelihood"]) for row in rows] == log_prob.tolist()
    with Image.open(tmp_path / "likelihood.png") as plot:
        assert plot.format == "PNG"
