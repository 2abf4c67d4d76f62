"""Mixtures of logistics: log CDF, log survival, log density, the logit of the CDF and its inverse.

Axes: parameters carry the K components at dimension `dim`; x has the same shape without it. All of it is
elementwise over the other axes, in x's dtype. Logarithms of CDF and survival function are both taken as
logsumexp of log-sigmoids, so that neither tail is ever the difference of two near numbers; the authors
exponentiate and lose the upper one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

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
    dlog_derivative/dz = R (1 - 2 sigma(z)) - P sigma(-z) + Q sigma(z).
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
    def backward(ctx: Any, grad_u: Tensor, grad_log_derivative: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, means, log_scales = ctx.saved_tensors
        dim = ctx.dim
        floored = log_scales.clamp(min=LOG_SCALE_FLOOR)
        inverse_scales = torch.exp(-floored)
        z = (x.unsqueeze(dim) - means) * inverse_scales
        log_weights, log_sigmoid = logits.log_softmax(dim), logsigmoid(z)
        log_above = log_weights + (log_sigmoid - z)  # log sigma(-z) = log sigma(z) - z
        below = (log_weights + log_sigmoid).softmax(dim)
        above = log_above.softmax(dim)
        density = (log_above + log_sigmoid - floored).softmax(dim)
        sigmoid = log_sigmoid.exp()
        grad_u, grad_log_derivative = grad_u.unsqueeze(dim), grad_log_derivative.unsqueeze(dim)

        grad_below = (grad_u - grad_log_derivative) * below
        grad_above = (grad_u + grad_log_derivative) * above
        grad_density = grad_log_derivative * density
        grad_logits = grad_below - grad_above + grad_density + grad_log_derivative * log_weights.exp()
        grad_z = grad_below + grad_density + (grad_above - grad_below - 2 * grad_density) * sigmoid
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


@torch.no_grad()
def mixture_logit_inverse(
    u: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """(x, log_derivative) with logit F(x) = u, and log dx/du; Newton's method within a bracket.

    Each component alone has logit CDF (x - mean) / scale, so the root lies between the least and the
    greatest of mean + scale * u. A Newton step that leaves the bracket, or does not halve the step before
    last, gives way to bisection, so that the steps shrink geometrically whatever the mixture. An element
    rests when its step or its bracket is below the spacing of floating-point numbers at x.
    """
    log_weights, log_scales = logits.log_softmax(dim), log_scales.clamp(min=LOG_SCALE_FLOOR)
    roots = means + log_scales.exp() * u.unsqueeze(dim)
    low, high = roots.amin(dim), roots.amax(dim)
    epsilon = torch.finfo(u.dtype).eps
    x, step = (low + high) / 2, high - low
    before = step
    for _ in range(_MAX_EVALUATIONS):
        reached, log_derivative = _logit_and_log_derivative(x, log_weights, means, log_scales, dim)
        error = reached - u
        low, high = torch.where(error <= 0, x, low), torch.where(error >= 0, x, high)
        newton = error * torch.exp(-log_derivative)
        bisection = x - (low + high) / 2
        inside = (x - newton >= low) & (x - newton <= high) & (2 * newton.abs() <= before.abs())
        before, step = step, torch.where(inside, newton, bisection)
        resting = (step.abs() <= 2 * epsilon * x.abs().clamp(min=epsilon)) | (error == 0)
        x = torch.where(resting, x, x - step)
        if resting.all():
            break
    _, log_derivative = _logit_and_log_derivative(x, log_weights, means, log_scales, dim)
    return x, -log_derivative


_MAX_EVALUATIONS = 200
