"""The density and the probabilities a model assigns, against brute-force integration."""

import itertools

import pytest
import torch
from torch import Tensor

from flowpp.config import DequantizerConfig, ModelConfig
from flowpp.dequantization import normal_log_prob
from flowpp.model import FlowPP


def two_pixel_model(bits: int) -> FlowPP:
    """A grey model of 1 x 2 pixels in float64, initialized on images of its own bits and then moved."""
    torch.manual_seed(bits)
    dequantizer = DequantizerConfig(flow=("columns x1",), blocks=1, context_filters=2, context_blocks=1)
    config = ModelConfig(
        height=1, width=2, channels=1, bits=bits, filters=4, blocks=1, components=3, heads=2, dropout=0,
        flow=("columns x2",), dequantizer=dequantizer,
    )  # fmt: skip
    model = FlowPP(config).double().eval()
    model.initialize(torch.randint(0, config.levels, (256, 1, 1, 2), dtype=torch.uint8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))
    return model


@torch.no_grad()
def densities(model: FlowPP, low: Tensor, high: Tensor, points: int) -> tuple[Tensor, float]:
    """p(v) at the midpoints of a points x points grid over [low, high]^2, and a grid cell's area."""
    edges = low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    v = torch.cartesian_prod(edges, edges).reshape(-1, 1, 1, 2)
    z, log_det = model.flow(v)
    return (normal_log_prob(z) + log_det).exp(), float((high - low) / points) ** 2


def mass(model: FlowPP, low: float, high: float, points: int = 400) -> float:
    p, area = densities(model, *torch.tensor([low, high], dtype=torch.float64), points)
    return float(p.sum() * area)


@pytest.mark.parametrize("bits", [1, 2])
def test_the_continuous_density_integrates_to_one_over_its_domain(bits: int) -> None:
    model = two_pixel_model(bits)
    levels = model.config.levels
    assert mass(model, -levels / 18, 19 * levels / 18, points=500) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("bits", "outside"), [(1, 0.046), (2, 0.152)])
def test_the_discrete_probabilities_sum_to_the_mass_of_the_data_cube(bits: int, outside: float) -> None:
    model = two_pixel_model(bits)
    levels = model.config.levels
    total = sum(probability(model, image) for image in itertools.product(range(levels), repeat=2))
    inside = mass(model, 0, levels)
    # the image logit's margin holds the rest; training drives it down
    assert 1 - inside == pytest.approx(outside, abs=0.005)
    assert total == pytest.approx(inside, abs=1e-4)


@torch.no_grad()
def probability(model: FlowPP, image: tuple[int, int], reach: float = 14.0, points: int = 120) -> float:
    """E[exp(log_weight)] over the dequantizer's normal noise, by the midpoint rule: P(image) without its bound."""
    edges = reach * (2 * (torch.arange(points, dtype=torch.float64) + 0.5) / points - 1)
    noise = torch.cartesian_prod(edges, edges).reshape(-1, 1, 1, 2)
    images = torch.tensor(image, dtype=torch.uint8).reshape(1, 1, 1, 2).expand(len(noise), -1, -1, -1)
    log_integrand = model.log_weight(images, noise) + normal_log_prob(noise)
    return float(log_integrand.exp().sum() * (2 * reach / points) ** 2)


def test_training_drives_the_mass_outside_the_data_cube_down() -> None:
    model = two_pixel_model(bits=2)
    images = torch.tensor([[0, 1], [1, 1], [2, 3], [3, 2]], dtype=torch.uint8).reshape(-1, 1, 1, 2).repeat(16, 1, 1, 1)
    before = mass(model, 0, 4, points=200)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model.bits_per_dim(images).mean().backward()
        optimizer.step()
    assert 1 - mass(model, 0, 4, points=200) < 0.5 * (1 - before)


def test_the_importance_weighted_bound_rises_with_samples() -> None:
    model = two_pixel_model(bits=2)
    images = torch.randint(0, 4, (2000, 1, 1, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        bounds = [model.log_prob(images, k, generator) for k in (1, 4, 16)]
    for looser, tighter in itertools.pairwise(bounds):
        gain = tighter - looser
        assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


def test_the_importance_weighted_bound_is_the_log_mean_of_the_weights() -> None:
    model = two_pixel_model(bits=2)
    images = torch.randint(0, 4, (7, 1, 1, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bound = model.log_prob(images, 5, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    weights = torch.stack([model.log_weight(images, model.draw_noise(7, generator)).exp() for _ in range(5)])
    torch.testing.assert_close(bound, weights.mean(0).log())
