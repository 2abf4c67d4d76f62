"""Image arrays in .npy form, read from a stream piece by piece."""

import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from flowpp.images import BadImages, Limits, check_size

_PIECE_BYTES = 2**22
_EXPECTED = "expected is uint8 [N, H, W] or [N, H, W, C] in C order, C 1 or 3, saved by np.save without pickle"


def read_array(stream: BinaryIO, name: str, limits: Limits) -> Iterator[np.ndarray]:
    """The images of a .npy file of uint8 [N, H, W] or [N, H, W, C], in pieces of [n, H, W, C].

    The header is held against `limits` before anything of its size is allocated. Raises `BadImages`.
    """
    count, height, width, channels = _image_shape(read_header(stream, name), name, limits)
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
    start = stream.read(10)
    if start[:8] != b"\x93NUMPY\1\0":  # a later version's header may have 4 GB, and uint8 needs none
        raise BadImages("damaged_array", f"is not in .npy format 1.0; {_EXPECTED}", name)
    header = start[8:] + stream.read(int.from_bytes(start[8:], "little"))
    try:
        shape, column_major, dtype = npy.read_array_header_1_0(io.BytesIO(header))
    except Exception as error:  # numpy lets through what Python's tokenizer and parser raise
        raise BadImages("damaged_array", f"has no .npy header that can be read; {_EXPECTED}", name) from error
    if dtype != np.uint8 or column_major:
        order = " in Fortran order" if column_major else ""
        raise BadImages("unsupported_array", f"is {dtype} {list(shape)}{order}; {_EXPECTED}", name)
    return shape


def _image_shape(shape: tuple[int, ...], name: str, limits: Limits) -> tuple[int, int, int, int]:
    """(N, H, W, C), all within bounds."""
    count, height, width, channels = (*shape, 1)[:4] if len(shape) in (3, 4) else (0, 0, 0, 0)
    if channels not in (1, 3):
        hint = "; move the channels last" if height in (1, 3) else ""
        raise BadImages("unsupported_array", f"is uint8 {list(shape)}{hint}; {_EXPECTED}", name)
    check_size(height, width, name)
    if not 0 <= count <= limits.max_images:
        message = f"declares {count:,} images; at most {limits.max_images:,} are accepted"
        raise BadImages("too_many_images", message, name)
    return count, height, width, channels
