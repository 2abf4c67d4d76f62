"""CIFAR-10's official batch files, the python (pickle) and the binary version."""

import io
import pickle
import pickletools
import re
from typing import Any, ClassVar, Self

import numpy as np

from flowpp.images import BadImages

MAX_BATCH_BYTES = 64 * 2**20
"""An official batch of 10,000 images has 31 MB."""

MAX_LABEL = 9
"""A binary batch begins with a label from 0 to 9, which no image file does."""

_PICKLE = b"\x80"  # opcode PROTO, and no label

COMPANIONS = {"batches.meta", "batches.meta.txt", "readme.html"}
"""Files of the official archives that hold no images."""

_BATCH = re.compile(r"(data_batch_\d|test_batch)(\.bin)?")
_MAX_MEMO = 1_000_000  # official ones end at 20,100
_MAX_OPCODES = 200_000  # of which an official batch has 50,000; each may take a hundred bytes of memory


def is_batch(file: str) -> bool:
    """Whether a file of this name is one of CIFAR-10's batches."""
    return _BATCH.fullmatch(file) is not None


def read_batch(data: bytes, name: str) -> np.ndarray:
    """The images of one batch file, uint8 [N, 32, 32, 3]. Raises `BadImages`."""
    is_binary = name.endswith(".bin") and not data.startswith(_PICKLE)
    rows = _binary_rows(data, name) if is_binary else _pickled_rows(data, name)
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
        if dtype.code not in ("u1", "|u1"):
            raise ValueError("an array of another dtype than uint8")
        if len(shape) != 2 or shape[1] != 3072 or shape[0] < 1:  # shown by no message: it may be anything
            raise ValueError("an array of another shape than [N, 3072]")
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


_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}
"""What pickles of dicts of arrays, lists and strings are made of, in each protocol."""


# Python's own, and not C's, as it lets us look at the keys: a key of tuples that each hold the one before twice takes
# time without end to be hashed.
_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = {
        ord(opcode.code): _InPython.dispatch[ord(opcode.code)]
        for opcode in pickletools.opcodes
        if opcode.name in _OPCODES
    }

    def find_class(self, module: str, name: str) -> type:
        try:
            return _STAND_INS[f"{module} {name}"]
        except KeyError:
            raise _Unsafe(f"it names {module:.80}.{name:.80}") from None

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack)
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack)
        super().load_dict()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict


def _check_keys(items: list[Any]) -> None:
    """Raises `_Unsafe` where a key is not text, of keys and values in turn."""
    if not all(isinstance(key, str | bytes) for key in items[::2]):
        raise _Unsafe("it has a dict with a key that is no string")


def _unpickle(data: bytes) -> dict[Any, Any]:
    """The pickled object, its arrays as `_Array`."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in _OPCODES:
            raise _Unsafe(f"it has the opcode {opcode.name}")
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > _MAX_MEMO:
            raise _Unsafe(f"it has a memo index beyond {_MAX_MEMO:,}")
        if count > _MAX_OPCODES:
            raise _Unsafe(f"it has more than {_MAX_OPCODES:,} opcodes")
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()
