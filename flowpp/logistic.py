"""Mixtures of logistics: log CDF, log survival, log density, the logit of the CDF and its inverse.

Axes: parameters carry the K components at dimension `dim`; x has the same shape without it. All of it is
elementwise over the other axes, in x's dtype. Logarithms of CDF and survival function are both taken as
logsumexp of log-sigmoids, so that neither tail is ever the difference of two near numbers; the authors
exponentiate and lose the upper one.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from flowpp.precision import exact_backward

LOG_SCALE_FLOOR = -7.0
"""Lower bound on the log-scales (authors)."""


def mixture_logs(x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, dim: int) -> tuple[Tensor, ...]:
    """(log F(x), log(1 - F(x)), log f(x)) of sum_k softmax(logits)_k Logistic(means_k, exp(log_scales_k)).

    Differentiable in every argument by autograd: the reference for `mixture_logit`.
    """
    log_scales = log_scales.clamp(min=LOG_SCALE_FLOOR)
    log_weights = logits.log_softmax(dim)
    z = (x.unsqueeze(dim) - means) * torch.exp(-log_scales)
    log_below = log_weights + logsigmoid(z)
    log_above = log_weights + logsigmoid(-z)
    log_density = log_below + logsigmoid(-z) - log_scales
    return log_below.logsumexp(dim), log_above.logsumexp(dim), log_density.logsumexp(dim)


def mixture_logit(x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(u, log_derivative) with u = logit F(x) = log F - log(1 - F) and log du/dx = log f - log F - log(1 - F).

    Two numbers of x's shape from one pass; the gradient is derived by hand (`_MixtureLogit`) and needs
    none of the K-wide intermediates that autograd would keep.
    """
    return _MixtureLogit.apply(x, logits, means, log_scales, dim)


class _MixtureLogit(torch.autograd.Function):
    """Keeps its inputs only; the backward pass recomputes the K-wide terms.

    With posteriors P_k = pi_k sigma(z_k) / F, Q_k = pi_k sigma(-z_k) / (1 - F), R_k = pi_k f_k / f:
    du/dlogits = P - Q, dlog_derivative/dlogits = R - P - Q + pi, du/dz = P sigma(-z) + Q sigma(z),
    dlog_derivative/dz = R (sigma(-z) - sigma(z)) - P sigma(-z) + Q sigma(z).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, dim: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, logits, means, log_scales)
        ctx.dim = dim
        return _logit_and_log_derivative(x, logits.log_softmax(dim), means, log_scales.clamp(min=LOG_SCALE_FLOOR), dim)

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx: Any, grad_u: Tensor, grad_log_derivative: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, means, log_scales = ctx.saved_tensors
        dim = ctx.dim
        floored = log_scales.clamp(min=LOG_SCALE_FLOOR)
        inverse_scales = torch.exp(-floored)
        z = (x.unsqueeze(dim) - means) * inverse_scales
        log_weights, log_sigmoid = logits.log_softmax(dim), logsigmoid(z)
        log_sigmoid_negative = log_sigmoid - z
        log_above = log_weights + log_sigmoid_negative
        below = (log_weights + log_sigmoid).softmax(dim)
        above = log_above.softmax(dim)
        density = (log_above + log_sigmoid - floored).softmax(dim)
        # each from its logarithm: 1 - sigma(z) would lose what is left of a flat slope
        sigmoid, sigmoid_negative = log_sigmoid.exp(), log_sigmoid_negative.exp()
        grad_u, grad_log_derivative = grad_u.unsqueeze(dim), grad_log_derivative.unsqueeze(dim)

        grad_below = (grad_u - grad_log_derivative) * below
        grad_above = (grad_u + grad_log_derivative) * above
        grad_density = grad_log_derivative * density
        grad_logits = grad_below - grad_above + grad_density + grad_log_derivative * log_weights.exp()
        grad_z = (grad_below + grad_density) * sigmoid_negative + (grad_above - grad_density) * sigmoid
        grad_log_scales = (-z * grad_z - grad_density).masked_fill(log_scales < LOG_SCALE_FLOOR, 0)
        grad_means = -inverse_scales * grad_z
        return -grad_means.sum(dim), grad_logits, grad_means, grad_log_scales, None


def _logit_and_log_derivative(
    x: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """As `mixture_logit`, of normalized log-weights and floored log-scales.

    f = sum_k pi_k S_k sigma(z_k) / s_k for the component survivals S_k, so f / (1 - F) is a mean of
    sigma(z_k) / s_k, and likewise f / F in the other tail. log f - log(1 - F) taken as that mean's logarithm
    has none of the rounding of two numbers that both grow with |z|.
    """
    z = (x.unsqueeze(dim) - means) * torch.exp(-log_scales)
    log_sigmoid = logsigmoid(z)
    log_sigmoid_negative = log_sigmoid - z
    below, log_cdf_shift, log_cdf_rest = _shifted(log_weights + log_sigmoid, dim)
    above, log_survival_shift, log_survival_rest = _shifted(log_weights + log_sigmoid_negative, dim)
    log_cdf, log_survival = log_cdf_shift + log_cdf_rest, log_survival_shift + log_survival_rest
    upper = log_cdf > log_survival
    terms = torch.where(upper.unsqueeze(dim), above + log_sigmoid, below + log_sigmoid_negative) - log_scales
    log_mean = terms.logsumexp(dim) - torch.where(upper, log_survival_rest, log_cdf_rest)
    return log_cdf - log_survival, log_mean - torch.where(upper, log_cdf, log_survival)


def _shifted(terms: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(terms - shift, shift, log sum exp(terms - shift)), shift being the greatest term."""
    shift = terms.amax(dim, keepdim=True)
    terms = terms - shift
    return terms, shift.squeeze(dim), terms.exp().sum(dim).log()


