"""The mixture coupling under whatever its conditioner may say: property-based, in float32 and float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flowpp.coupling import MixtureCoupling

K, POSITIONS = 4, 6
BOUNDS = {torch.float32: 3e-6, torch.float64: 1e-14}


class Said(nn.Module):
    """A conditioner that says what it was told to: [1, 2 + 3K, 1, POSITIONS]."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.values.expand(len(x), -1, -1, -1)


LOGITS = st.one_of(st.floats(-5, 5), st.sampled_from([-1e4, -80.0, 0.0, 80.0, 1e4]))  # one-hot, too
MEANS = st.one_of(st.floats(-5, 5), st.sampled_from([-1e4, -300.0, 300.0, 1e4]))  # far away
LOG_SCALES = st.one_of(st.floats(-7, 3), st.sampled_from([-1e3, -7.0, 7.0, 12.0]))  # at and beyond the bounds
LATENTS = st.one_of(st.floats(-4, 4), st.sampled_from([-6.0, 6.0]))  # six sigma


@st.composite
def outputs(draw: st.DrawFn) -> list[list[float]]:
    """Of a conditioner, [2 + 3K][POSITIONS]."""
    rows = [st.floats(-20, 20), st.floats(-10, 10), *[LOGITS] * K, *[MEANS] * K, *[LOG_SCALES] * K]
    return [draw(st.lists(row, min_size=POSITIONS, max_size=POSITIONS)) for row in rows]


VALUES = st.lists(LATENTS, min_size=POSITIONS, max_size=POSITIONS)
PROPERTY = settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def coupling(said: list[list[float]], dtype: torch.dtype) -> MixtureCoupling:
    return MixtureCoupling(Said(torch.tensor(said, dtype=dtype)[None, :, None, :]), K).to(dtype)


def stacked(x2: list[float], dtype: torch.dtype) -> Tensor:
    values = torch.tensor(x2, dtype=dtype).reshape(1, 1, 1, -1)
    return torch.cat([torch.zeros_like(values), values], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@PROPERTY
@given(said=outputs(), x2=VALUES)
def test_forward_is_finite_and_has_finite_gradients(
    dtype: torch.dtype, said: list[list[float]], x2: list[float]
) -> None:
    transform = coupling(said, dtype)
    x = stacked(x2, dtype).requires_grad_()
    y, log_det = transform(x)
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    (y.sum() + log_det.sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in transform.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@PROPERTY
@given(said=outputs(), y2=VALUES)
def test_the_inverse_is_finite_and_solves_its_equation(
    dtype: torch.dtype, said: list[list[float]], y2: list[float]
) -> None:
    transform = coupling(said, dtype)
    with torch.no_grad():
        y = stacked(y2, dtype)
        x, inverse_log_det = transform.inverse(y)
        assert x.isfinite().all()
        assert inverse_log_det.isfinite().all()
        again, terms = transform.couple(x)
        # y is known to its rounding, and to x's and the means' times the slope dy/dx
        largest = x.abs().amax() + max(map(abs, (mean for row in said[2 + K : 2 + 2 * K] for mean in row)))
        shift = max(map(abs, said[1]))
        assert ((again - y).abs()[:, 1] <= BOUNDS[dtype] * (100 + shift + largest * terms[:, 0].exp())).all()


@PROPERTY
@given(said=outputs(), x2=VALUES)
def test_in_float64_log_det_is_the_derivative(said: list[list[float]], x2: list[float]) -> None:
    transform = coupling(said, torch.float64)
    x = stacked(x2, torch.float64).requires_grad_()
    y, terms = transform.couple(x)
    (gradient,) = torch.autograd.grad(y[:, 1].sum(), x)
    # a slope of e^-1000 is none in float64, though its logarithm is a number
    torch.testing.assert_close(gradient[0, 1], terms[0, 0].exp(), rtol=1e-7, atol=1e-300)


@PROPERTY
@given(said=outputs(), x2=VALUES)
def test_float32_keeps_to_float64(said: list[list[float]], x2: list[float]) -> None:
    """Within the rounding of its inputs: the differences x - mean over the least scale."""
    with torch.no_grad():
        exact_transform = coupling(said, torch.float32).double()
        x = stacked(x2, torch.float32)
        y, terms = coupling(said, torch.float32).couple(x)
        exact_y, exact_terms = exact_transform.couple(x.double())
    floor = max(-7.0, min(min(row) for row in said[2 + 2 * K :]))
    largest = 6 + max(abs(mean) for row in said[2 + K : 2 + 2 * K] for mean in row)
    conditioning = 1 + largest * math.exp(-floor)
    assert ((y - exact_y).abs() <= 1e-6 * (conditioning * math.e + exact_y.abs())).all()
    assert ((terms - exact_terms).abs() <= 1e-6 * (conditioning + exact_terms.abs())).all()
