"""Dropout: what it drops is a function of a pass's seed and the layer, on which lanes and recomputation agree."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

_GOLDEN = 0x9E3779B97F4A7C15
_of_thread = threading.local()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, what passes in this thread drop comes of `seed`; otherwise of torch's generator. May be nested."""
    before = getattr(_of_thread, "seed", None)
    _of_thread.seed = seed
    try:
        yield
    finally:
        _of_thread.seed = before


class Dropout(nn.Module):
    """Zeroes each value with probability p while training, and scales the others by 1 / (1 - p).

    `layer` tells those of a model apart.
    """

    layer = 0

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def draw(self) -> tuple[float, int]:
        """The probability, 0 where nothing is dropped, and the seed of one pass, from 0 to 2^62."""
        if not self.p or not self.training:
            return 0.0, 0
        seed = getattr(_of_thread, "seed", None)
        if seed is None:
            return self.p, int(torch.randint(2**62, ()))
        return self.p, (seed + (self.layer + 1) * _GOLDEN) % 2**62

    def forward(self, x: Tensor) -> Tensor:
        if getattr(_of_thread, "seed", None) is None or not self.training or not self.p:
            return dropout(x, self.p, self.training)
        p, seed = self.draw()
        kept = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator(x.device).manual_seed(seed)) >= p
        return x * kept / (1 - p)
