"""Precision: passes compute in the dtype of their tensors, also under `torch.autocast`.

Autocast would round mixtures and log-determinants to 8 bits, and give bfloat16 gradients to kernels of float32.
`FlowPP.economize(bfloat16=True)` reduces the precision where layers tolerate it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Backward = TypeVar("Backward", bound=Callable[..., tuple[Tensor | None, ...]])


def without_autocast(device: torch.device) -> torch.autocast:
    """Within it, operations on `device` compute in the dtype of their tensors."""
    return torch.autocast(device.type, enabled=False)


def exact_backward(backward: Backward) -> Backward:
    """The `backward(ctx, *gradients)` of an autograd function, without the autocast that its caller may be in."""

    @wraps(backward)
    def computed(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(gradients[0].device):
            return backward(ctx, *gradients)

    return cast(Backward, computed)
