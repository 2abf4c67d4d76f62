"""Data-dependent initialization: parameters that take their first values from the first batch that meets them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowpp.config import LEAST_IMAGES


class TooFewImages(ValueError):
    """Fewer different images than an initialization needs."""


def check_images(images: Tensor) -> None:
    """Raises `TooFewImages` if fewer than `LEAST_IMAGES` of the images [B, C, H, W] differ from each other."""
    n = len(images)
    different = n if n < LEAST_IMAGES else len(images.flatten(1).unique(dim=0))
    if different < LEAST_IMAGES:
        found = f"{n:,} images, {different:,} of them different"
        raise TooFewImages(f"{found}; the initialization of a model needs at least {LEAST_IMAGES} different images")


class DataDependent(nn.Module):
    """A module whose `forward` begins with `self.initialize_from(x)`; within `initializing`, that sets it."""

    _initializing = False

    def initialize(self, x: Tensor) -> None:
        """Sets the parameters from x, the batch that `forward` is about to see."""
        raise NotImplementedError

    def initialize_from(self, x: Tensor) -> None:
        if self._initializing:
            self.initialize(x)


@contextmanager
def initializing(module: nn.Module) -> Iterator[None]:
    """The next pass through `module` initializes each part from what reaches it, without gradient."""
    parts = [part for part in module.modules() if isinstance(part, DataDependent)]
    for part in parts:
        part._initializing = True
    try:
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part._initializing = False


def inverse_deviation(variance: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(variance + epsilon), as the authors have it; 1 if the variance is no more than epsilon.

    Such a variance is rounding: the batch does not show the spread, and 1 / sqrt(epsilon) would amplify every other
    input without bound.
    """
    return torch.where(variance > epsilon, torch.rsqrt(variance + epsilon), torch.ones_like(variance))


def normal(scale: float, *shape: int) -> Tensor:
    """Draws of N(0, scale^2), of this shape.

    On the meta device there are none: asking it for random numbers imports torch's compiler, which takes a second, as
    long as all else that loading a model takes.
    """
    empty = torch.empty(shape)
    return empty if empty.is_meta else scale * empty.normal_()
