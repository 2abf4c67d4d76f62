"""PyTorch's copies and arithmetic as calls of the kernel `elementwise`, which gives the same numbers, bit for bit.

On what a layer of a small model gives, PyTorch takes longer to find out what to do than to do it.
"""

import ctypes
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flowpp.native import integers, kernels, pointer
from flowpp.program import BoundKernel

_aten = torch.ops.aten
_COPY, _NEGATE, _ADD, _SUBTRACT, _MULTIPLY, _DIVIDE = range(6)  # flowpp/kernels/elementwise.h
_MOST_DIMENSIONS = 8
_COPIES = {_aten.clone.default, _aten._to_copy.default}
_OF_TWO = {
    _aten.add.Tensor: _ADD,
    _aten.sub.Tensor: _SUBTRACT,
    _aten.mul.Tensor: _MULTIPLY,
    _aten.div.Tensor: _DIVIDE,
}


def as_kernels(
    function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any], results: list[Tensor]
) -> list[BoundKernel] | None:
    """Calls that write what `function` gives into `results`, all of one dtype for which there are kernels.

    None where it is no copy and no arithmetic, or of other things than such tensors and numbers.
    """
    parts = list(_parts(function, arguments, options, results[0])) if len(results) == 1 else []
    calls = [_elementwise(*part) for part in parts]
    return [call for call in calls if call is not None] if calls and None not in calls else None


_Part = tuple[int, Tensor, Any, Any]
"""Operation, where to, and of what: a and b."""


def _parts(
    function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any], out: Tensor
) -> Iterator[_Part]:
    if function in _COPIES:
        yield _COPY, out, arguments[0], arguments[0]
    elif function is _aten.neg.default:
        yield _NEGATE, out, arguments[0], arguments[0]
    elif function is _aten.pow.Tensor_Scalar and arguments[1] == 2:
        yield _MULTIPLY, out, arguments[0], arguments[0]
    elif function in _OF_TWO and len(arguments) == 2 and not options:
        yield _OF_TWO[function], out, *arguments
    elif function in (_aten.cat.default, _aten.stack.default):
        dimension, start = (*arguments, 0)[1], 0
        parts = (
            [each.unsqueeze(dimension) for each in arguments[0]] if function is _aten.stack.default else arguments[0]
        )
        if any(each.dim() != out.dim() for each in parts):  # PyTorch lets empty vectors be among them
            return
        for given in parts:
            size = given.shape[dimension]
            yield _COPY, out.narrow(dimension, start, size), given, given
            start += size


def _elementwise(operation: int, out: Tensor, a: Any, b: Any) -> BoundKernel | None:
    a, b = (
        torch.tensor(each, dtype=out.dtype, device="cpu") if type(each) in (int, float) else each for each in (a, b)
    )
    library = kernels(out.dtype)
    if library is None or not all(isinstance(each, Tensor) and each.dtype == out.dtype for each in (a, b)):
        return None
    shape, strides = _collapsed(out, a.expand(out.shape), b.expand(out.shape))
    if len(shape) > _MOST_DIMENSIONS:
        return None
    numbers = *map(ctypes.c_int64, (operation, len(shape))), integers(shape), integers(strides)
    return BoundKernel(library, "elementwise", (*numbers, *map(pointer, (out, a, b))), (out, a, b))


def _collapsed(*tensors: Tensor) -> tuple[list[int], list[int]]:
    """Their shape and the strides of each, with as few dimensions as there can be, in order of the first's memory."""
    every = zip(tensors[0].shape, *(each.stride() for each in tensors), strict=True)
    found: list[tuple[int, ...]] = []
    for size, *strides in sorted((each for each in every if each[0] != 1), key=lambda each: -each[1]):
        if found and list(found[-1][1:]) == [size * stride for stride in strides]:
            size *= found.pop()[0]
        found.append((size, *strides))
    shape, *columns = zip(*(found or [(1, *(1 for _ in tensors))]), strict=True)
    return list(shape), list(chain.from_iterable(columns))
