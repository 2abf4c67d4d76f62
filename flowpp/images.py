"""Single images: decoded from files that strangers send, encoded as PNG, reduced to fewer bits."""

import io
import math
import threading
import warnings
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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


def _escaped(text: str) -> str:
    """`text` without what would write to a terminal or break a line of a log."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


SUFFIXES = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WebP",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
}
"""The formats that files are named after; of them, GIF is refused."""

_PNG_END = b"IEND\xaeB`\x82"
_TIFF_COMPRESSIONS = {"raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate"}
_MAX_SCANS = 100  # of a JPEG: progressive ones have 10; thousands fit into a small file and take seconds
_COLOURS = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
_DEEP = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_pillow = threading.Lock()  # warnings.catch_warnings changes the whole process, so one thread at a time


def decode_image(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """The image of a file's bytes, uint8 [H, W, C] with C 1 (grey) or 3 (RGB).

    The format is told by the content; a suffix of `name` that claims another one is refused. Pixels come as a
    viewer shows them: the EXIF orientation is applied, a palette is looked up, a fully opaque alpha channel
    dropped; colour profiles are not applied. Refused are damaged, animated, deep (16-bit), CMYK, transparent,
    too large and too small images. Raises `BadImages`.
    """
    file_format = _sniff(data, name)
    if len(data) > limits.max_image_bytes:
        raise too_many_bytes(name, limits.max_image_bytes)
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is either harmless metadata or checked here
        try:
            return _pixels(data, file_format, name)
        except BadImages:
            raise
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


def _sniff(data: bytes, name: str) -> str:
    actual = _format(data)
    claimed = SUFFIXES.get(PurePosixPath(name).suffix.lower())
    if actual is None:
        looks = f"is named like {claimed} but is not" if claimed else "is not an image we know"
        raise BadImages("not_an_image", f"{looks}; {ACCEPTED}", name)
    if claimed not in (None, actual):
        raise BadImages("mislabelled_image", f"is named like {claimed} but holds {actual}; rename it", name)
    if actual == "GIF":
        raise BadImages("unsupported_format", f"is GIF; {ACCEPTED}", name)
    return actual


def _format(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith(b"BM") and data[6:10] == bytes(4):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    return "GIF" if data.startswith((b"GIF87a", b"GIF89a")) else None


def _pixels(data: bytes, file_format: str, name: str) -> np.ndarray:
    if file_format == "PNG":
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            check_size(image.height, image.width, name)
            image.verify()  # every chunk up to the last; loading stops at the last pixel
        if _PNG_END not in data:
            raise BadImages("damaged_image", "is a truncated PNG image", name)
    with Image.open(io.BytesIO(data), formats=[file_format]) as image:
        check_size(image.height, image.width, name)
        if getattr(image, "is_animated", False):
            raise BadImages("animated_image", f"holds more than one picture; {ACCEPTED}", name)
        _check_encoding(image, data, name)
        image.load()
        upright = ImageOps.exif_transpose(image)
        pixels = np.asarray(_opaque(upright, name).convert(_COLOURS[_base(image)]))
    return pixels[..., None] if pixels.ndim == 2 else pixels


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
