"""The costly parts of a model, each as one pass over its data with a gradient derived by hand.

What they compute stands, in plain PyTorch, where they are called: `flowpp.conditioner` and `flowpp.coupling`. Each keeps
for its backward pass little more than its inputs and computes the rest anew. On a CPU they are the kernels of
flowpp/kernels.

Axes: B batch, F filters, C channels of a half, H height, W width, K mixture components. Feature maps are
[B, F, H, W] in channels-last memory.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from flowpp.native import integers, kernels, pointer

HEAD_SIZES = frozenset({4, 8, 16, 24, 26, 32})
"""Features of an attention head that there is a kernel for."""


class Fusing:
    """Of a module: whether it computes by the kernels here, where there are any, or by plain PyTorch."""

    fused = True

    def fuses(self, x: Tensor) -> bool:
        """Whether it does, for tensors like x."""
        if not self.fused or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return kernels(x.dtype) is not None


Drop = tuple[float, int]
"""A layer's dropout in one pass: its probability, 0 for none, and the seed of what it drops."""


def elu_convolution(x: Tensor, weight: Tensor, bias: Tensor, drop: Drop) -> Tensor:
    """conv(dropout(concat_elu(x))), same padding: [B, F, H, W] -> [B, filters, H, W]; weight [filters, 2F, k, k]."""
    return _EluConvolution.apply(x, weight, bias, drop)


