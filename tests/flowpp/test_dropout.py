"""Dropout as a function of seed and layer: its share and scale, and one choice for both passes and all threads."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor

from flowpp import fused, levels
from flowpp.config import ModelConfig
from flowpp.dropout import _GOLDEN, Dropout, dropping
from flowpp.model import FlowPP
from flowpp.native import REALS
from flowpp.seeds import seed_of
from tests.flowpp.test_model import SMALL, random_images
from tests.levels import levels_here

at_each_level = pytest.mark.usefixtures("level")

SEED = 2**61 + 12345


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_elu_convolution(drop: tuple[float, int], dtype: torch.dtype = torch.float32, filters: int = 24) -> Tensor:
    """What it multiplies concat_elu by, [2, 2F, 32, 32]."""
    x = torch.full((2, filters, 32, 32), 0.7, dtype=dtype)
    identity, bias = torch.eye(2 * filters, dtype=dtype)[:, :, None, None], torch.zeros(2 * filters, dtype=dtype)
    return fused.elu_convolution(x, identity, bias, drop) / fused.elu_convolution(x, identity, bias, (0.0, 0))


def of_attention(drop: tuple[float, int], dtype: torch.dtype = torch.float32, filters: int = 24) -> Tensor:
    """What it multiplies the attention by, [2, F, 32, 32], in three heads."""
    qkv = torch.ones(2, 3 * filters, 32, 32, dtype=dtype)
    return fused.attention(qkv, 3, drop) / fused.attention(qkv, 3, (0.0, 0))


def of_pytorch(drop: tuple[float, int], dtype: torch.dtype = torch.float32, filters: int = 24) -> Tensor:
    """The eager path under `dropping`, [2, F, 32, 32]."""
    p, seed = drop
    with dropping(seed):
        return Dropout(p).train()(torch.ones(2, filters, 32, 32, dtype=dtype))


OF_KERNELS = (of_elu_convolution, of_attention)


@pytest.fixture(
    params=[(levels.PLAIN, of_pytorch), *product(levels_here(), OF_KERNELS)],
    ids=lambda each: f"{each[0]}-{each[1].__name__}",
)
def factors_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., Tensor]]:
    """The factors of a layer's dropout: by plain PyTorch, and by the kernels at each level."""
    level, found = request.param
    with levels.at(level):
        yield found


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_a_share_of_p_is_dropped_and_the_rest_scaled(factors_of: Callable[..., Tensor], p: float) -> None:
    """Within five standard deviations of the binomial, over all, and in each channel, row and image."""
    factors = factors_of((p, SEED))
    dropped = factors == 0
    torch.testing.assert_close(factors[~dropped], torch.full_like(factors[~dropped], 1 / (1 - p)), rtol=1e-5, atol=0)
    for axes in ((0, 1, 2, 3), (0, 2, 3), (0, 1, 3), (1, 2, 3)):
        n = math.prod(factors.shape[axis] for axis in axes)
        assert ((dropped.float().mean(axes) - p).abs() < 5 * math.sqrt(p * (1 - p) / n)).all()


def test_what_is_dropped_at_neighbouring_places_is_independent(factors_of: Callable[..., Tensor]) -> None:
    dropped = (factors_of((0.5, SEED)) == 0).float() - 0.5
    for axis in (1, 2, 3):
        for distance in (1, 2, 4, 8, 16):
            ahead, behind = dropped.narrow(axis, distance, dropped.shape[axis] - distance), dropped
            product = ahead * behind.narrow(axis, 0, ahead.shape[axis])
            assert 4 * product.mean().abs() < 5 / math.sqrt(product.numel())


def test_nothing_is_dropped_at_p_zero(factors_of: Callable[..., Tensor]) -> None:
    assert (factors_of((0.0, SEED)) == 1).all()


