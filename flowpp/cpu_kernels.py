"""The kernels of flowpp/kernels as functions of tensors on a CPU; nothing here is differentiable by autograd.

Axes: B batch, F filters, C channels of a half, H height, W width, K mixture components. Feature maps [B, F, H, W] are
read and given in channels-last memory. All are float32 or all float64.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from flowpp.logistic import evaluation_limits
from flowpp.native import integers, kernels, level_of, listening, pointer

_TILE_HEAD_SIZE, _TILE_LENGTH = 16, 128
"""Least features of a head and positions for which the matrix tiles are the faster way to attend."""

Drop = tuple[float, int]
"""A layer's dropout in one pass: its probability, 0 for none, and the seed of what it drops."""


def channels_last(x: Tensor) -> Tensor:
    """x, or a copy of it, as the kernels read feature maps."""
    return x.contiguous(memory_format=torch.channels_last)


def has_tiles(dtype: torch.dtype) -> bool:
    """Returns whether kernels for this dtype use matrix tiles: those for float32 do, at the level `amx`."""
    library = kernels(dtype) if dtype == torch.float32 else None
    return library is not None and level_of(library) == "amx"


def convolve_tiles(x: Tensor, weight: Tensor, bias: Tensor, *, elu: bool) -> Tensor:
    """Convolution with same padding on the processor's matrix tiles, of x or of concat_elu(x), float32.

    [B, F, H, W], weight [filters, F or 2F, k, k] with odd k -> [B, filters, H, W]. Each number is taken as the sum of
    two bfloat16s (flowpp/kernels/tiles.h): what it gives is off by up to 5e-6 of its root mean square.
    """
    (x, elu), weight = _for_tiles(x, elu), channels_last(weight)
    out, shape = _new(x, len(weight)), _convolution(x, weight)
    packed = None if listening.tape is None else listening.tape.once(_pack, weight, tuple(shape[3:]))
    taken = weight if packed is None else packed
    flags = (ctypes.c_bool(flag) for flag in (elu, False, packed is not None))
    _call("convolve_tiles", x, shape, *flags, *map(pointer, (x, taken, bias, out)))
    return out


def _pack(weight: Tensor, kind: tuple[int, ...]) -> Tensor:
    """The weight [filters, channels, k, k] in the tiles' order, bfloat16 [n]; else the kernel makes it so in each call.

    `kind` is (channels, filters, k), as `_convolution` gives it.
    """
    shape = integers((1, 1, 1, *kind))
    packed = torch.empty(_call("packed_weights", weight, shape), dtype=torch.bfloat16, device="cpu")
    _call("pack_weights", weight, shape, pointer(weight), pointer(packed))
    return packed


def convolve_tiles_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient in what was convolved [B, channels, H, W], given that in the result [B, filters, H, W]."""
    grad, weight = channels_last(grad), channels_last(weight)
    out = _new(grad, weight.shape[1])
    arguments = *map(ctypes.c_bool, (False, True, False)), *map(pointer, (grad, weight, None, out))
    _call("convolve_tiles", grad, _convolution(grad, weight.transpose(0, 1)), *arguments)
    return out


def convolve_tiles_weights(grad: Tensor, x: Tensor, weight: Tensor, *, elu: bool) -> Tensor:
    """The gradient in the weight, given that in `convolve_tiles(x, weight, bias, elu=elu)`."""
    (x, elu), grad = _for_tiles(x, elu), channels_last(grad)
    filters, channels, kernel, _ = weight.shape
    out = torch.empty((filters, kernel, kernel, channels), dtype=x.dtype, device="cpu").permute(0, 3, 1, 2)
    _call("convolve_tiles_weights", x, _convolution(x, weight), ctypes.c_bool(elu), *map(pointer, (x, grad, out)))
    return out


def concat_elu(x: Tensor, drop: Drop) -> Tensor:
    """dropout(elu(x), elu(-x)): [B, F, H, W] -> [B, 2F, H, W]."""
    out = _new(x, 2 * x.shape[1])
    _call("concat_elu_forward", x, *_rows(x), pointer(x), *_drop(drop), pointer(out))
    return out


def concat_elu_backward(grad: Tensor, x: Tensor, drop: Drop) -> Tensor:
    """The gradient in x, given that in `concat_elu(x, drop)`."""
    grad_x, grad = _new(x, x.shape[1]), channels_last(grad)
    _call("concat_elu_backward", x, *_rows(x), pointer(grad), pointer(x), *_drop(drop), pointer(grad_x))
    return grad_x


def gate_norm(x: Tensor, gates: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """layer_norm(x + glu(gates)) over the channels, eps 1e-5, or without a gain the sum itself; gates [B, 2F, H, W]."""
    out = _new(x, x.shape[1])
    _call("gate_norm_forward", x, *_rows(x), *map(pointer, (x, gates, gain, bias, out)))
    return out


def gate_norm_backward(
    grad: Tensor, x: Tensor, gates: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients in x, gates, gain and bias."""
    grad_x, grad_gates, grad = _new(x, x.shape[1]), _new(x, 2 * x.shape[1]), channels_last(grad)
    sums = torch.zeros(2, torch.get_num_threads(), x.shape[1], dtype=x.dtype, device="cpu")
    _call("gate_norm_backward", x, *_rows(x), *map(pointer, (grad, x, gates, gain, grad_x, grad_gates, *sums)))
    grad_gain, grad_bias = sums.sum(1) if gain is not None else (None, None)
    return grad_x, grad_gates, grad_gain, grad_bias


