"""Replays: passes over inputs of one shape, recorded once, then computed again without Python's and PyTorch's share.

A pass of a small model takes longer to find out what is to be computed than to compute it. A recording keeps the calls
alone: of the kernels and of PyTorch's operations, in their order, on memory that is laid out ahead; what depends on the
weights alone is computed once. It is what a CUDA graph is to a GPU.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flowpp.program import in_programs
from flowpp.replayed_calls import KernelCall, Reference, lay_out, tensors
from flowpp.tape import CannotReplay, Constants, Tape, storage_of

logger = logging.getLogger(__name__)

MOST_ROWS = 8
"""Of a pass that is recorded; of more no row is faster, and what passes between the layers would leave the caches."""

Pass = Callable[..., tuple[Tensor, ...]]
"""Of tensors [B, ...]; what it gives, [B, ...], is of each row a function of that row alone."""


class Replays:
    """Recordings of a module's passes, made as they are needed; several threads may compute at once.

    A recording holds the weights as they are: after a change of one of `parameters`, passes are recorded anew.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self._weights: list[tuple[int, int]] = []
        self._free: dict[tuple[object, ...], list[Replay]] = {}
        self._constants: Constants = {}
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

    def _record(self, name: str, function: Pass, inputs: Sequence[Tensor], constants: Constants) -> "Replay":
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
            held = tensors((self.parameters, list(self._constants.values())))
            storages = {storage_of(tensor): tensor.untyped_storage() for tensor in held}
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
    def __init__(self, function: Pass, inputs: Sequence[Tensor], constants: Constants) -> None:
        copies = [given.clone() for given in inputs]
        tape = Tape(copies, constants)
        with tape.on():
            expected = function(*copies)
        outputs = tape.end(expected)
        # NaN, where a call were missing
        arena = torch.full((lay_out(tape.buffers),), 255, dtype=torch.uint8, device="cpu")
        self._inputs = [reference.of(arena) for reference in tape.inputs]
        self._outputs = [each.of(arena) if isinstance(each, Reference) else each for each in outputs]
        dtypes = {call.dtype for call in tape.calls if isinstance(call, KernelCall)}
        self._calls = in_programs(chain.from_iterable(call.on(arena, dtypes) for call in tape.calls))
        self._held = tape.held
        self.nbytes = arena.nbytes
        self.check(inputs, expected)

    def check(self, inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Raises `CannotReplay` where it does not give what is expected."""
        for ours, theirs in zip(self(*inputs), expected, strict=True):
            size = float(theirs.abs().nan_to_num(0, 0).max())  # of a model that has diverged, too
            if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * size, equal_nan=True):
                raise CannotReplay("a replay gave other numbers")

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for copy, given in zip(self._inputs, inputs, strict=True):
            copy.copy_(given)
        for call in self._calls:
            call()
        return tuple(output.clone() for output in self._outputs)
