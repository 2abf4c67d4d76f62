"""Image arrays in .npy form, read from a stream piece by piece."""

import io
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from flowpp.images import BadImages, Limits, check_size

_PIECE_BYTES = 2**22
_MAX_HEADER_BYTES = 10_000  # as numpy.load has it; uint8 needs no more than 128
_EXPECTED = "expected is uint8 [N, H, W] or [N, H, W, C] in C order, C 1 or 3, saved by np.save without pickle"
_CHANNELS = (1, 3, 4)  # of images, as far as people save them
_LABELS = re.compile(r"(?<![a-z])(?:y|label|labels|target|targets|class|classes|attr|attributes)(?![a-z])")


def read_array(stream: BinaryIO, name: str, limits: Limits) -> Iterator[np.ndarray]:
    """The images of a .npy file of uint8 [N, H, W] or [N, H, W, C], in pieces of [n, H, W, C].

    Nothing comes of an array of labels: one of [N] or [N, K] that is named so, as `y_train` is. The header is checked
    against `limits` before anything of its size is allocated. Raises `BadImages`.
    """
    header = _header(stream, name)
    if len(header.shape) in (1, 2) and _LABELS.search(name.lower()):
        return
    _check_layout(header, name)
    count, height, width, channels = _image_shape(header.shape, name, limits)
    image_bytes = height * width * channels
    piece = max(1, _PIECE_BYTES // image_bytes)
    for start in range(0, count, piece):
        wanted = min(piece, count - start)
        data = stream.read(wanted * image_bytes)
        if len(data) != wanted * image_bytes:
            raise BadImages("damaged_array", f"ends before the last of the {count:,} images it declares", name)
        yield np.frombuffer(data, np.uint8).reshape(wanted, height, width, channels)
    if stream.read(1):
        raise BadImages("damaged_array", f"goes on after the {count:,} images it declares", name)


def read_header(stream: BinaryIO, name: str) -> tuple[int, ...]:
    """The shape of a .npy file of uint8 in C order; `stream` is at its beginning, and then at the first value.

    Raises `BadImages`.
    """
    header = _header(stream, name)
    _check_layout(header, name)
    return header.shape


class _Header(NamedTuple):
    """The declaration at the beginning of a .npy file."""

    shape: tuple[int, ...]
    is_column_major: bool
    dtype: np.dtype


def _header(stream: BinaryIO, name: str) -> _Header:
    """The header of a .npy file in format 1.0 to 3.0 (`numpy.lib.format`). Raises `BadImages`."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise BadImages("damaged_array", f"is no .npy file of a known version; {_EXPECTED}", name)
    length, read = (2, npy.read_array_header_1_0) if start[6] == 1 else (4, npy.read_array_header_2_0)
    size = stream.read(length)
    if int.from_bytes(size, "little") > (_MAX_HEADER_BYTES if length == 4 else 2**16):
        raise BadImages("damaged_array", f"has a .npy header of more than {_MAX_HEADER_BYTES:,} bytes", name)
    header = size + stream.read(int.from_bytes(size, "little"))
    try:
        return _Header(*read(io.BytesIO(header)))
    except Exception as error:  # numpy lets through what Python's tokenizer and parser raise
        raise BadImages("damaged_array", f"has no .npy header that can be read; {_EXPECTED}", name) from error


def _check_layout(header: _Header, name: str) -> None:
    shape, is_column_major, dtype = header
    if dtype == np.uint8 and not is_column_major:
        return
    hint = ""
    if dtype == np.uint8:
        hint = "; np.ascontiguousarray gives C order"
    elif dtype.kind == "f":
        hint = (
            "; save values of 0 to 255 by images.astype(np.uint8), "
            "and of 0 to 1 by (255 * images).round().astype(np.uint8)"
        )
    elif dtype.kind == "b":
        hint = "; save 255 * images.astype(np.uint8)"
    elif dtype.kind in "iu":
        hint = "; save images.astype(np.uint8) if the values are 0 to 255"
    elif dtype.kind == "O":
        hint = ", which are pickled, and pickles run code"
    order = " in Fortran order" if is_column_major else ""
    kind = "objects" if dtype.kind == "O" else dtype
    raise BadImages("unsupported_array", f"is {kind} {list(shape)}{order}{hint}; {_EXPECTED}", name)


def _image_shape(shape: tuple[int, ...], name: str, limits: Limits) -> tuple[int, int, int, int]:
    """(N, H, W, C), all within bounds."""
    if hint := _other_layout(shape):
        raise BadImages("unsupported_array", f"is uint8 {list(shape)}: {hint}; {_EXPECTED}", name)
    count, height, width, channels = (*shape, 1)[:4]
    check_size(height, width, name)
    if not 0 <= count <= limits.max_images:
        message = f"declares {count:,} images; at most {limits.max_images:,} are accepted"
        raise BadImages("too_many_images", message, name)
    return count, height, width, channels


def _other_layout(shape: tuple[int, ...]) -> str | None:
    """Explains a shape that is not of images, with advice; None for [N, H, W] and [N, H, W, C].

    An array of three dimensions is taken for one image if its first or last dimension is a number of channels.
    """
    match shape:
        case (_, _, last) if last in _CHANNELS:
            return "[H, W, C] is one image; stack images to [N, H, W, C]; narrow grey images are [N, H, W, 1]"
        case (3 | 4 as first, _, _):
            return f"[C, H, W] is one image; move channels last, stack images; {first} grey ones are [N, H, W, 1]"
        case (_, 1 | 3 | 4, _, last) if last not in (1, 3):
            return "[N, C, H, W] has the channels first; save images.transpose(0, 2, 3, 1)"
        case (_, _, _, 1 | 3) | (_, _, _):
            return None
        case (_, _, _, 4):
            return "it has an alpha channel; save images[..., :3] if all is opaque"
        case (_, _):
            return "[H, W] is one grey image; save it as [1, H, W]; reshape flat images to [N, H, W, C]"
    return f"it has {len(shape)} dimensions" if len(shape) != 4 else f"it has {shape[3]} channels"
