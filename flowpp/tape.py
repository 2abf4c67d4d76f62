"""The tape of a pass: the calls that depend on its inputs, and what it computes from the weights alone."""

import ctypes
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from flowpp.native import Key, listening
from flowpp.replayed_calls import (
    Address,
    Buffer,
    KernelCall,
    OperationCall,
    Reference,
    State,
    is_random,
    tensors,
    written,
)

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_FACTORIES = {
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
}
"""They take no more of a tensor than its kind."""

_Known = tuple[Hashable, ...]
Constants = dict[_Known, Any]
"""What has been computed from the weights alone, by the operation and what it took."""


class CannotReplay(RuntimeError):
    """A pass does what a recording cannot repeat; the message says what."""


@dataclass
class Tape:
    """What a pass over `given` calls, and the memory that it uses."""

    given: list[Tensor]
    constants: Constants
    held: list[Any] = field(default_factory=list)
    """Constants, which steps may read."""
    inputs: list[Reference] = field(default_factory=list)
    calls: list[KernelCall | OperationCall] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    _living: dict[int, tuple[Buffer, StorageWeakRef]] = field(default_factory=dict)
    """Those whose memory has not been freed, by the name of their storage, which others may have after them."""

    @contextmanager
    def on(self) -> Iterator[None]:
        for tensor in self.given:
            self._allocated(tensor, State.VARYING).used(-1)
        self.inputs = [self._reference(tensor) for tensor in self.given]
        listening.tape = self
        try:
            with _Dispatch(self):
                yield
        finally:
            listening.tape = None

    def end(self, results: Iterable[Tensor]) -> list[Reference | Tensor]:
        """The results, which nothing is laid over."""
        found = [self._reference(each) if self._state(each) is State.VARYING else each for each in results]
        for each in found:
            if isinstance(each, Reference):
                each.buffer.used(len(self.calls))
        return found

    def known(
        self, function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[_Known | None, Any]:
        """Of an operation on weights its name among the constants, and what it gave another recording."""
        given = tensors((arguments, options))
        if not given or function._schema.is_mutable or is_random(function, arguments, options):
            return None, None
        if any(self._state(tensor) is not State.CONSTANT for tensor in given):
            return None, None
        name = function, *map(_named, tree_leaves((arguments, options))), *options
        return name, self._found(name)

    def once(self, make: Callable[[Tensor, Key], Tensor], tensor: Tensor, key: Key) -> Tensor | None:
        if self._state(tensor) is not State.CONSTANT:
            return None
        name = make, _named(tensor), key
        found = self._found(name)
        return self.keep(name, make(tensor, key), tensor) if found is None else found

    def _found(self, name: _Known) -> Any:
        found, _ = self.constants.get(name, (None, None))
        self.held.append(found)
        return tree_map_only(Tensor, Tensor.detach, found)  # autograd wants another tensor each time

    def keep(self, name: _Known, found: Any, given: Any) -> Any:
        """A constant, for other recordings, too, with what it was made of: the name is theirs while they are held."""
        self.constants[name] = found, given
        self.held.append(found)
        return found

    def operation(
        self, function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any], found: Any
    ) -> bool:
        """Hears of an operation, and tells whether it allocated something: it did more than look another way."""
        given, results = tensors((arguments, options)), tensors(found)
        keys = {storage_of(tensor) for tensor in given}
        fresh = [tensor for tensor in results if (key := storage_of(tensor)) not in keys and key not in self._living]
        if function in _ALLOCATIONS:
            for tensor in fresh:
                self._allocated(tensor, State.ALLOCATED)
            return True
        changed = written(function, arguments, options)
        if is_random(function, arguments, options):
            raise CannotReplay(f"{function} is random")
        if function in _FACTORIES or all(self._state(tensor) is not State.VARYING for tensor in given):
            for tensor in fresh:
                self._allocated(tensor, State.CONSTANT)
            for tensor in changed:
                self._becomes(tensor, State.CONSTANT)
            self.held += fresh + changed
            return bool(fresh)
        if torch.Tag.dynamic_output_shape in function.tags:
            raise CannotReplay(f"what {function} gives is of a size that depends on what it is given")
        if len(results) != len(tree_leaves(found)):
            raise CannotReplay(f"{function} gives other things than tensors")
        for tensor in changed:
            self._becomes(tensor, State.VARYING)
        for tensor in fresh:
            self._allocated(tensor, State.VARYING)
        if fresh or changed:
            self.calls.append(OperationCall(function, *self._referring((arguments, options, fresh))))
        return bool(fresh)

    def kernel(self, dtype: torch.dtype, name: str, arguments: tuple[Any, ...]) -> None:
        """Hears of a kernel that has computed: of what is varying, into what was only allocated."""
        places = [self._place(each) if isinstance(each, ctypes.c_void_p) else None for each in arguments]
        buffers = [place.buffer for place in places if place is not None]
        varies = any(buffer.state is State.VARYING for buffer in buffers)
        for buffer in buffers:
            if buffer.state is State.ALLOCATED:
                buffer.state = State.VARYING if varies else State.CONSTANT
                if not varies:
                    self.held += [_strong(weak) for other, weak in self._living.values() if other is buffer]
        if varies:
            for buffer in buffers:
                buffer.used(len(self.calls))
            of_arena = [
                place if place is not None and place.buffer.state is State.VARYING else given
                for place, given in zip(places, arguments, strict=True)
            ]
            self.calls.append(KernelCall(dtype, name, of_arena))

    def _place(self, pointer: ctypes.c_void_p) -> Address | None:
        for buffer, weak in self._living.values():
            if (
                pointer.value is not None
                and not weak.expired()
                and buffer.address <= pointer.value < buffer.address + buffer.size
            ):
                return Address(buffer, pointer.value - buffer.address)
        return None

    def _allocated(self, tensor: Tensor, state: State) -> Buffer:
        for freed in [key for key, (_, weak) in self._living.items() if weak.expired()]:
            del self._living[freed]
        storage = tensor.untyped_storage()
        buffer = Buffer(storage.data_ptr(), storage.nbytes(), state)
        self._living[storage_of(tensor)] = buffer, StorageWeakRef(storage)
        self.buffers.append(buffer)
        return buffer

    def _becomes(self, tensor: Tensor, state: State) -> None:
        buffer = self._buffer(tensor)
        if buffer is None or buffer.state is State.CONSTANT:
            raise CannotReplay("it changes what does not depend on its inputs")
        buffer.state = state

    def _buffer(self, tensor: Tensor) -> Buffer | None:
        return self._living.get(storage_of(tensor), (None,))[0]

    def _state(self, tensor: Tensor) -> State:
        buffer = self._buffer(tensor)
        return State.CONSTANT if buffer is None else buffer.state

    def _reference(self, tensor: Tensor) -> Reference:
        buffer = self._living[storage_of(tensor)][0]
        return Reference(buffer, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def _referring(self, parts: Any) -> Any:
        """The same with references for varying tensors, which the next step uses."""

        def refer(tensor: Tensor) -> Tensor | Reference:
            if self._state(tensor) is not State.VARYING:
                return tensor
            reference = self._reference(tensor)
            reference.buffer.used(len(self.calls))
            return reference

        return tree_map_only(Tensor, refer, parts)


class _Dispatch(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would import its compiler, a second's work, to keep it off

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        name, found = self._tape.known(function, arguments, options or {})
        if found is None:
            found = function(*arguments, **(options or {}))
            computed = self._tape.operation(function, arguments, options or {}, found)
            if name is not None and computed:
                self._tape.keep(name, found, (arguments, options))
        return found


def _named(argument: Any) -> Any:
    """An argument as part of a constant's name: a tensor by its place, which nothing else has while it is held."""
    if not isinstance(argument, Tensor):
        return argument
    return storage_of(argument), argument.dtype, argument.storage_offset(), argument.shape, argument.stride()


def _strong(weak: StorageWeakRef) -> torch.UntypedStorage:
    return torch.UntypedStorage._new_with_weak_ptr(weak.cdata)


def storage_of(tensor: Tensor) -> int:
    """A name for the memory that a tensor lies in, which nothing else has while that is not freed."""
    return tensor.untyped_storage()._cdata
