"""Single images: decoded from files that strangers send, encoded as PNG, reduced to fewer bits."""

import io
import math
import threading
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from flowpp.kinds import Family, kind_of
from flowpp.metadata import PlainImage, plain_image

MAX_SIDE = 256
"""Greatest height and width of an image in pixels, as `ModelConfig` has it."""

MIN_WIDTH = 2
"""Least width of an image in pixels, as `ModelConfig` has it. The least height is 1."""

ACCEPTED = (
    f"accepted are still, opaque images of 8 bits a channel, grey or RGB, up to {MAX_SIDE} x {MAX_SIDE} pixels, "
    "as PNG, JPEG, WebP, BMP or TIFF"
)
"""What `decode_image` takes, as the end of a sentence."""


class BadImages(ValueError):
    """Images that cannot be taken: `code` is stable, the message a sentence, `name` the offending file or member."""

    def __init__(self, code: str, message: str, name: str | None = None) -> None:
        super().__init__(_escaped(message if name is None else f"{shortened(name)}: {message}"))
        self.code = code
        self.name = name


@dataclass(frozen=True)
class Limits:
    """Bounds on one image set, held while it is read. The defaults admit ImageNet 64 x 64."""

    max_bytes: int = 16 * 2**30
    """Bytes of the source: of the archive, or of all files together."""
    max_uncompressed_bytes: int = 64 * 2**30
    """Bytes that come out of an archive, and bytes of all decoded images."""
    max_images: int = 2_000_000
    max_entries: int = 250_000
    """Entries of an archive, folders and ignored ones included."""
    max_zip_entries: int = 250_000
    """The same of a zip, which is read by way of its directory: that takes 0.9 kB of memory an entry."""
    max_image_bytes: int = 2 * 2**20
    """Bytes of one image file."""


DEFAULT_LIMITS = Limits()


def shortened(name: str) -> str:
    """`name` as it may stand in a message: at most 163 characters."""
    return name if len(name) <= 160 else f"{name[:80]}...{name[-80:]}"


def displayed(name: str) -> str:
    """`name` as text that can be encoded and printed; different names stay different.

    Backslashes, characters that are not printable, and bytes of names that are not UTF-8 (lone surrogates) are escaped
    as in Python.
    """
    return _escaped(name.replace("\\", "\\\\"))


def _escaped(text: str) -> str:
    """`text` without what would write to a terminal or break a line of a log."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


_TIFF_COMPRESSIONS = {"raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate"}
_MAX_SCANS = 100  # of a JPEG: progressive ones have 10; thousands fit into a small file and take seconds
_COLOURS = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
_DEEP = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_pillow = threading.Lock()  # warnings.catch_warnings changes the whole process, so one thread at a time


def decode_image(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """The image of a file's bytes, uint8 [H, W, C] with C 1 (grey) or 3 (RGB).

    The content determines the format, whatever the name. Pixels come as a viewer shows them: the EXIF orientation is
    applied, a palette is looked up, a fully opaque alpha channel dropped. Other metadata are ignored, colour profiles
    too. Damaged, animated, deep (16-bit), CMYK, transparent, too large and too small images are refused. Raises
    `BadImages`.
    """
    file_format = check_kind(data, name)
    if len(data) > limits.max_image_bytes:
        raise too_many_bytes(name, limits.max_image_bytes)
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is checked here
        try:
            return _pixels(plain_image(data, file_format), file_format, name)
        except BadImages:
            raise
        except NotImplementedError as error:
            raise BadImages("unsupported_format", f"{error!s:.200}; {ACCEPTED}", name) from error
        except Image.DecompressionBombError as error:
            raise BadImages("image_too_large", f"is far too large; {ACCEPTED}", name) from error
        except Exception as error:  # on damaged files Pillow's decoders raise nearly everything
            detail = "" if isinstance(error, UnidentifiedImageError) else f" ({error!s:.200})"
            message = f"is a truncated or damaged {file_format} image{detail}"
            raise BadImages("damaged_image", message, name) from error


def encode_png(image: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, C], C 1 or 3."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


def image_grid(images: np.ndarray) -> np.ndarray:
    """Images, uint8 [N, H, W, C], in one of uint8 [rows * H, columns * W, C], nearly square; empty places black."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:n] = images
    return grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, -1, channels)


