"""Replays: passes over inputs of one shape, recorded once, then computed again without Python's and PyTorch's share.

A pass of a small model takes longer to find out what is to be computed than to compute it. A recording keeps the calls
alone: of the kernels and of PyTorch's operations, in their order, on memory that is laid out ahead; what depends on the
weights alone is computed once. It is what a CUDA graph is to a GPU.
"""

import bisect
import ctypes
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from flowpp.native import Key, listening

logger = logging.getLogger(__name__)

MOST_ROWS = 8
"""Of a pass that is recorded; of more no row is faster, and what passes between the layers would leave the caches."""

_ALIGNMENT = 64
"""Bytes: what PyTorch aligns memory to."""

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
_COPIES = {_aten.clone.default, _aten._to_copy.default}

Pass = Callable[..., tuple[Tensor, ...]]
"""Of tensors [B, ...]; what it gives, [B, ...], is of each row a function of that row alone."""


_Known = tuple[Hashable, ...]
_Constants = dict[_Known, Any]
"""What has been computed from the weights alone, by the operation and what it took."""


class CannotReplay(RuntimeError):
    """A pass does what a recording cannot repeat; the message says what."""


class Replays:
    """Recordings of a module's passes, made as they are needed; several threads may compute at once.

    A recording holds the weights as they are: after a change of one of `parameters`, passes are recorded anew.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self._weights: list[tuple[int, int]] = []
        self._free: dict[tuple[object, ...], list[Replay]] = {}
        self._constants: _Constants = {}
        self._begun: set[str] = set()
        self._refused: set[str] = set()
        self._changing, self._recording = threading.Lock(), threading.Lock()
        self._arenas = 0
        self.count = 0
        """Recordings of the weights as they are."""
        self.nbytes = sum(parameter.nbytes for parameter in self.parameters)
        """Of the parameters and all recordings."""

    def __call__(self, name: str, function: Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the `function` of that name gives, without gradients, in parts of up to `MOST_ROWS` rows."""
        found = [self._part(name, function, *(given[part] for given in inputs)) for part in _parts(len(inputs[0]))]
        return tuple(torch.cat(each) for each in zip(*found, strict=True)) if len(found) != 1 else found[0]

    def _part(self, name: str, function: Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        if name in self._refused:
            return function(*inputs)
        weights = [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in self.parameters]
        key = _kind(name, inputs)
        with self._changing:
            if weights != self._weights:
                self._free, self._constants, self._begun, self._weights = {}, {}, set(), weights
                self._arenas = self.count = 0
            constants = self._constants
            free = self._free.setdefault(key, [])
            replay = free.pop() if free else None
        try:
            replay = replay or self._record(name, function, inputs, constants)
        except CannotReplay as error:
            logger.warning("%s is computed without a recording: %s", name, error)
            self._refused.add(name)
            return function(*inputs)
        found = replay(*inputs)
        with self._changing:
            if weights == self._weights:
                free.append(replay)
        return found

    def __reduce__(self) -> tuple[Any, ...]:  # of a copy of the module, whose recordings are its own
        return Replays, (self.parameters,)

    def _record(self, name: str, function: Pass, inputs: Sequence[Tensor], constants: "_Constants") -> "Replay":
        """A recording; of a pass of that name one over a single row first, if there is none.

        What is computed from the weights then is: among what a pass over more rows allocates and frees it would lie so
        that their memory could not be used again. And it is tried on other inputs, too.
        """
        with self._recording:
            if name not in self._begun:
                row = [given[:1] for given in inputs]
                first = Replay(function, row, constants)
                mirrored = [given.flip(-1) for given in row]
                first.check(mirrored, function(*mirrored))
                self._begun.add(name)
                self._counted(first)
                if len(inputs[0]) == 1:
                    return first
                with self._changing:
                    self._free.setdefault(_kind(name, row), []).append(first)
            return self._counted(Replay(function, inputs, constants))

    def _counted(self, replay: "Replay") -> "Replay":
        with self._changing:
            self._arenas, self.count = self._arenas + replay.nbytes, self.count + 1
            held = _tensors((self.parameters, list(self._constants.values())))
            storages = {_key(tensor): tensor.untyped_storage() for tensor in held}
            self.nbytes = self._arenas + sum(storage.nbytes() for storage in storages.values())
        return replay


def _kind(name: str, inputs: Sequence[Tensor]) -> tuple[object, ...]:
    return name, *((given.shape, given.dtype) for given in inputs)


def _parts(n: int) -> Iterator[slice]:
    """Of n rows, nearly equal ones: each size has recordings of its own, and there are few sizes."""
    count = -(-n // MOST_ROWS)
    return (slice(i * n // count, (i + 1) * n // count) for i in range(count))


class Replay:
    """One recorded pass, of `function` over inputs of these shapes; for one thread at a time.

    Recording computes `function` once. Raises `CannotReplay`, also where what is replayed is not what `function` gave.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, function: Pass, inputs: Sequence[Tensor], constants: "_Constants") -> None:
        copies = [given.clone() for given in inputs]
        tape = _Tape(copies, constants)
        with tape.on():
            expected = function(*copies)
        outputs = tape.end(expected)
        arena = torch.full((tape.lay_out(),), 255, dtype=torch.uint8)  # NaN, where a step were missing
        self._inputs = [reference.of(arena) for reference in tape.inputs]
        self._outputs = [each.of(arena) if isinstance(each, _Reference) else each for each in outputs]
        self._steps = [step.on(arena) for step in tape.steps]
        self._held = tape.held
        self.nbytes = arena.nbytes
        self.check(inputs, expected)

    def check(self, inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Raises `CannotReplay` where it does not give what is expected."""
        for ours, theirs in zip(self(*inputs), expected, strict=True):
            if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()), equal_nan=True):
                raise CannotReplay("a replay gave other numbers")

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for copy, given in zip(self._inputs, inputs, strict=True):
            copy.copy_(given)
        for step in self._steps:
            step()
        return tuple(output.clone() for output in self._outputs)


class _State(Enum):
    ALLOCATED = 0
    """Nothing has been written to it."""
    CONSTANT = 1
    """It does not depend on the inputs."""
    VARYING = 2
    """It does: it has its place among what is laid out."""


@dataclass(eq=False)
class _Buffer:
    """Memory that was allocated in the pass; `first` and `last` are the steps that use it."""

    address: int
    size: int
    state: _State
    first: int | None = None
    last: int = -1
    offset: int = 0

    def used(self, step: int) -> None:
        self.first = step if self.first is None else self.first
        self.last = step


@dataclass(frozen=True)
class _Reference:
    """A tensor in a buffer."""

    buffer: _Buffer
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]

    def of(self, arena: Tensor) -> Tensor:
        start = self.buffer.offset // self.dtype.itemsize + self.offset
        return torch.empty(0, dtype=self.dtype).set_(arena.untyped_storage(), start, self.shape, self.strides)


@dataclass(frozen=True)
class _Address:
    """A place in a buffer."""

    buffer: _Buffer
    offset: int


@dataclass(frozen=True)
class _Kernel:
    function: Callable[..., object]
    arguments: list[Any]

    def on(self, arena: Tensor) -> Callable[[], object]:
        start = arena.data_ptr()
        return partial(
            self.function,
            *(
                ctypes.c_void_p(start + each.buffer.offset + each.offset) if isinstance(each, _Address) else each
                for each in self.arguments
            ),
        )


@dataclass(frozen=True)
class _Operation:
    """One of PyTorch's; `results` are those that it allocates."""

    function: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: list[_Reference]

    def on(self, arena: Tensor) -> Callable[[], object]:
        arguments, options, results = tree_map_only(
            _Reference, lambda reference: reference.of(arena), (self.arguments, self.options, self.results)
        )
        if not results:
            return partial(self.function, *arguments, **options)
        if self.function in _COPIES:
            return partial(_aten.copy_.default, results[0], arguments[0])
        into, names = _into(self.function)
        if into is not None:
            return partial(into, *arguments, **options, **dict(zip(names, results, strict=True)))
        return partial(_copy_results, partial(self.function, *arguments, **options), results)


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


@dataclass
class _Tape:
    """What a pass over `given` calls, and the memory that it uses."""

    given: list[Tensor]
    constants: "_Constants"
    held: list[Any] = field(default_factory=list)
    """Constants, which steps may read."""
    inputs: list[_Reference] = field(default_factory=list)
    steps: list[_Kernel | _Operation] = field(default_factory=list)
    _all: list[_Buffer] = field(default_factory=list)
    _living: dict[int, tuple[_Buffer, StorageWeakRef]] = field(default_factory=dict)
    """Those whose memory has not been freed, by the name of their storage, which others may have after them."""

    @contextmanager
    def on(self) -> Iterator[None]:
        for tensor in self.given:
            self._allocated(tensor, _State.VARYING).used(-1)
        self.inputs = [self._reference(tensor) for tensor in self.given]
        listening.tape = self
        try:
            with _Dispatch(self):
                yield
        finally:
            listening.tape = None

    def end(self, results: Iterable[Tensor]) -> list["_Reference | Tensor"]:
        """The results, which nothing is laid over."""
        found = [self._reference(each) if self._state(each) is _State.VARYING else each for each in results]
        for each in found:
            if isinstance(each, _Reference):
                each.buffer.used(len(self.steps))
        return found

    def lay_out(self) -> int:
        """Gives each varying buffer its place, over those that are done with; the bytes that all take together."""
        size = 0
        placed: list[_Buffer] = []
        used = [each for each in self._all if each.state is _State.VARYING and each.first is not None]
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

    def known(
        self, function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[_Known | None, Any]:
        """Of an operation on weights its name among the constants, and what it gave another recording."""
        given = _tensors((arguments, options))
        if not given or function._schema.is_mutable or _is_random(function, arguments, options):
            return None, None
        if any(self._state(tensor) is not _State.CONSTANT for tensor in given):
            return None, None
        name = function, *map(_named, tree_leaves((arguments, options))), *options
        return name, self._found(name)

    def once(self, make: Callable[[Tensor, Key], Tensor], tensor: Tensor, key: Key) -> Tensor | None:
        if self._state(tensor) is not _State.CONSTANT:
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
        given, results = _tensors((arguments, options)), _tensors(found)
        keys = {_key(tensor) for tensor in given}
        fresh = [tensor for tensor in results if (key := _key(tensor)) not in keys and key not in self._living]
        if function in _ALLOCATIONS:
            for tensor in fresh:
                self._allocated(tensor, _State.ALLOCATED)
            return True
        written = _written(function, arguments, options)
        if function in _FACTORIES or all(self._state(tensor) is not _State.VARYING for tensor in given):
            if _is_random(function, arguments, options):
                raise CannotReplay(f"{function} is random")
            for tensor in fresh:
                self._allocated(tensor, _State.CONSTANT)
            for tensor in written:
                self._becomes(tensor, _State.CONSTANT)
            self.held += fresh + written
            return bool(fresh)
        if _is_random(function, arguments, options) or torch.Tag.dynamic_output_shape in function.tags:
            raise CannotReplay(f"what {function} gives is random, or of a size that depends on what it is given")
        if len(results) != len(tree_leaves(found)):
            raise CannotReplay(f"{function} gives other things than tensors")
        for tensor in written:
            self._becomes(tensor, _State.VARYING)
        for tensor in fresh:
            self._allocated(tensor, _State.VARYING)
        if fresh or written:
            self.steps.append(_Operation(function, *self._referring((arguments, options, fresh))))
        return bool(fresh)

    def kernel(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        """Hears of a kernel that has computed: of what is varying, into what was only allocated."""
        places = [self._place(each) if isinstance(each, ctypes.c_void_p) else None for each in arguments]
        buffers = [place.buffer for place in places if place is not None]
        varies = any(buffer.state is _State.VARYING for buffer in buffers)
        for buffer in buffers:
            if buffer.state is _State.ALLOCATED:
                buffer.state = _State.VARYING if varies else _State.CONSTANT
                if not varies:
                    self.held += [_strong(weak) for other, weak in self._living.values() if other is buffer]
        if varies:
            for buffer in buffers:
                buffer.used(len(self.steps))
            of_arena = [
                place if place is not None and place.buffer.state is _State.VARYING else given
                for place, given in zip(places, arguments, strict=True)
            ]
            self.steps.append(_Kernel(function, of_arena))

    def _place(self, pointer: ctypes.c_void_p) -> _Address | None:
        for buffer, weak in self._living.values():
            if (
                pointer.value is not None
                and not weak.expired()
                and buffer.address <= pointer.value < buffer.address + buffer.size
            ):
                return _Address(buffer, pointer.value - buffer.address)
        return None

    def _allocated(self, tensor: Tensor, state: _State) -> _Buffer:
        for freed in [key for key, (_, weak) in self._living.items() if weak.expired()]:
            del self._living[freed]
        storage = tensor.untyped_storage()
        buffer = _Buffer(storage.data_ptr(), storage.nbytes(), state)
        self._living[_key(tensor)] = buffer, StorageWeakRef(storage)
        self._all.append(buffer)
        return buffer

    def _becomes(self, tensor: Tensor, state: _State) -> None:
        buffer = self._buffer(tensor)
        if buffer is None or buffer.state is _State.CONSTANT:
            raise CannotReplay("it changes what does not depend on its inputs")
        buffer.state = state

    def _buffer(self, tensor: Tensor) -> _Buffer | None:
        return self._living.get(_key(tensor), (None,))[0]

    def _state(self, tensor: Tensor) -> _State:
        buffer = self._buffer(tensor)
        return _State.CONSTANT if buffer is None else buffer.state

    def _reference(self, tensor: Tensor) -> _Reference:
        buffer = self._living[_key(tensor)][0]
        return _Reference(buffer, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def _referring(self, parts: Any) -> Any:
        """The same with references for varying tensors, which the next step uses."""

        def refer(tensor: Tensor) -> Tensor | _Reference:
            if self._state(tensor) is not _State.VARYING:
                return tensor
            reference = self._reference(tensor)
            reference.buffer.used(len(self.steps))
            return reference

        return tree_map_only(Tensor, refer, parts)


class _Dispatch(TorchDispatchMode):
    def __init__(self, tape: _Tape) -> None:
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


def _given(function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """What an operation is called with, by its names for it."""
    declared = function._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    return defaults | {argument.name: each for argument, each in zip(declared, arguments, strict=False)} | options


def _is_random(function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Attention is only where it drops something."""
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return False
    return bool(_given(function, arguments, options).get("dropout_p", 1))


def _written(function: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """Of its arguments those that the operation changes."""
    given = _given(function, arguments, options)
    changed = [each.name for each in function._schema.arguments if each.alias_info and each.alias_info.is_write]
    return _tensors([given[name] for name in changed])


def _named(argument: Any) -> Any:
    """An argument as part of a constant's name: a tensor by its place, which nothing else has while it is held."""
    if not isinstance(argument, Tensor):
        return argument
    return _key(argument), argument.dtype, argument.storage_offset(), argument.shape, argument.stride()


def _tensors(parts: Any) -> list[Tensor]:
    return [each for each in tree_leaves(parts) if isinstance(each, Tensor)]


def _strong(weak: StorageWeakRef) -> torch.UntypedStorage:
    return torch.UntypedStorage._new_with_weak_ptr(weak.cdata)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
