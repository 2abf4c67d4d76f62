"""The mixture of logistics against scipy, its gradient against autograd, its inverse, and float32 in the tails."""

import numpy as np
import pytest
import torch
from scipy.special import log_expit, logsumexp
from torch import Tensor

from flowpp.logistic import mixture_logit, mixture_logit_inverse, mixture_logs, solve

K = 5


def mixtures(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, means and log-scales [K, n] of n mixtures, from broad to nearly degenerate."""
    generator = torch.Generator().manual_seed(seed)
    logits, means, log_scales = torch.randn(3, K, n, dtype=torch.float64, generator=generator)
    return (3 * logits).to(dtype), (4 * means).to(dtype), (2 * log_scales - 1).to(dtype)


def scipy_logs(x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor) -> list[np.ndarray]:
    x, logits, means, log_scales = (a.double().numpy() for a in (x, logits, means, log_scales))
    log_scales = np.maximum(log_scales, -7)
    log_weights = logits - logsumexp(logits, axis=0)
    z = (x - means) / np.exp(log_scales)
    terms = (log_expit(z), log_expit(-z), log_expit(z) + log_expit(-z) - log_scales)
    return [logsumexp(log_weights + term, axis=0) for term in terms]


def test_log_cdf_log_survival_and_log_density_agree_with_scipy() -> None:
    parameters = mixtures(4000)
    x = torch.linspace(-60, 60, 4000, dtype=torch.float64)
    for ours, reference in zip(mixture_logs(x, *parameters, dim=0), scipy_logs(x, *parameters), strict=True):
        np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-12, atol=1e-12)


def test_the_density_is_the_derivative_of_the_cdf() -> None:
    parameters = mixtures(500)
    x = torch.linspace(-12, 12, 500, dtype=torch.float64, requires_grad=True)
    log_cdf, _, log_density = mixture_logs(x, *parameters, dim=0)
    (derivative,) = torch.autograd.grad(log_cdf.exp().sum(), x)
    torch.testing.assert_close(log_density.exp(), derivative, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tail", [-1, 1])
def test_float32_keeps_its_precision_in_both_tails(tail: int) -> None:
    x = tail * torch.logspace(-3, 5, 4000)
    parameters = mixtures(4000, dtype=torch.float32)
    single = torch.stack(mixture_logit(x, *parameters, dim=0)).double()
    exact = torch.stack(mixture_logit(x.double(), *(p.double() for p in parameters), dim=0))
    # z = (x - mean) / scale itself is rounded: its error is relative to the larger of x and the means
    assert ((single - exact).abs() / (1 + exact.abs())).max() < 2e-5
    u = single[0].double()
    assert u[-1] * tail > 1e3, "far out the logit grows with x instead of saturating"


@pytest.mark.parametrize("dim", [0, 1])
def test_the_hand_derived_gradient_is_autograds(dim: int) -> None:
    arguments = [torch.linspace(-9, 9, 300, dtype=torch.float64), *(p.movedim(0, dim) for p in mixtures(300))]
    arguments = [a.clone().requires_grad_() for a in arguments]
    weights = torch.randn(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    u, log_derivative = mixture_logit(*arguments, dim=dim)
    ours = torch.autograd.grad((weights[0] * u + weights[1] * log_derivative).sum(), arguments)
    log_cdf, log_survival, log_density = mixture_logs(*arguments, dim=dim)
    reference_value = weights[0] * (log_cdf - log_survival) + weights[1] * (log_density - log_cdf - log_survival)
    reference = torch.autograd.grad(reference_value.sum(), arguments)
    for gradient, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_below_the_floor_the_log_scales_have_no_gradient() -> None:
    logits, means, log_scales = (p.requires_grad_() for p in mixtures(50))
    with torch.no_grad():
        log_scales.copy_(torch.full_like(log_scales, -8.0))
    u, _ = mixture_logit(torch.zeros(50, dtype=torch.float64), logits, means, log_scales, dim=0)
    u.sum().backward()
    assert log_scales.grad is not None
    assert not log_scales.grad.any()
    assert means.grad is not None
    assert means.grad.any()


@pytest.mark.parametrize("scale", [1, 10, 1000])
def test_the_inverse_undoes_the_logit(scale: float) -> None:
    parameters = mixtures(4000, seed=2)
    u = scale * torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x, log_derivative = mixture_logit_inverse(u, *parameters, dim=0)
    again, forward_log_derivative = mixture_logit(x, *parameters, dim=0)
    # a float64 x fixes u only to x's spacing times the slope du/dx
    slope = forward_log_derivative.exp()
    assert ((again - u).abs() <= 1e-14 * slope * (1 + x.abs()) + 1e-12 * (1 + u.abs())).all()
    torch.testing.assert_close(log_derivative, -forward_log_derivative, rtol=1e-9, atol=1e-9)


def test_the_inverse_recovers_x() -> None:
    parameters = mixtures(4000, seed=4)
    x = 5 * torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    u, log_derivative = mixture_logit(x, *parameters, dim=0)
    recovered, _ = mixture_logit_inverse(u, *parameters, dim=0)
    # where the density all but vanishes, many x share one u
    assert ((recovered - x).abs() <= 1e-11 + 1e-13 * (1 + u.abs()) * (-log_derivative).exp()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1, 30])
def test_at_rest_the_residual_is_4_eps_or_x_cannot_move(dtype: torch.dtype, scale: float) -> None:
    parameters = mixtures(20_000, seed=6, dtype=dtype)
    u = scale * torch.randn(20_000, dtype=dtype, generator=torch.Generator().manual_seed(7))
    found = solve(u, *parameters, dim=0)
    reached, log_derivative = mixture_logit(found.x, *parameters, dim=0)
    epsilon = torch.finfo(dtype).eps
    residual = (reached - u).abs()
    within_tolerance = residual <= 4 * epsilon * (1 + u.abs())
    within_spacing = residual <= 2 * epsilon * found.x.abs() * log_derivative.exp() + 8 * epsilon * (1 + u.abs())
    assert (within_tolerance | within_spacing).all()
    torch.testing.assert_close(found.log_derivative, log_derivative, rtol=0, atol=0)


def test_the_evaluations_keep_to_the_bound_and_are_few_on_average() -> None:
    parameters = mixtures(50_000, seed=8)
    u = 3 * torch.randn(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = solve(u, *parameters, dim=0)
    _, means, log_scales = parameters
    roots = means + log_scales.clamp(min=-7).exp() * u
    width = roots.amax(0) - roots.amin(0)
    epsilon = torch.finfo(torch.float64).eps
    bound = 26 + 2 * torch.log2(width * np.exp(7) / (4 * epsilon)).ceil()
    assert (found.evaluations <= bound).all()
    assert found.evaluations.float().mean() < 9


def test_the_slope_of_the_logit_is_at_most_the_inverse_of_the_least_scale() -> None:
    parameters = mixtures(50_000, seed=10)
    x = 8 * torch.randn(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    _, log_derivative = mixture_logit(x, *parameters, dim=0)
    assert (log_derivative <= -parameters[2].clamp(min=-7).amin(0) + 1e-9).all()


def test_bisection_takes_over_where_newton_does_not_settle() -> None:
    """Steep steps in a flat landscape, where Newton's method jumps from side to side."""
    n = 2000
    means = torch.linspace(-50, 50, K, dtype=torch.float64)[:, None].expand(K, n).contiguous()
    log_scales, logits = torch.full((K, n), -7.0, dtype=torch.float64), torch.zeros(K, n, dtype=torch.float64)
    u = torch.linspace(-4, 4, n, dtype=torch.float64)
    found = solve(u, logits, means, log_scales, dim=0)
    reached, log_derivative = mixture_logit(found.x, logits, means, log_scales, dim=0)
    epsilon = torch.finfo(torch.float64).eps
    assert ((reached - u).abs() <= 4 * epsilon * (1 + u.abs() + found.x.abs() * log_derivative.exp())).all()
    assert found.evaluations.max() <= 26 + 2 * np.ceil(np.log2(100.1 * np.exp(7) / (4 * epsilon)))


def test_an_elements_result_does_not_depend_on_its_neighbours() -> None:
    parameters = mixtures(500, seed=12, dtype=torch.float32)
    u = torch.randn(500, generator=torch.Generator().manual_seed(13))
    together = solve(u, *parameters, dim=0)
    for index in range(0, 500, 50):
        alone = solve(u[index : index + 1], *(p[:, index : index + 1] for p in parameters), dim=0)
        torch.testing.assert_close(together.x[index : index + 1], alone.x, rtol=1e-6, atol=1e-6)
        assert together.evaluations[index] == alone.evaluations[0]


def test_nan_and_infinity_end_the_search_at_once() -> None:
    parameters = mixtures(3)
    u = torch.tensor([float("nan"), float("inf"), 0.5], dtype=torch.float64)
    found = solve(u, *parameters, dim=0)
    assert found.evaluations[0] == 1
    assert found.x[2].isfinite()


def test_the_inverses_gradient_is_that_of_differences() -> None:
    """gradcheck perturbs every argument, in both outputs: implicit differentiation against the solver itself."""
    generator = torch.Generator().manual_seed(14)
    logits, means, log_scales = torch.randn(3, 3, 6, dtype=torch.float64, generator=generator)
    u = torch.randn(6, dtype=torch.float64, generator=generator)
    arguments = [argument.clone().requires_grad_() for argument in (u, logits, means, 0.3 * log_scales)]
    torch.autograd.gradcheck(lambda *a: mixture_logit_inverse(*a, dim=0), arguments, eps=1e-6, atol=1e-6)


def test_the_inverses_gradient_is_the_inverse_of_the_forwards() -> None:
    logits, means, log_scales = mixtures(300, seed=15)
    parameters = logits, means, log_scales.clamp(min=0)  # where it is all but flat, many x share one u
    x = torch.linspace(-9, 9, 300, dtype=torch.float64, requires_grad=True)
    u, _ = mixture_logit(x, *parameters, dim=0)
    again, _ = mixture_logit_inverse(u, *parameters, dim=0)
    (gradient,) = torch.autograd.grad(again.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=1e-6, atol=1e-6)


def test_where_no_gradient_is_asked_for_the_value_is_the_same() -> None:
    parameters = mixtures(300, seed=16)
    u = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(17))
    without = mixture_logit_inverse(u, *parameters, dim=0)
    with_gradient = mixture_logit_inverse(u.clone().requires_grad_(), *parameters, dim=0)
    for one, other in zip(without, with_gradient, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=0)