def test_seeds_drop_independently_of_each_other(factors_of: Callable[..., Tensor]) -> None:
    """Seeds that differ in a low bit, by a layer's step or wholly agree on as many as chance has them."""
    dropped = factors_of((0.5, SEED)) == 0
    for other in (SEED + 1, SEED ^ (1 << 31), (SEED + _GOLDEN) % 2**62, seed_of(1), 0):
        agreeing = (dropped == (factors_of((0.5, other)) == 0)).float().mean()
        assert abs(agreeing - 0.5) < 5 * 0.5 / math.sqrt(dropped.numel())


@at_each_level
@pytest.mark.parametrize("of_kernel", OF_KERNELS)
@pytest.mark.parametrize("filters", [24, 48])
def test_a_seed_drops_the_same_for_any_number_of_threads_and_dtype(
    of_kernel: Callable[..., Tensor], filters: int
) -> None:
    found = []
    for number in (1, 2):
        with threads(number):
            found += [of_kernel((0.3, SEED), dtype, filters) == 0 for dtype in REALS]
    assert found[0].any()
    assert all(torch.equal(mask, found[0]) for mask in found)


@at_each_level
@pytest.mark.parametrize("filters", [5, 24, 33])
@pytest.mark.parametrize("kernel", [1, 3])
def test_elu_convolutions_gradient_is_that_of_what_it_kept(filters: int, kernel: int) -> None:
    """The mask of the forward pass, by an identity for a weight, put into plain PyTorch in the kernel's place."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, cotangent = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((2, filters, 5, 7), (6, 2 * filters, kernel, kernel), (6,), (2, 6, 5, 7))
    )
    identity = torch.eye(2 * filters, dtype=torch.float64)[:, :, None, None]
    zeros = torch.zeros(2 * filters, dtype=torch.float64)
    factors = fused.elu_convolution(x, identity, zeros, (0.4, SEED)) / fused.elu_convolution(
        x, identity, zeros, (0.0, 0)
    )
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    found = fused.elu_convolution(x, weight, bias, (0.4, SEED))
    both = torch.nn.functional.elu(torch.cat([x, -x], 1)) * factors
    expected = torch.nn.functional.conv2d(both, weight, bias, padding=kernel // 2)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    gradients = (torch.autograd.grad(out, leaves, cotangent) for out in (found, expected))
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-11)


@at_each_level
def test_concat_elus_gradient_is_zero_exactly_where_both_were_dropped() -> None:
    factors = of_elu_convolution((0.5, SEED))
    x = torch.full((2, 24, 32, 32), 0.7, requires_grad=True)
    out = fused.elu_convolution(x, torch.eye(48)[:, :, None, None], torch.zeros(48), (0.5, SEED))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    plus, minus = (factors != 0).chunk(2, dim=1)
    assert torch.equal(gradient != 0, plus | minus)


@at_each_level
@pytest.mark.parametrize(("size", "heads"), [(4, 3), (8, 1), (24, 2), (26, 2)])
def test_attentions_gradient_is_that_of_what_it_kept(size: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(size)
    qkv = torch.randn(2, 3 * heads * size, 5, 7, dtype=torch.float64, generator=generator)
    cotangent = torch.randn(2, heads * size, 5, 7, dtype=torch.float64, generator=generator)
    cotangent = cotangent.contiguous(memory_format=torch.channels_last)
    qkv = qkv.contiguous(memory_format=torch.channels_last).requires_grad_()
    whole, found = fused.attention(qkv, heads, (0.0, 0)), fused.attention(qkv, heads, (0.4, SEED))
    factors = (found / whole).detach()
    assert 0.2 < (factors == 0).double().mean() < 0.6
    gradients = [torch.autograd.grad(out, qkv, cotangent)[0] for out in (found, whole * factors)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)
    # what was dropped has no part in the gradient: of v, nothing but what was kept comes back
    ones = torch.ones_like(whole).contiguous(memory_format=torch.channels_last)
    (of_v,) = torch.autograd.grad(fused.attention(qkv, heads, (0.4, SEED)), qkv, ones)
    kept = factors.sum((2, 3))  # attention's weights of a query sum to one
    torch.testing.assert_close(of_v[:, 2 * heads * size :].sum((2, 3)), kept, rtol=1e-10, atol=1e-10)


def model_with_dropout() -> FlowPP:
    torch.manual_seed(0)
    model = FlowPP(ModelConfig(**{**SMALL, "dropout": 0.3})).double().train()
    model.initialize(random_images(model.config, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_layers_of_a_model_are_told_apart_and_draw_other_seeds() -> None:
    layers = [module for module in model_with_dropout().modules() if isinstance(module, Dropout)]
    assert [module.layer for module in layers] == list(range(len(layers)))
    with dropping(3):
        seeds = [module.draw()[1] for module in layers if module.p]
        assert seeds == [module.draw()[1] for module in layers if module.p]
    with dropping(4):
        others = [module.draw()[1] for module in layers if module.p]
    assert len({*seeds, *others}) == 2 * len(seeds)
    assert all(0 <= seed < 2**62 for seed in (*seeds, *others))


def test_outside_of_training_steps_and_modes_and_at_p_zero_no_generator_moves() -> None:
    state = torch.get_rng_state()
    assert Dropout(0.5).train().draw() == (0.0, 0)
    with dropping():
        assert Dropout(0.5).eval().draw() == (0.0, 0)
        assert Dropout(0.0).train().draw() == (0.0, 0)
        assert torch.equal(torch.get_rng_state(), state)
        assert Dropout(0.5).train().draw() != Dropout(0.5).train().draw()
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("plain_or_level")
def test_a_pass_drops_by_its_seed_whatever_torchs_generator_and_the_threads() -> None:
    model = model_with_dropout()
    images, noise = random_images(model.config, 4), model.draw_noise(4)
    found = []
    for seed, number in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(len(found))
        with threads(number):
            found.append(model.training_loss(images, noise=noise, dropout_seed=seed).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found[2], found[0], rtol=1e-3)


@pytest.mark.usefixtures("plain_or_level")
@pytest.mark.parametrize("seed", [5, None])
def test_what_is_computed_anew_drops_the_same(seed: int | None) -> None:
    """Under a seed, and by torch's generator, which the checkpoint puts back."""
    model = model_with_dropout()
    images, noise = random_images(model.config, 4), model.draw_noise(4)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for recompute in (False, True):
        model.economize(recompute=recompute)
        torch.manual_seed(1)
        loss = model.training_loss(images, noise=noise, dropout_seed=seed).sum()
        found.append(torch.autograd.grad(loss, parameters))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("plain_or_level")
