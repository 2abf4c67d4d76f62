"""What float32 does to a trained model: round trips, precision, and images as extreme as they come."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from examples import photographs
from flowpp.batches import Batches
from flowpp.config import TrainingConfig
from flowpp.learner import Learner
from flowpp.likelihood import likelihood, to_symbols
from flowpp.model import FlowPP
from flowpp.presets import PRESETS
from flowpp.processes import Processes
from flowpp.sampling import decode, encode

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    """Real images, uint8 [N, 32, 32, 3]."""
    training, validation = photographs.patches()
    return np.concatenate([validation, training])


def taught(preset: str, recipe: TrainingConfig, images: np.ndarray) -> FlowPP:
    """After the recipe's steps, its moving average."""
    batches = Batches(images, recipe, ALONE)
    learner = Learner(PRESETS[preset].model, recipe, ALONE)
    learner.initialize(to_symbols(batches.first(), learner.model))
    for _ in range(recipe.steps):
        learner.take_step(to_symbols(batches.after(learner.images_seen), learner.model))
    return learner.ema


@pytest.fixture(scope="module")
def model(patches: np.ndarray) -> FlowPP:
    """`small`, briefly trained."""
    recipe = PRESETS["small"].training.model_copy(update={"steps": 40, "warmup_steps": 5, "cooldown_steps": 10})
    return taught("small", recipe, patches)


def changed_values(model: FlowPP, images: np.ndarray) -> int:
    latents = np.concatenate(list(encode(model, images)))
    return int((np.concatenate(list(decode(model, latents))) != images).sum())


def differences(model: FlowPP, images: np.ndarray) -> np.ndarray:
    """|float32 - float64| of the same noise, bits/dim an image."""
    exact, found = deepcopy(model).double(), []
    for start in range(0, len(images), 64):
        symbols = to_symbols(images[start : start + 64], model)
        noise = model.draw_noise(len(symbols), torch.Generator().manual_seed(start))
        with torch.no_grad():
            found.append(model.log_prob(symbols, noise=noise) - exact.log_prob(symbols, noise=noise))
    return torch.cat(found).abs().numpy() / (math.log(2) * model.config.dimensions)


def test_no_pixel_changes_from_encode_to_decode(model: FlowPP, patches: np.ndarray) -> None:
    assert changed_values(model, patches[:512]) == 0


def test_float32_is_within_1e_4_bits_per_dim_of_float64_and_1e_5_in_the_mean(
    model: FlowPP, patches: np.ndarray
) -> None:
    found = differences(model, patches[:128])
    assert found.max() < 1e-4
    assert found.mean() < 1e-5


def extreme_images() -> dict[str, np.ndarray]:
    black = np.zeros((32, 32, 3), np.uint8)
    bright = black.copy()
    bright[16, 16] = 255
    rows, columns = np.indices((32, 32))
    return {
        "all black": black,
        "all white": black + np.uint8(255),
        "one bright pixel": bright,
        "checkerboard": np.repeat((255 * ((rows + columns) % 2)).astype(np.uint8)[:, :, None], 3, axis=2),
        "noise": np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8),
    }


@pytest.mark.parametrize("name", extreme_images())
def test_an_extreme_image_has_a_finite_likelihood_and_survives_the_round_trip(model: FlowPP, name: str) -> None:
    images = extreme_images()[name][None]
    for each in (model, deepcopy(model).double()):
        estimates = np.concatenate(list(likelihood(each, images, importance_samples=4)))
        assert np.isfinite(estimates).all()
        assert changed_values(each, images) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_at_six_sigma_decode_to_finite_images(model: FlowPP, dtype: torch.dtype) -> None:
    model = deepcopy(model).to(dtype)
    signs = torch.randn(4, *model.config.latent_shape, generator=torch.Generator().manual_seed(0)).sign()
    for latents in (6 * signs, 6 * torch.ones_like(signs), -6 * torch.ones_like(signs)):
        with torch.no_grad():
            v = model.decode(latents.to(dtype), continuous=True)
            assert v.isfinite().all()
            assert model.decode(latents.to(dtype)).dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_small_trained_by_its_recipe_changes_no_pixel_of_10000_images(patches: np.ndarray) -> None:
    trained = taught("small", PRESETS["small"].training, patches)
    assert len(patches) >= 10_000
    assert changed_values(trained, patches[:10_000]) == 0
    found = differences(trained, patches[:1000])
    assert found.max() < 1e-4
    assert found.mean() < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("steps", [0, 30])
def test_cifar10_changes_no_pixel_of_64_images(patches: np.ndarray, steps: int) -> None:
    recipe = TrainingConfig(steps=max(1, steps), batch_size=4, init_batch_size=32, warmup_steps=0)
    batches = Batches(patches, recipe, ALONE)
    learner = Learner(PRESETS["cifar10"].model, recipe, ALONE)
    learner.initialize(to_symbols(batches.first(), learner.model))
    for _ in range(steps):
        learner.take_step(to_symbols(batches.after(learner.images_seen), learner.model))
    model = learner.model.eval()
    assert changed_values(model, patches[:64]) == 0
    found = differences(model, patches[:16])
    assert found.max() < 1e-4
    assert found.mean() < 1e-5


@pytest.mark.gpu
def test_on_a_gpu_cifar10_changes_no_pixel_of_10000_images(patches: np.ndarray) -> None:
    recipe = TrainingConfig(steps=1, warmup_steps=0)
    learner = Learner(PRESETS["cifar10"].model, recipe, Processes(0, 1, torch.device("cuda")))
    learner.initialize(to_symbols(patches[:128], learner.model))
    assert changed_values(learner.model.eval(), patches[:10_000]) == 0
