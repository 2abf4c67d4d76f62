"""Programs: kernels that are called one after another, all of them in one call, which Python's lock is not held in."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BoundKernel:
    """A kernel of `library` with its arguments, as ctypes has them, and `held`, what they point to."""

    library: ctypes.CDLL
    name: str
    arguments: Sequence[Any]
    held: Any = None


Bound = BoundKernel | Callable[[], object]
"""What is to be called, with all that it takes."""


class _Call(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))  # flowpp/kernels/kernels.cpp


class Program:
    """Kernels of one library, to be called in their order."""

    def __init__(self, kernels: Sequence[BoundKernel]) -> None:
        self._held: list[Any] = []
        self._run = kernels[0].library.run
        self._calls = (_Call * len(kernels))(*map(self._call, kernels))
        self._count = ctypes.c_int64(len(kernels))

    def __call__(self) -> None:
        self._run(self._calls, self._count)

    def _call(self, kernel: BoundKernel) -> _Call:
        function = getattr(kernel.library, f"{kernel.name}_of")
        values = [_passed(argument) for argument in kernel.arguments]
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self._held += [kernel, values, places]
        return _Call(ctypes.cast(function, ctypes.c_void_p), ctypes.cast(places, ctypes.c_void_p))


def _passed(argument: Any) -> Any:
    """An argument as C passes it: of an array, where it begins."""
    return ctypes.c_void_p(ctypes.addressof(argument)) if isinstance(argument, ctypes.Array) else argument


def in_programs(calls: Iterable[Bound]) -> list[Callable[[], object]]:
    """The same calls, with kernels that follow one another as one."""
    found: list[Callable[[], object]] = []
    kernels: list[BoundKernel] = []
    for call in [*calls, None]:
        if kernels and not (isinstance(call, BoundKernel) and call.library is kernels[0].library):
            found.append(Program(kernels))
            kernels = []
        if isinstance(call, BoundKernel):
            kernels.append(call)
        elif call is not None:
            found.append(call)
    return found