def mixture_logit_inverse(
    u: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """(x, log_derivative) with logit F(x) = u, and log dx/du. `solve` finds x.

    Differentiable in every argument, by implicit differentiation: at logit F(x; theta) = u,
    dx = (du - d logit F / dtheta dtheta) / (d logit F / dx), which is the gradient of one Newton step at x.
    """
    found = solve(u, logits, means, log_scales, dim)
    arguments = (u, logits, means, log_scales)
    if not (torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments)):
        return found.x, -found.log_derivative
    reached, log_derivative = mixture_logit(found.x, logits, means, log_scales, dim)
    error = reached - u
    x = found.x - (error - error.detach()) * torch.exp(-log_derivative.detach())
    return x, -mixture_logit(x, logits, means, log_scales, dim)[1]


class Solution(NamedTuple):
    """x with logit F(x) = u; log du/dx there; how often the mixture was evaluated, int32. All of u's shape."""

    x: Tensor
    log_derivative: Tensor
    evaluations: Tensor


@torch.no_grad()
def solve(u: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, dim: int) -> Solution:
    """Solves logit F(x) = u by Newton's method within a bracket.

    Each component alone has logit CDF (x - mean) / scale, so the root lies between the least and the greatest of
    mean + scale * u; their mean under the mixture's weights is where it starts. A Newton step that leaves the
    bracket, or does not halve the step before last, gives way to bisection.

    An element rests where |logit F(x) - u| <= 4 eps (1 + |u|), eps being the spacing of the dtype at 1, or where no
    floating-point number lies between x and the next x. It is frozen there, so that an element's result does not
    depend on its neighbours.

    Bound: the slope of logit F is at most 1 / min scale <= e^7, for sum pi F_k S_k <= F S. After 24 evaluations every
    other step is a bisection, so w, the bracket's width at the start, is halved every second evaluation, and at
    width 4 eps e^-7 any x in it rests: at most 26 + 2 log2(w e^7 / (4 eps)) evaluations; `_most_evaluations` is that
    for the widest bracket that the dtype can hold. A CUDA device is asked only every fourth evaluation whether all
    elements rest, so that it need not wait for the host.
    """
    log_weights, log_scales = logits.log_softmax(dim), log_scales.clamp(min=LOG_SCALE_FLOOR)
    roots = means + log_scales.exp() * u.unsqueeze(dim)
    low, high = roots.amin(dim), roots.amax(dim)
    epsilon = torch.finfo(u.dtype).eps
    tolerance = 4 * epsilon * (1 + u.abs())
    x = torch.minimum(torch.maximum((log_weights.exp() * roots).sum(dim), low), high)
    step = before = high - low
    resting = torch.zeros_like(u, dtype=torch.bool)
    evaluations = torch.zeros_like(u, dtype=torch.int32)
    log_derivative = torch.zeros_like(u)
    look_every = 4 if u.is_cuda else 1
    for n in range(1, _most_evaluations(u.dtype) + 1):
        reached, slope = _logit_and_log_derivative(x, log_weights, means, log_scales, dim)
        log_derivative = torch.where(resting, log_derivative, slope)
        evaluations += ~resting
        error = reached - u
        low, high = torch.where(error <= 0, x, low), torch.where(error >= 0, x, high)
        newton, bisection = error * torch.exp(-slope), x - (low + high) / 2
        if n > _FREE_EVALUATIONS and n % 2:
            before, step = step, bisection
        else:
            good = (x - newton >= low) & (x - newton <= high) & (2 * newton.abs() <= before.abs())
            before, step = step, torch.where(good, newton, bisection)
        moves = (error.abs() > tolerance) & (2 * step.abs() > epsilon * x.abs())  # false for NaN
        resting = resting | ~moves
        if n % look_every == 0 and resting.all():
            break
        x = torch.where(resting, x, x - step)
    return Solution(x, log_derivative, evaluations)


_FREE_EVALUATIONS = 24


def evaluation_limits(dtype: torch.dtype) -> tuple[int, int]:
    """Evaluations of `solve` until every other step is a bisection, and the most there can be."""
    return _FREE_EVALUATIONS, _most_evaluations(dtype)


def _most_evaluations(dtype: torch.dtype) -> int:
    """Halvings from the greatest to the smallest positive number, two evaluations each, after the free ones."""
    info = torch.finfo(dtype)
    halvings = math.log2(info.max) + 1 - math.log2(info.smallest_normal) - math.log2(info.eps)
    return _FREE_EVALUATIONS + 2 + 2 * math.ceil(halvings)
