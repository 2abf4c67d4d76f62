"""Data-dependent initialization: parameters that take their first values from the first batch that meets them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
    """The next pass through `module` initializes each part from what reaches it; without gradient or dropout."""
    parts = [part for part in module.modules() if isinstance(part, DataDependent)]
    training = module.training
    module.eval()
    for part in parts:
        part._initializing = True
    try:
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part._initializing = False
        module.train(training)


def normal(scale: float, *shape: int) -> Tensor:
    """Draws of N(0, scale^2), of this shape.

    On the meta device there are none: asking it for random numbers imports torch's compiler, which takes a second, as
    long as all else that loading a model takes.
    """
    empty = torch.empty(shape)
    return empty if empty.is_meta else scale * empty.normal_()