def test_the_gradient_under_dropout_is_that_of_the_value() -> None:
    """Both passes of all layers agree on what was dropped, by finite differences."""
    model = model_with_dropout()
    images, noise = random_images(model.config, 2), model.draw_noise(2)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> Tensor:
        return model.training_loss(images, noise=noise, dropout_seed=7).sum()

    directions = [torch.randn_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(loss(), parameters)
    along = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
            ends.append(loss())
    torch.testing.assert_close(along, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-4)


def test_a_seed_within_another_ends_with_its_own_block() -> None:
    dropout = Dropout(0.5).train()
    with dropping(1):
        drawn = dropout.draw()
        with dropping(2):
            assert dropout.draw() != drawn
        assert dropout.draw() == drawn


def test_at_p_zero_a_pass_under_a_seed_keeps_its_input_as_it_is() -> None:
    x = torch.ones(3, requires_grad=True)
    with dropping(1):
        assert Dropout(0.0).train()(x).grad_fn is None  # nothing is drawn, nor kept for a backward pass


def test_a_seed_ends_with_its_block_and_after_an_exception() -> None:
    dropout = Dropout(0.5).train()

    def fail() -> None:
        with dropping(1):
            drawn.append(dropout.draw())
            raise RuntimeError("enough")

    drawn: list[tuple[float, int]] = []
    with pytest.raises(RuntimeError, match="enough"):
        fail()
    assert dropout.draw() == (0.0, 0)
    with dropping(1):
        assert dropout.draw() == drawn[0]
