"""CIFAR-10's official batch files, the python (pickle) and the binary version."""

import io
import pickle
import pickletools
import re
from typing import Any, Self

import numpy as np

from flowpp.images import BadImages

MAX_BATCH_BYTES = 64 * 2**20
"""An official batch of 10,000 images has 31 MB."""

COMPANIONS = {"batches.meta", "batches.meta.txt", "readme.html"}
"""Files of the official archives that hold no images."""

_BATCH = re.compile(r"(data_batch_\d|test_batch)(\.bin)?")
_MAX_MEMO = 1_000_000  # Python's memo is an array of up to twice the greatest index; official ones end at 20,100


def is_batch(file: str) -> bool:
    """Whether a file of this name is one of CIFAR-10's batches."""
    return _BATCH.fullmatch(file) is not None


def read_batch(data: bytes, name: str) -> np.ndarray:
    """The images of one batch file, uint8 [N, 32, 32, 3]. Raises `BadImages`."""
    rows = _binary_rows(data, name) if name.endswith(".bin") else _pickled_rows(data, name)
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _binary_rows(data: bytes, name: str) -> np.ndarray:
    if not data or len(data) % 3073:
        message = f"has {len(data):,} bytes; a binary CIFAR-10 batch has a positive multiple of 3,073"
        raise BadImages("damaged_batch", message, name)
    return np.frombuffer(data, np.uint8).reshape(-1, 3073)[:, 1:]


def _pickled_rows(data: bytes, name: str) -> np.ndarray:
    try:
        batch = _unpickle(data)
        rows = (batch.get(b"data") or batch["data"]).rows()
    except _Unsafe as error:
        message = f"is refused as a CIFAR-10 batch: {error}; a batch is a dict of one uint8 array, lists and strings"
        raise BadImages("unsafe_pickle", message, name) from error
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        message = f"is no CIFAR-10 batch: a pickled dict with uint8 'data' [N, 3072] is expected ({error!r:.200})"
        raise BadImages("damaged_batch", message, name) from error
    return rows


class _Unsafe(Exception):
    """What no batch has and only an attack would."""


# Stand-ins for what a pickled array calls. They hold what they are given and run nothing of numpy. All are classes
# with a __setstate__, so that a pickle's BUILD can set attributes on none of them.


class _Array:
    """For `numpy.ndarray`, and for `_reconstruct`, whose arguments do not matter: the state follows."""

    def __init__(self, *_: object) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def rows(self) -> np.ndarray:
        """The array, uint8 [N, 3072]."""
        _, shape, dtype, column_major, data = self.state
        if dtype.code not in ("u1", "|u1") or len(shape) != 2 or shape[1] != 3072 or not shape[0]:
            raise ValueError(f"array of shape {shape} and dtype {dtype.code}")
        values = np.frombuffer(data.encode("latin-1") if isinstance(data, str) else data, np.uint8)
        return values.reshape(shape, order="F" if column_major else "C")


class _Buffer(_Array):
    """For `_frombuffer`, by which pickle protocol 5 makes arrays."""

    def __init__(self, data: bytes, dtype: "_Dtype", shape: tuple, order: str) -> None:
        self.state = (1, shape, dtype, order == "F", data)


class _Dtype:
    """For `numpy.dtype`."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: tuple) -> None:
        """Byte order and alignment, of which uint8 has none."""


class _Bytes(bytes):
    """For `_codecs.encode(text, "latin1")`, by which Python 3 writes bytes that Python 2 can read."""

    def __new__(cls, text: str, encoding: str) -> Self:
        return super().__new__(cls, text.encode("latin-1"))

    def __setstate__(self, state: object) -> None:
        raise _Unsafe("state for bytes")


_STAND_INS = {
    "numpy ndarray": _Array,
    "numpy dtype": _Dtype,
    "numpy.core.multiarray _reconstruct": _Array,
    "numpy._core.multiarray _reconstruct": _Array,
    "numpy.core.numeric _frombuffer": _Buffer,
    "numpy._core.numeric _frombuffer": _Buffer,
    "_codecs encode": _Bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        try:
            return _STAND_INS[f"{module} {name}"]
        except KeyError:
            raise _Unsafe(f"it names {module}.{name}") from None


def _unpickle(data: bytes) -> dict[Any, Any]:
    """The pickled object, its arrays as `_Array`."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > _MAX_MEMO:
            raise _Unsafe(f"it has memo index {argument}; at most {_MAX_MEMO:,} is accepted")
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()
