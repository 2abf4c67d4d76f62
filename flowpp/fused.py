"""The costly parts of a model, each in one pass over its data, with a gradient derived by hand.

What they compute stands in plain PyTorch where they are called, in `flowpp.conditioner` and `flowpp.coupling`. Each
keeps for its backward pass little more than its inputs, and computes the rest anew. On a CPU all are kernels
(`flowpp.cpu_kernels`), on a CUDA device the coupling is (`flowpp.triton_kernels`).

Axes: B batch, F filters, C channels of a half, H height, W width, K mixture components. Feature maps are
[B, F, H, W] in channels-last memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from flowpp import cpu_kernels, triton_kernels
from flowpp.cpu_kernels import Drop, channels_last
from flowpp.native import kernels
from flowpp.precision import exact_backward


class Fusing:
    """Of a module: whether it computes by the kernels here, where there are any, or by plain PyTorch."""

    fused = True

    def fuses(self, x: Tensor) -> bool:
        """Whether it does, for tensors like x on a CPU."""
        if not self.fused or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return kernels(x.dtype) is not None


def elu_convolution(x: Tensor, weight: Tensor, bias: Tensor, drop: Drop) -> Tensor:
    """conv(dropout(concat_elu(x))), same padding: [B, F, H, W] -> [B, filters, H, W]; weight [filters, 2F, k, k]."""
    if cpu_kernels.has_tiles(x.dtype):
        return _TileConvolution.apply(x, weight, bias, drop)
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
def uncouple(y: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(x, log dx/dy), the inverse of `couple`, as `flowpp.logistic.solve` finds it; without gradients."""
    return (triton_kernels if y.is_cuda else cpu_kernels).uncouple(y, h, components)


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `convolve`, on the processor's matrix tiles where it has them."""
    if cpu_kernels.has_tiles(x.dtype):
        return _TileConvolution.apply(x, weight, bias, None)
    return convolve(x, weight, bias)


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
        x = channels_last(x)
        ctx.save_for_backward(x, weight)
        ctx.drop = drop
        return convolve(cpu_kernels.concat_elu(x, drop), weight, bias)

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        convolved = cpu_kernels.concat_elu(x, ctx.drop)
        grad_elu, grad_weight, grad_bias = _convolve_backward(grad, convolved, weight, needs)
        grad_x = None if grad_elu is None else cpu_kernels.concat_elu_backward(grad_elu, x, ctx.drop)
        return grad_x, grad_weight, grad_bias, None


class _TileConvolution(torch.autograd.Function):
    """Of x, or with a `drop` of dropout(concat_elu(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, drop: Drop | None) -> Tensor:
        x = channels_last(x)
        ctx.save_for_backward(x, weight)
        ctx.drop = drop
        convolved, elu = _convolved(x, drop)
        return cpu_kernels.convolve_tiles(convolved, weight, bias, elu=elu)

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad, grad_x, grad_weight = channels_last(grad), None, None
        if needs_weight:
            convolved, elu = _convolved(x, ctx.drop)
            grad_weight = cpu_kernels.convolve_tiles_weights(grad, convolved, weight, elu=elu)
        if needs_x:
            grad_x = cpu_kernels.convolve_tiles_backward(grad, weight)
            grad_x = grad_x if ctx.drop is None else cpu_kernels.concat_elu_backward(grad_x, x, ctx.drop)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None, None


def _convolved(x: Tensor, drop: Drop | None) -> tuple[Tensor, bool]:
    """What tiles convolve, and whether it is concat_elu of it."""
    return (cpu_kernels.concat_elu(x, drop), False) if drop and drop[0] else (x, drop is not None)


class _GateNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        x, gates = channels_last(x), channels_last(gates)
        ctx.save_for_backward(x, gates, gain)
        return cpu_kernels.gate_norm(x, gates, gain, bias)

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return cpu_kernels.gate_norm_backward(grad, *ctx.saved_tensors)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, drop: Drop) -> Tensor:
        qkv = channels_last(qkv)
        out, log_sums = cpu_kernels.attention(qkv, heads, drop)
        ctx.save_for_backward(qkv, out, log_sums)
        ctx.drop = drop
        return out

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, log_sums = ctx.saved_tensors
        return cpu_kernels.attention_backward(grad, qkv, out, log_sums, ctx.drop), None, None


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, h)
        ctx.components = components
        return (triton_kernels if x.is_cuda else cpu_kernels).couple(x, h, components)

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx: Any, grad_y: Tensor, grad_terms: Tensor) -> tuple[Tensor | None, ...]:
        x, h = ctx.saved_tensors
        backend = triton_kernels if x.is_cuda else cpu_kernels
        return *backend.couple_backward(grad_y, grad_terms, x, h, ctx.components), None
