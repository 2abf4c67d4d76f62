"""Dropout: only a training step drops. The seed of the step and the layer determine the mask.

A pass outside of `dropping` never drops, in any mode of the model and of its modules. So one model can serve several
threads while none of them changes a flag that the others read.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

_GOLDEN = 0x9E3779B97F4A7C15

Result = TypeVar("Result")


class _Step(NamedTuple):
    """A training step; without a seed its layers draw from torch's generator."""

    seed: int | None


class _OfThread(threading.local):
    step: _Step | None = None


_of_thread = _OfThread()


@contextmanager
def dropping(seed: int | None = None) -> Iterator[None]:
    """Passes of this thread drop within it, by `seed` or else by torch's generator. May be nested."""
    with _within(_Step(seed)):
        yield


def as_now(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, which drops later and in any thread as it would drop now.

    Activation checkpointing calls it again in the backward pass, which runs in threads of its own on a GPU.
    """
    step = _of_thread.step

    def call(*arguments: object) -> Result:
        with _within(step):
            return function(*arguments)

    return call


@contextmanager
def _within(step: _Step | None) -> Iterator[None]:
    before = _of_thread.step
    _of_thread.step = step
    try:
        yield
    finally:
        _of_thread.step = before


class Dropout(nn.Module):
    """Zeroes each value with probability p in a training step, and scales the others by 1 / (1 - p).

    In evaluation mode it drops nothing in a training step either. `layer` is its number within the model.
    """

    layer = 0

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def draw(self) -> tuple[float, int]:
        """Returns the probability, 0 if nothing is dropped, and the seed of one pass, from 0 to 2^62."""
        step = _of_thread.step
        if step is None or not self.training or not self.p:
            return 0.0, 0
        if step.seed is None:
            return self.p, int(torch.randint(2**62, (), device="cpu"))
        return self.p, (step.seed + (self.layer + 1) * _GOLDEN) % 2**62

    def forward(self, x: Tensor) -> Tensor:
        step = _of_thread.step
        if step is None or not self.training or not self.p:
            return x
        if step.seed is None:
            return dropout(x, self.p)
        p, seed = self.draw()
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) >= p
        return x * kept / (1 - p)
