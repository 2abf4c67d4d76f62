"""Invertible maps of tensors, each with the log-determinant of its Jacobian in both directions.

Axes: B batch, C channels, H height, W width. A split keeps its two halves in one tensor, stacked along the
channels: the first C of 2C channels are the first half.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from flowpp.initialization import DataDependent, inverse_deviation, normal


class Transform(nn.Module):
    """y = f(x; context), invertible in x.

    `forward(x, context) -> (y, log_det)` and `inverse(y, context) -> (x, log_det)`: log_det [B] in nats is
    log|det dy/dx| and log|det dx/dy|, in the dtype of the tensor.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def attribute(self, x: Tensor, share: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, share) where `share`, of x's shape, is what each element has contributed to the log_det so far.

        The shares move with their elements and grow by this transform's log_det, whose sum over the elements is
        `forward`'s: they say where in the image the log-determinant arises.
        """
        raise NotImplementedError


class Elementwise(Transform):
    """A transform whose log_det is a sum of terms, one an element; `forward` follows from `terms`."""

    def terms(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, the terms of log_det), both of x's shape."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, terms = self.terms(x, context)
        return y, sum_dimensions(terms)

    def attribute(self, x: Tensor, share: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, terms = self.terms(x, context)
        return y, share + terms


def sum_dimensions(x: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return x.flatten(1).sum(1)


class Compose(Transform):
    """f_n o ... o f_1, for transforms in the order in which they meet x."""

    def __init__(self, *transforms: Transform) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for transform in self.transforms:
            x, log_det = transform(x, context)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(len(y))
        for transform in reversed(self.transforms):
            y, log_det = cast(Transform, transform).inverse(y, context)
            total = total + log_det
        return y, total

    def attribute(self, x: Tensor, share: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for transform in self.transforms:
            x, share = cast(Transform, transform).attribute(x, share, context)
        return x, share


class Inverse(Transform):
    """f^-1."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(y, context)

    def attribute(self, x: Tensor, share: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not isinstance(self.transform, Permutation):
            raise NotImplementedError(f"the shares of an inverse {type(self.transform).__name__}")
        return self.transform.restore(x), self.transform.restore(share)


class Permutation(Transform):
    """A reordering of elements: log_det is zero."""

    def permute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def restore(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.permute(x), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.restore(y), y.new_zeros(len(y))

    def attribute(self, x: Tensor, share: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.permute(x), self.permute(share)


class Squeeze(Permutation):
    """[B, C, H, W] -> [B, 4C, H/2, W/2]: space to depth, output channel = (row offset, column offset, c)."""

    def permute(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, H/2, 2, W/2, 2]
        return x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def restore(self, y: Tensor) -> Tensor:
        y = y.unflatten(1, (2, 2, -1))  # [B, row, column, C, H/2, W/2]
        return y.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class Columns(Permutation):
    """[B, C, H, W] -> [B, 2C, H, W/2]: even columns, then odd ones (the authors' "checkerboard" split)."""

    def permute(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., 0::2], x[..., 1::2]], dim=1)

    def restore(self, y: Tensor) -> Tensor:
        return torch.stack(y.chunk(2, dim=1), dim=-1).flatten(-2)


class Flip(Permutation):
    """[B, 2C, H, W] -> [B, 2C, H, W]: the halves change places."""

    def permute(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([second, first], dim=1)

    def restore(self, y: Tensor) -> Tensor:
        return self.permute(y)


class Sigmoid(Elementwise):
    """y = sigma(x) elementwise; log_det = sum of -softplus(x) - softplus(-x)."""

    def terms(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(x), -softplus(x) - softplus(-x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.logit(y)
        return x, sum_dimensions(softplus(x) + softplus(-x))


class ImageLogit(Elementwise):
    """y = logit(0.05 + 0.9 x / levels) for x in [0, levels).

    log_det = sum of log(0.9 / levels) + softplus(y) + softplus(-y). Its domain, (-levels/18, 19 levels/18), is
    wider than the data cube (authors' ImgProc).
    """

    MARGIN = 0.05

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def terms(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = torch.logit(self.MARGIN + (1 - 2 * self.MARGIN) / self.levels * x)
        return y, self._terms(y)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = (torch.sigmoid(y) - self.MARGIN) * (self.levels / (1 - 2 * self.MARGIN))
        return x, -sum_dimensions(self._terms(y))

    def _terms(self, y: Tensor) -> Tensor:
        return softplus(y) + softplus(-y) + math.log((1 - 2 * self.MARGIN) / self.levels)


class Normalization(Transform, DataDependent):
    """y = g * x + bias with one g = max(gain, 1e-10) and bias an element; log_det = sum of log g.

    Data-dependent initialization gives each element of y mean 0 and variance 1 over the batch (authors'
    Norm); an element that does not vary in the batch keeps gain 1. Parameters: gain, bias [C, H, W].
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def initialize(self, x: Tensor) -> None:
        variance, mean = torch.var_mean(x, dim=0, correction=0)
        self.gain.copy_(inverse_deviation(variance, 1e-8))
        self.bias.copy_(-mean * self.gain)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.initialize_from(x)
        gain = self._positive_gain()
        return gain * x + self.bias, gain.log().sum().expand(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        gain = self._positive_gain()
        return (y - self.bias) / gain, -gain.log().sum().expand(len(y))

    def attribute(self, x: Tensor, share: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self(x)[0], share + self._positive_gain().log()

    def _positive_gain(self) -> Tensor:
        return self.gain.clamp(min=1e-10)


class Pointwise(Transform):
    """Invertible 1x1 convolution of each half: y[:, d] = sum_c x[:, c] weight[half, c, d].

    log_det = H W sum over the halves of log|det weight|, the determinant taken in float64. Parameter:
    weight [2, C, C], initialized to the identity plus 0.001 N(0, 1).
    """

    def __init__(self, half_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(0.001, 2, half_channels, half_channels))
        with torch.no_grad():
            self.weight.diagonal(dim1=1, dim2=2).add_(1)  # the identity, nearly

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._multiply(x, self.weight), self._log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._multiply(y, self.weight.double().inverse().to(y.dtype)), -self._log_det(y)

    def attribute(self, x: Tensor, share: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # The matrix mixes the channels of a half, which have an equal part in its determinant.
        parts = torch.linalg.slogdet(self.weight.double()).logabsdet / self.weight.shape[1]
        parts = parts.to(share.dtype).repeat_interleave(self.weight.shape[1])
        return self._multiply(x, self.weight), share + parts[:, None, None]

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        x = x.unflatten(1, (2, -1))  # [B, half, C, H, W]
        return torch.einsum("bnchw,ncd->bndhw", x, weight).flatten(1, 2)

    def _log_det(self, x: Tensor) -> Tensor:
        log_det = torch.linalg.slogdet(self.weight.double()).logabsdet.sum()
        return (x.shape[2] * x.shape[3] * log_det).to(x.dtype).expand(len(x))
