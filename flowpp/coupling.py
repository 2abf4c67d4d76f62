"""Couplings: the first half of the channels stays and decides how the second half changes.

Axes: B batch, C channels of a half, H height, W width, K mixture components.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowpp import fused
from flowpp.dropout import as_now
from flowpp.logistic import mixture_logit, mixture_logit_inverse
from flowpp.transforms import Transform, sum_dimensions


class Coupling(Transform):
    """(x1, x2) -> (x1, y2); its log_det is a sum of terms, one an element of x2."""

    recomputed = False
    """Whether the backward pass computes `couple` anew, instead of keeping what it needs of it."""

    def couple(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y [B, 2C, H, W], the terms of log_det [B, C, H, W])."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.recomputed and torch.is_grad_enabled():
            y, terms = checkpoint(as_now(self.couple), x, context, use_reentrant=False)
        else:
            y, terms = self.couple(x, context)
        return y, sum_dimensions(terms)

    def attribute(self, x: Tensor, share: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, terms = self.couple(x, context)
        first, second = share.chunk(2, dim=1)
        return y, torch.cat([first, second + terms], dim=1)


class AffineCoupling(Coupling):
    """(x1, x2) -> (x1, x2 exp(tanh a) + b), where a and b are the conditioner's (ablation).

    The conditioner's 2C channels are channel-major: (C, 2). log_det = sum of tanh a.
    """

    def __init__(self, conditioner: nn.Module) -> None:
        super().__init__()
        self.conditioner = conditioner

    def couple(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        log_scale, shift = self._condition(x1, context)
        return torch.cat([x1, x2 * log_scale.exp() + shift], dim=1), log_scale

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y1, y2 = y.chunk(2, dim=1)
        log_scale, shift = self._condition(y1, context)
        return torch.cat([y1, (y2 - shift) * (-log_scale).exp()], dim=1), -sum_dimensions(log_scale)

    def _condition(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = self.conditioner(x1, context).unflatten(1, (-1, 2)).unbind(2)  # [B, C, H, W] each
        return a.tanh(), b


class MixtureCoupling(Coupling, fused.Fusing):
    """(x1, x2) -> (x1, logit(F(x2)) exp(tanh a) + b), where x1 sets a, b and the mixture of logistics with
    CDF F (Flow++ eq. 16).

    The conditioner's C (2 + 3K) channels are channel-major: (C, 2 + 3K) as a, b, then K logits, K means and K
    log-scales. log_det = sum of log f - log F - log(1 - F) + tanh a.
    """

    COMPONENT_DIM = 2

    def __init__(self, conditioner: nn.Module, components: int) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.components = components

    def fuses(self, x: Tensor) -> bool:
        """On a CUDA device, too, where Triton is."""
        return super().fuses(x) or (self.fused and x.is_cuda and find_spec("triton") is not None)

    def couple(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        h = self.conditioner(x1, context)
        if self.fuses(x):
            y2, terms = fused.couple(x2, h, self.components)
            return torch.cat([x1, y2], dim=1), terms
        log_scale, shift, mixture = self._split(h)
        u, log_derivative = mixture_logit(x2, *mixture, dim=self.COMPONENT_DIM)
        return torch.cat([x1, u * log_scale.exp() + shift], dim=1), log_derivative + log_scale

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y1, y2 = y.chunk(2, dim=1)
        h = self.conditioner(y1, context)
        if self.fuses(y) and not (torch.is_grad_enabled() and (h.requires_grad or y2.requires_grad)):
            x2, terms = fused.uncouple(y2, h, self.components)
            return torch.cat([y1, x2], dim=1), sum_dimensions(terms)
        log_scale, shift, mixture = self._split(h)
        u = (y2 - shift) * (-log_scale).exp()
        x2, log_derivative = mixture_logit_inverse(u, *mixture, dim=self.COMPONENT_DIM)
        return torch.cat([y1, x2], dim=1), sum_dimensions(log_derivative - log_scale)

    def _split(self, h: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """tanh a and b [B, C, H, W], and the mixture's parameters [B, C, K, H, W] each."""
        k = self.components
        parameters = h.unflatten(1, (-1, 2 + 3 * k)).contiguous()
        a, b, logits, means, log_scales = parameters.split([1, 1, k, k, k], dim=2)
        return a.squeeze(2).tanh(), b.squeeze(2), (logits, means, log_scales)
