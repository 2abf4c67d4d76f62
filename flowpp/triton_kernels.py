"""The mixture coupling on a GPU: each direction, and the gradient, in one kernel that reads h once.

Axes: B images, C channels of the changed half, H height, W width, K mixture components. x2, y2 and terms are
[B, C, H, W]; h is what the conditioner gives, [B, C (2 + 3K), H, W], channel-major: (C, 2 + 3K) as a, b, K logits,
K means and K log-scales. All are float32 or float64, one dtype. Any strides will do; where H and W do not lie in
memory as one axis, a copy is made.

The mathematics is `MixtureCoupling`'s and `flowpp.logistic`'s; nothing here is differentiable by autograd. The
kernels (`flowpp.triton_mixture`) need triton, which is imported when the first of them runs.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flowpp.logistic import evaluation_limits


def couple(x2: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(y2, terms): y2 = logit(F(x2)) exp(tanh a) + b, terms = log dy2/dx2 = log f - log F - log(1 - F) + tanh a."""
    shape = _checked_shape(h, components, x2)
    x, h = x2.flatten(2), h.flatten(2)
    y, terms = torch.empty_like(x), torch.empty_like(x)
    _launch(_kernels().couple, (x, h, y, terms), x, components)
    return y.unflatten(2, shape), terms.unflatten(2, shape)


def couple_backward(
    grad_y: Tensor, grad_terms: Tensor, x2: Tensor, h: Tensor, components: int
) -> tuple[Tensor, Tensor]:
    """(grad_x2, grad_h) of `couple` at x2 and h, given the gradient in both its results.

    grad_h has h's memory format. Log-scales below LOG_SCALE_FLOOR have no gradient. All that the value is made of is
    computed anew.
    """
    shape = _checked_shape(h, components, x2, grad_y, grad_terms)
    x, h = x2.flatten(2), h.flatten(2)
    grad_x, grad_h = torch.empty_like(x), torch.empty_like(h)
    _launch(_kernels().couple_backward, (grad_y.flatten(2), grad_terms.flatten(2), x, h, grad_x, grad_h), x, components)
    return grad_x.unflatten(2, shape), grad_h.unflatten(2, shape)


def uncouple(y2: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(x2, terms): `couple`'s inverse, and log dx2/dy2.

    x2 is found as `flowpp.logistic.solve` finds it, with the same rule of rest and the same bound on evaluations. All
    of it is one kernel: the host waits for nothing.
    """
    shape = _checked_shape(h, components, y2)
    y, h = y2.flatten(2), h.flatten(2)
    x, terms = torch.empty_like(y), torch.empty_like(y)
    limits = {"EPSILON": torch.finfo(y.dtype).eps, "MOST_EVALUATIONS": evaluation_limits(y.dtype)[1]}
    # A program goes on until its slowest row rests: one warp, so that few wait.
    _launch(_kernels().uncouple, (y, h, x, terms), y, components, warps=1, **limits)
    return x.unflatten(2, shape), terms.unflatten(2, shape)


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], x: Tensor, components: int, warps: int = 4, **limits: Any
) -> None:
    """Runs `kernel` over all rows and channels of x [B, C, P].

    A thread holds 16 bytes of each K-wide number: the widest load there is, and of the dozen that the gradient has
    alive at once all stay in registers, with room for enough other warps to hide what memory takes (compiled for
    sm_90: 88 registers at K = 32; with twice as much a thread, 183).
    """
    images, channels, positions = x.shape
    columns = 1 << (components - 1).bit_length()
    rows = max(1, warps * 32 * 16 // x.element_size() // columns)
    blocks = -(-images * positions // rows)
    arguments = [argument for tensor in tensors for argument in (tensor, tensor.stride())]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(blocks * channels,)](
            *arguments, images, channels, positions, **limits, K=components, R=rows, COLUMNS=columns, num_warps=warps
        )


def _checked_shape(h: Tensor, components: int, *like_x: Tensor) -> torch.Size:
    """(H, W). Raises ValueError for tensors that a kernel would read past the end of, or misread."""
    x = like_x[0]
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the kernels take float32 and float64, not {x.dtype}")
    if not 1 <= components <= 128:
        raise ValueError(f"the kernels take 1 to 128 mixture components, not {components}")
    expected = (x.shape[0], x.shape[1] * (2 + 3 * components), *x.shape[2:])
    for tensor, shape in [*((tensor, x.shape) for tensor in like_x), (h, expected)]:
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != (tuple(shape), x.dtype, x.device):
            raise ValueError(
                f"expected {tuple(shape)} in {x.dtype} on {x.device}, "
                f"not {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            )
    return x.shape[2:]


@cache
def _kernels() -> ModuleType:
    try:
        from flowpp import triton_mixture
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the mixture coupling's GPU kernels need triton, which is not installed: torch for CUDA on Linux brings "
            "it, else install the version that requirements-torch.txt names",
            name=error.name,
        ) from error
    return triton_mixture