def attention(qkv: Tensor, heads: int, drop: Drop) -> tuple[Tensor, Tensor]:
    """(dropout(softmax attention) over all positions [B, F, H, W], what `attention_backward` needs of it).

    qkv [B, 3F, H, W] is ordered (q, k, v), heads, features, of which a head has one of `flowpp.config.HEAD_SIZES`.
    """
    out, length = _new(qkv, qkv.shape[1] // 3), qkv.shape[2] * qkv.shape[3]
    log_sums = torch.empty(len(qkv), heads, length, dtype=qkv.dtype, device="cpu")
    large = out.shape[1] // heads >= _TILE_HEAD_SIZE and length >= _TILE_LENGTH
    name = "attention_tiles_forward" if large and has_tiles(qkv.dtype) else "attention_forward"
    _call(name, qkv, *_heads(qkv, heads), pointer(qkv), *_drop(drop), pointer(out), pointer(log_sums))
    return out, log_sums


def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, drop: Drop) -> Tensor:
    """The gradient in qkv, given that in `out`."""
    grad_qkv, grad = _new(qkv, qkv.shape[1]), channels_last(grad)
    given = map(pointer, (grad, qkv, out, log_sums))
    _call("attention_backward", qkv, *_heads(qkv, log_sums.shape[1]), *given, *_drop(drop), pointer(grad_qkv))
    return grad_qkv


def couple(x: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(y, log dy/dx), both [B, C, H, W], of x under the conditioner's output h [B, C (2 + 3K), H, W]."""
    x, h = _collapsible(x), _collapsible(h)
    y, terms = torch.empty(2, *x.shape, dtype=x.dtype, device="cpu")
    _call("couple", x, _shape(x, components), *_fields(x, h, y, terms))
    return y, terms


def couple_backward(grad_y: Tensor, grad_terms: Tensor, x: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(the gradient in x, that in h, in its memory format) of `couple`, given those in both its results."""
    x, h, grad_y, grad_terms = map(_collapsible, (x, h, grad_y, grad_terms))
    grad_x, grad_h = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(h)
    _call("couple_backward", x, _shape(x, components), *_fields(grad_y, grad_terms, x, h, grad_x, grad_h))
    return grad_x, grad_h


def uncouple(y: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(x, log dx/dy), the inverse of `couple`, as `flowpp.logistic.solve` finds it."""
    y, h = _collapsible(y), _collapsible(h)
    x, terms = torch.empty(2, *y.shape, dtype=y.dtype, device="cpu")
    limits = integers(evaluation_limits(y.dtype))
    _call("uncouple", y, _shape(y, components), limits, *_fields(y, h, x, terms))
    return x, terms


def _call(name: str, like: Tensor, *arguments: Any) -> Any:
    library = kernels(like.dtype)
    assert library is not None
    found = getattr(library, name)(*arguments)
    if listening.tape is not None:
        listening.tape.kernel(like.dtype, name, arguments)
    return found


def _new(x: Tensor, channels: int) -> Tensor:
    batch, _, height, width = x.shape
    return torch.empty((batch, height, width, channels), dtype=x.dtype, device="cpu").permute(0, 3, 1, 2)


def _for_tiles(x: Tensor, elu: bool) -> tuple[Tensor, bool]:
    """What is convolved, and whether concat_elu of it: that kernel takes it where F does not fill registers."""
    x = channels_last(x)
    return (concat_elu(x, (0.0, 0)), False) if elu and x.shape[1] % 16 else (x, elu)


def _convolution(x: Tensor, weight: Tensor) -> ctypes.Array:
    batch, _, height, width = x.shape
    filters, channels, kernel, _ = weight.shape
    return integers((batch, height, width, channels, filters, kernel))


def _rows(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    batch, channels, height, width = x.shape
    return ctypes.c_int64(batch * height * width), ctypes.c_int64(channels)


def _drop(drop: Drop) -> tuple[ctypes.c_uint64, ctypes.c_double]:
    probability, seed = drop
    return ctypes.c_uint64(seed), ctypes.c_double(probability)


def _heads(qkv: Tensor, heads: int) -> tuple[ctypes.Array, ctypes.c_int64]:
    batch, channels, height, width = qkv.shape
    return integers((batch, height * width, heads)), ctypes.c_int64(channels // 3 // heads)


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
