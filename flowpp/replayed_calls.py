"""The calls that a recorded pass is made of, kernels and PyTorch's operations, and the memory that they share.

A call is kept with the buffers that its arguments lie in. When all calls are known the buffers are laid out in one
piece of memory, one over another where they are not needed at once, and the calls are bound to it.
"""

import bisect
import ctypes
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flowpp.elementwise import as_kernels
from flowpp.native import kernels
from flowpp.program import Bound, BoundKernel

_ALIGNMENT = 64
"""Bytes: what PyTorch aligns memory to."""

_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default}


class State(Enum):
    ALLOCATED = 0
    """Nothing has been written to it."""
    CONSTANT = 1
    """It does not depend on the inputs."""
    VARYING = 2
    """It does: it has its place among what is laid out."""


@dataclass(eq=False)
class Buffer:
    """`size` bytes at `address` that were allocated in the pass; `first` and `last` are the calls that use them.

    `offset`, in bytes, is their place among what is laid out.
    """

    address: int
    size: int
    state: State
    first: int | None = None
    last: int = -1
    offset: int = 0

    def used(self, call: int) -> None:
        self.first = call if self.first is None else self.first
        self.last = call


@dataclass(frozen=True)
class Reference:
    """A tensor in a buffer; its offset is in elements."""

    buffer: Buffer
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]

    def of(self, arena: Tensor) -> Tensor:
        start = self.buffer.offset // self.dtype.itemsize + self.offset
        empty = torch.empty(0, dtype=self.dtype, device="cpu")
        return empty.set_(arena.untyped_storage(), start, self.shape, self.strides)


@dataclass(frozen=True)
class Address:
    """A place in a buffer; its offset is in bytes."""

    buffer: Buffer
    offset: int


@dataclass(frozen=True)
class KernelCall:
    """Of a kernel of `flowpp.native` for a dtype, with addresses for pointers into buffers."""

    dtype: torch.dtype
    name: str
    arguments: list[Any]

    def on(self, arena: Tensor, _: Container[torch.dtype]) -> Sequence[Bound]:
        start, library = arena.data_ptr(), kernels(self.dtype)
        assert library is not None
        arguments = [
            ctypes.c_void_p(start + each.buffer.offset + each.offset) if isinstance(each, Address) else each
            for each in self.arguments
        ]
        return [BoundKernel(library, self.name, arguments)]


@dataclass(frozen=True)
class OperationCall:
    """Of one of PyTorch's operations, with references for tensors in buffers; `results` are those that it allocates."""

    function: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: list[Reference]

    def on(self, arena: Tensor, dtypes: Container[torch.dtype]) -> Sequence[Bound]:
        """What writes its results: where it can, and these are of one of the `dtypes`, the kernel `elementwise`."""
        arguments, options, results = tree_map_only(
            Reference, lambda reference: reference.of(arena), (self.arguments, self.options, self.results)
        )
        if not results:
            return [partial(self.function, *arguments, **options)]
        if results[0].dtype in dtypes and (calls := as_kernels(self.function, arguments, options, results)):
            return calls
        if self.function in _COPIES:
            return [partial(_aten.copy_.default, results[0], arguments[0])]
        into, names = _into(self.function)
        if into is not None:
            return [partial(into, *arguments, **options, **dict(zip(names, results, strict=True)))]
        return [partial(_copy_results, partial(self.function, *arguments, **options), results)]


@lru_cache
def _into(function: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload | None, list[str]]:
    """The same operation with its results given, and the names of those; none where there is none."""
    wanted = [(argument.name, str(argument.type)) for argument in function._schema.arguments]
    for overload in function.overloadpacket.overloads():
        other = getattr(function.overloadpacket, overload)
        given = [(argument.name, str(argument.type)) for argument in other._schema.arguments if not argument.is_out]
        names = [argument.name for argument in other._schema.arguments if argument.is_out]
        if names and given == wanted:
            return other, names
    return None, []


def _copy_results(function: Callable[[], Any], results: list[Tensor]) -> None:
    for result, found in zip(results, tree_leaves(function()), strict=True):
        result.copy_(found)


def _given(function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """What an operation is called with, by its names for it."""
    declared = function._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    return defaults | {argument.name: each for argument, each in zip(declared, arguments, strict=False)} | options


def is_random(function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Attention is only where it drops something."""
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return False
    return bool(_given(function, arguments, options).get("dropout_p", 1))


def written(function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """Of its arguments those that the operation changes."""
    given = _given(function, arguments, options)
    changed = [each.name for each in function._schema.arguments if each.alias_info and each.alias_info.is_write]
    return tensors([given[name] for name in changed])


def tensors(parts: Any) -> list[Tensor]:
    """Those in a nest of lists, tuples and dictionaries."""
    return [each for each in tree_leaves(parts) if isinstance(each, Tensor)]


def lay_out(buffers: Iterable[Buffer]) -> int:
    """Gives each varying buffer its place, over those that are done with; the bytes that all take together."""
    size = 0
    placed: list[Buffer] = []
    used = [each for each in buffers if each.state is State.VARYING and each.first is not None]
    for buffer in sorted(used, key=lambda buffer: buffer.first or 0):
        assert buffer.first is not None
        placed = [other for other in placed if other.last >= buffer.first]
        buffer.offset = 0
        for other in placed:  # by offset
            if buffer.offset + buffer.size <= other.offset:
                break
            buffer.offset = max(buffer.offset, _aligned(other.offset + other.size))
        bisect.insort(placed, buffer, key=lambda other: other.offset)
        size = max(size, buffer.offset + buffer.size)
    return size


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