def gate_norm(x: Tensor, gates: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """layer_norm(x + glu(gates)) over the channels, or without a gain the sum itself; gates [B, 2F, H, W]."""
    return _GateNorm.apply(x, gates, gain, bias)


def attention(qkv: Tensor, heads: int, drop: Drop) -> Tensor:
    """dropout(softmax attention) over all positions: [B, 3F, H, W] -> [B, F, H, W], as `GatedAttention` orders them."""
    return _Attention.apply(qkv, heads, drop)


def couple(x: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(y, log dy/dx), both [B, C, H, W], of x under the conditioner's output h [B, C (2 + 3K), H, W]."""
    return _Couple.apply(x, h, components)


@torch.no_grad()
def uncouple(y: Tensor, h: Tensor, components: int, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(x, log dx/dy), the inverse of `couple`, as `flowpp.logistic.solve` finds it; `limits` of its evaluations."""
    y, h = _collapsible(y), _collapsible(h)
    x, terms = torch.empty(2, *y.shape, dtype=y.dtype)
    _call("uncouple", y, _shape(y, components), integers(limits), *_fields(y, h, x, terms))
    return x, terms


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    library = kernels(like.dtype)
    assert library is not None
    getattr(library, name)(*arguments)


def _size(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def _drop(drop: Drop) -> tuple[ctypes.c_uint64, ctypes.c_double]:
    probability, seed = drop
    return ctypes.c_uint64(seed), ctypes.c_double(probability)


def _rows(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return _size(x.numel() // x.shape[1]), _size(x.shape[1])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _new(x: Tensor, channels: int) -> Tensor:
    batch, _, height, width = x.shape
    return torch.empty((batch, height, width, channels), dtype=x.dtype).permute(0, 3, 1, 2)


def _concat_elu(x: Tensor, drop: Drop) -> Tensor:
    out = _new(x, 2 * x.shape[1])
    _call("concat_elu_forward", x, *_rows(x), pointer(x), *_drop(drop), pointer(out))
    return out


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution with same padding: [B, channels, H, W], weight [filters, channels, k, k] -> [B, filters, H, W].

    1 x 1 it is a matrix product, for which PyTorch has the faster way in channels-last memory, on one core above all.
    """
    if weight.shape[-1] > 1:
        return conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if weight.shape[-1] > 1:
        padding = [weight.shape[-1] // 2] * 2
        return torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], 1, needs
        )
    rows = grad.permute(0, 2, 3, 1)
    flat, matrix = rows.reshape(-1, len(weight)), weight.flatten(1)
    grad_x = (rows @ matrix).permute(0, 3, 1, 2) if needs[0] else None
    grad_weight = (flat.T @ x.permute(0, 2, 3, 1).reshape(-1, matrix.shape[1])).view_as(weight) if needs[1] else None
    return grad_x, grad_weight, flat.sum(0) if needs[2] else None


class _EluConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, drop: Drop) -> Tensor:
        x = _channels_last(x)
        ctx.save_for_backward(x, weight)
        ctx.drop = drop
        return convolve(_concat_elu(x, drop), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        grad_elu, grad_weight, grad_bias = _convolve_backward(grad, _concat_elu(x, ctx.drop), weight, needs)
        if grad_elu is None:
            return None, grad_weight, grad_bias, None
        grad_x = _new(x, x.shape[1])
        grad_elu = _channels_last(grad_elu)
        _call("concat_elu_backward", x, *_rows(x), pointer(grad_elu), pointer(x), *_drop(ctx.drop), pointer(grad_x))
        return grad_x, grad_weight, grad_bias, None


class _GateNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        x, gates = _channels_last(x), _channels_last(gates)
        ctx.save_for_backward(x, gates, gain)
        out = _new(x, x.shape[1])
        _call("gate_norm_forward", x, *_rows(x), *map(pointer, (x, gates, gain, bias, out)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, gain = ctx.saved_tensors
        grad_x, grad_gates = _new(x, x.shape[1]), _new(x, 2 * x.shape[1])
        sums = torch.zeros(2, torch.get_num_threads(), x.shape[1], dtype=x.dtype)
        given = map(pointer, (_channels_last(grad), x, gates, gain, grad_x, grad_gates, *sums))
        _call("gate_norm_backward", x, *_rows(x), *given)
        grad_gain, grad_bias = sums.sum(1) if gain is not None else (None, None)
        return grad_x, grad_gates, grad_gain, grad_bias


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, drop: Drop) -> Tensor:
        qkv = _channels_last(qkv)
        filters = qkv.shape[1] // 3
        out = _new(qkv, filters)
        length = qkv.shape[2] * qkv.shape[3]
        log_sums = torch.empty(len(qkv), heads, length, dtype=qkv.dtype)
        ctx.shape = integers((len(qkv), length, heads)), _size(filters // heads)
        ctx.drop = drop
        ctx.save_for_backward(qkv, out, log_sums)
        _call("attention_forward", qkv, *ctx.shape, pointer(qkv), *_drop(drop), pointer(out), pointer(log_sums))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, log_sums = ctx.saved_tensors
        grad_qkv = _new(qkv, qkv.shape[1])
        given = map(pointer, (_channels_last(grad), qkv, out, log_sums))
        _call("attention_backward", qkv, *ctx.shape, *given, *_drop(ctx.drop), pointer(grad_qkv))
        return grad_qkv, None, None


def _collapsible(x: Tensor) -> Tensor:
    """x, or a copy of it, whose positions lie at one distance from each other."""
    _, _, height, width = x.shape
    return x if 1 in (height, width) or x.stride(2) == width * x.stride(3) else x.contiguous()


def _shape(x: Tensor, components: int) -> ctypes.Array:
    batch, channels, height, width = x.shape
    return integers((batch, channels, height * width, components))


def _fields(*tensors: Tensor) -> list[Any]:
    """Pointer and strides of batch, channel and position of each."""
    fields: list[Any] = []
    for x in tensors:
        position = x.stride(3) if x.shape[3] > 1 else x.stride(2)
        fields += pointer(x), integers((x.stride(0), x.stride(1), position))
    return fields


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
        x, h = _collapsible(x), _collapsible(h)
        ctx.save_for_backward(x, h)
        ctx.components = components
        y, terms = torch.empty(2, *x.shape, dtype=x.dtype)
        _call("couple", x, _shape(x, components), *_fields(x, h, y, terms))
        return y, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_terms: Tensor) -> tuple[Tensor | None, ...]:
        x, h = ctx.saved_tensors
        grad_x, grad_h = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(h)
        fields = _fields(_collapsible(grad_y), _collapsible(grad_terms), x, h, grad_x, grad_h)
        _call("couple_backward", x, _shape(x, ctx.components), *fields)
        return grad_x, grad_h, None