def reduce_bits(images: np.ndarray, bits: int) -> np.ndarray:
    """8-bit values -> symbols 0..2**bits - 1, floored; uint8 of any shape."""
    return images >> (8 - bits)


def expand_bits(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Symbols 0..2**bits - 1 -> 8-bit values from 0 to 255; uint8 of any shape. `reduce_bits` undoes it."""
    levels = 2**bits
    return np.rint(np.arange(levels) * (255 / (levels - 1))).astype(np.uint8)[symbols]


def check_size(height: int, width: int, name: str) -> None:
    """Raises `BadImages` where no model takes images of this size."""
    if max(height, width) > MAX_SIDE:
        message = f"is {width} pixels wide and {height} high; at most {MAX_SIDE} x {MAX_SIDE} are accepted"
        raise BadImages("image_too_large", message, name)
    if width < MIN_WIDTH or height < 1:
        message = f"is {width} pixels wide and {height} high; at least {MIN_WIDTH} x 1 are needed"
        raise BadImages("image_too_small", message, name)


def too_many_bytes(name: str, most: int) -> BadImages:
    """The error for an image file of more than `most` bytes."""
    return BadImages("image_too_large", f"has more than {most:,} bytes; {ACCEPTED}", name)


def check_kind(head: bytes, name: str) -> str:
    """The format of an image file that begins with `head`. Raises `BadImages` with their kind for other files."""
    kind = kind_of(head)
    if kind is None:
        raise BadImages("not_an_image", f"is not an image of a known kind; {ACCEPTED}", name)
    if kind.family is Family.OTHER_IMAGE:
        raise BadImages("unsupported_format", f"is {kind.name}; {ACCEPTED}", name)
    if kind.family is not Family.IMAGE:
        raise BadImages("not_an_image", f"is {kind.name}; {ACCEPTED}", name)
    return kind.name


def _pixels(plain: PlainImage, file_format: str, name: str) -> np.ndarray:
    if plain.pictures > 1:
        raise BadImages("animated_image", f"holds more than one picture; {ACCEPTED}", name)
    with Image.open(io.BytesIO(plain.data), formats=[file_format]) as image:
        check_size(*_viewed_size(image, plain.orientation), name)
        _check_encoding(image, plain.data, name)
        image.load()
        pixels = np.asarray(_opaque(image, name).convert(_COLOURS[_base(image)]))
    return _upright(pixels[..., None] if pixels.ndim == 2 else pixels, plain.orientation)


def _viewed_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """(height, width) of the image as a viewer shows it."""
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The image as a viewer shows it, uint8 [H, W, C]; EXIF 2.3, tag 0x0112, where its first row and column lie."""
    turned = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(turned[::rows, ::columns])


def _check_encoding(image: Image.Image, data: bytes, name: str) -> None:
    if image.format == "JPEG" and data.count(b"\xff\xda") > _MAX_SCANS:
        raise BadImages("unsupported_format", f"is a JPEG of more than {_MAX_SCANS} scans; save it anew", name)
    # Pillow opens 16-bit RGB as 8-bit and drops the lower byte without a word
    depth = data[24] if image.format == "PNG" else 8
    if image.format == "TIFF":
        depth = max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]
        tile = [image.tag_v2.get(tag, 0) for tag in (322, 323)]  # type: ignore[attr-defined]
        if image.info.get("compression") not in _TIFF_COMPRESSIONS or max(tile) > 2 * MAX_SIDE:
            message = "is a TIFF of an unusual kind; accepted are plain, PackBits, LZW or deflate ones"
            raise BadImages("unsupported_format", message, name)
    if depth > 8 or image.mode in _DEEP:
        raise BadImages("unsupported_depth", f"has more than 8 bits a channel; {ACCEPTED}", name)
    if _base(image) not in _COLOURS:
        raise BadImages("unsupported_colour", f"has {image.mode} colours; {ACCEPTED}", name)


def _base(image: Image.Image) -> str:
    """The image's mode without its alpha channel."""
    return image.mode.removesuffix("A")


def _opaque(image: Image.Image, name: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    whole = image.convert("RGBA")
    if whole.getchannel("A").getextrema() != (255, 255):
        message = f"has transparent pixels, which no model sees; flatten it onto a background; {ACCEPTED}"
        raise BadImages("transparent_image", message, name)
    return whole if _COLOURS[_base(image)] == "RGB" else image
