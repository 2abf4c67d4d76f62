"""Every transform: inverse(forward(x)) = x, and log_det = log|det Jacobian| from autograd, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowpp.conditioner import Conditioner, Layers
from flowpp.config import Attention
from flowpp.coupling import AffineCoupling, MixtureCoupling
from flowpp.transforms import (
    Columns,
    Compose,
    Flip,
    ImageLogit,
    Inverse,
    Normalization,
    Permutation,
    Pointwise,
    Sigmoid,
    Squeeze,
    Transform,
)

SHAPE = (4, 4, 2)  # channels, height, width: two halves of two channels
HALF = (2, 4, 2)


def conditioner(
    outputs: int, *, attention: Attention = "softmax", context: int = 0, weight_norm: bool = False, elu: bool = False
) -> Conditioner:
    layers = Layers(filters=4, heads=2, dropout=0.0, attention=attention, weight_norm=weight_norm)
    return Conditioner(HALF, outputs, layers, blocks=1, output_elu=elu, context_filters=context)


TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "squeeze": Squeeze,
    "columns": Columns,
    "flip": Flip,
    "sigmoid": Sigmoid,
    "inverse sigmoid": lambda: Compose(Sigmoid(), Inverse(Sigmoid())),
    "image logit": lambda: Compose(Sigmoid(), ImageLogit(levels=4)),
    "normalization": lambda: Normalization(SHAPE),
    "pointwise": lambda: Pointwise(HALF[0]),
    "affine coupling": lambda: AffineCoupling(conditioner(2 * HALF[0])),
    "mixture coupling": lambda: MixtureCoupling(conditioner(HALF[0] * (2 + 3 * 3)), components=3),
    "mixture coupling with context": lambda: MixtureCoupling(conditioner(HALF[0] * (2 + 3 * 3), context=3), 3),
    "mixture coupling with a maximum for attention": lambda: MixtureCoupling(
        conditioner(HALF[0] * (2 + 3 * 3), attention="maximum"), components=3
    ),
    "mixture coupling without attention": lambda: MixtureCoupling(
        conditioner(HALF[0] * (2 + 3 * 3), attention="none", elu=True), components=3
    ),
    "mixture coupling with weight normalization": lambda: MixtureCoupling(
        conditioner(HALF[0] * (2 + 3 * 3), weight_norm=True, elu=True), components=3
    ),
    "composition": lambda: Compose(
        Squeeze(), Normalization((16, 2, 1)), Flip(), Inverse(Squeeze()), Columns(), Pointwise(4), Inverse(Columns())
    ),
}


def perturbed(transform: Transform) -> Transform:
    """In float64, with every parameter moved away from its initial value."""
    transform = transform.double()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for module in transform.modules():
            if isinstance(module, Normalization):
                module.gain.copy_(module.gain.abs() + 0.1)
    return transform


@pytest.fixture(params=TRANSFORMS)
def transform(request: pytest.FixtureRequest) -> Transform:
    torch.manual_seed(0)
    return perturbed(TRANSFORMS[request.param]())


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def context() -> Tensor:
    return torch.randn(3, 3, *HALF[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_the_inverse_recovers_x(transform: Transform, x: Tensor, context: Tensor) -> None:
    y, _ = transform(x, context)
    recovered, _ = transform.inverse(y, context)
    assert (recovered - x).abs().max() < 1e-10


def test_log_det_is_autograds_log_determinant(transform: Transform, x: Tensor, context: Tensor) -> None:
    _, log_det = transform(x, context)
    for b in range(len(x)):
        assert (log_det[b] - jacobian_log_det(transform, x[b : b + 1], context[b : b + 1])).abs() < 1e-8


def test_the_inverses_log_det_is_the_negative(transform: Transform, x: Tensor, context: Tensor) -> None:
    y, log_det = transform(x, context)
    _, inverse_log_det = transform.inverse(y, context)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-8)


def test_the_shares_of_the_log_det_sum_to_it(transform: Transform, x: Tensor, context: Tensor) -> None:
    if isinstance(transform, Compose) and any(
        isinstance(part, Inverse) and not isinstance(part.transform, Permutation) for part in transform.transforms
    ):
        with pytest.raises(NotImplementedError, match="inverse Sigmoid"):
            transform.attribute(x, torch.zeros_like(x), context)
        return
    y, log_det = transform(x, context)
    start = torch.randn_like(x)
    moved, share = transform.attribute(x, start, context)
    torch.testing.assert_close(moved, y)
    torch.testing.assert_close((share.flatten(1).sum(1) - start.flatten(1).sum(1)), log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["squeeze", "columns", "flip"])
def test_a_share_moves_with_its_element(name: str, x: Tensor) -> None:
    y, share = TRANSFORMS[name]().attribute(x, x)
    torch.testing.assert_close(share, y, rtol=0, atol=0)


def jacobian_log_det(transform: Transform, x: Tensor, context: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda a: transform(a, context)[0], x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet


def test_squeeze_orders_channels_as_tensorflow_does() -> None:
    x = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    y, _ = Squeeze()(x.double())
    for row in range(2):
        for column in range(2):
            for c in range(2):
                torch.testing.assert_close(y[0, 4 * row + 2 * column + c], x[0, c, row::2, column::2].double())


def test_columns_puts_the_even_ones_first() -> None:
    y, _ = Columns()(torch.arange(6.0).reshape(1, 1, 1, 6))
    assert y.tolist() == [[[[0, 2, 4]], [[1, 3, 5]]]]


def test_a_normalization_gain_counts_at_least_1e_10() -> None:
    normalization = Normalization((2, 1, 1)).double()
    with torch.no_grad():
        normalization.gain.copy_(torch.tensor([1e-20, 1.0], dtype=torch.float64).reshape(2, 1, 1))
    _, log_det = normalization(torch.zeros(1, 2, 1, 1, dtype=torch.float64))
    assert log_det.item() == pytest.approx(-23.02585, abs=1e-5)
