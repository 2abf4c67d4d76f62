"""Kinds of files, recognized by their first bytes, so that a refusal can name the kind."""

import re
from enum import Enum
from typing import NamedTuple

HEAD_BYTES = 1024
"""Bytes at the beginning of a file that determine its kind."""


class Family(Enum):
    """Groups of kinds that are handled alike."""

    IMAGE = "image"
    """`flowpp.images` decodes it."""
    OTHER_IMAGE = "other image"
    ARCHIVE = "archive"
    OTHER_ARCHIVE = "other archive"
    ARRAY = "array"
    PICKLE = "pickle"
    OTHER = "other"


class Kind(NamedTuple):
    """A kind of file: its name with an article, as in "is a PDF document"."""

    family: Family
    name: str


def _kind(family: Family, name: str, pattern: bytes) -> tuple[re.Pattern[bytes], Kind]:
    return re.compile(pattern, re.DOTALL), Kind(family, name)


_FTYP = rb".{4}ftyp"
_BOM = rb"(?:\xef\xbb\xbf)?"
_TEXT = _BOM + rb"\s*"
_MARKUP = _BOM + rb"(?:<\?xml[^>]*>|<!--(?:(?!-->).)*-->|\s)*"
_KINDS = [
    _kind(Family.IMAGE, "PNG", rb"\x89PNG"),
    _kind(Family.OTHER_IMAGE, "a JPEG-LS or lossless JPEG", rb"\xff\xd8\xff[\xf7\xc3]"),
    _kind(Family.IMAGE, "JPEG", rb"\xff\xd8\xff"),
    _kind(Family.IMAGE, "WebP", rb"RIFF.{4}WEBP"),
    _kind(Family.IMAGE, "BMP", rb"BM.{12}(?:\x0c|\x10|\x28|\x34|\x38|\x40|\x6c|\x7c)\0\0\0"),
    _kind(Family.OTHER_IMAGE, "a Canon raw photograph (CR2)", rb"II\*\0.{4}CR"),
    _kind(Family.IMAGE, "TIFF", rb"II\*\0|MM\0\*"),
    _kind(Family.OTHER_IMAGE, "BigTIFF", rb"II\+\0|MM\0\+"),
    _kind(Family.OTHER_IMAGE, "GIF", rb"GIF8[79]a"),
    _kind(Family.OTHER_IMAGE, "AVIF", _FTYP + rb"avi[fs]"),
    _kind(Family.OTHER_IMAGE, "HEIC", _FTYP + rb"(?:hei|hev|mif1|msf1)"),
    _kind(Family.OTHER_IMAGE, "a Canon raw photograph (CR3)", _FTYP + rb"crx "),
    _kind(Family.OTHER, "a video", _FTYP + rb"|\x1aE\xdf\xa3|RIFF.{4}AVI |\0\0\x01\xba|FLV\x01|OggS"),
    _kind(Family.OTHER_IMAGE, "JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
    _kind(Family.OTHER_IMAGE, "JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    _kind(Family.OTHER_IMAGE, "a Photoshop document", rb"8BPS"),
    _kind(Family.OTHER_IMAGE, "a GIMP image", rb"gimp xcf"),
    _kind(Family.OTHER_IMAGE, "an icon (ICO)", rb"\0\0[\x01\x02]\0[\x01-\xff]\0"),
    _kind(Family.OTHER_IMAGE, "a portable any map (PBM, PGM, PPM, PAM or PFM)", rb"P[1-7fF]\s"),
    _kind(Family.OTHER_IMAGE, "OpenEXR", rb"\x76\x2f\x31\x01"),
    _kind(Family.OTHER_IMAGE, "Radiance HDR", rb"#\?(?:RADIANCE|RGBE)"),
    _kind(Family.OTHER_IMAGE, "a DirectDraw surface", rb"DDS "),
    _kind(Family.OTHER_IMAGE, "QOI", rb"qoif"),
    _kind(Family.OTHER_IMAGE, "FITS", rb"SIMPLE  ="),
    _kind(Family.OTHER_IMAGE, "DICOM", rb".{128}DICM"),
    _kind(Family.OTHER_IMAGE, "a raw photograph", rb"FUJIFILMCCD-RAW|II(?:RO|RS|U\0)"),
    _kind(Family.OTHER_IMAGE, "SVG", _BOM + rb"(?:<\?xml[^>]*>|<!--(?:(?!-->).)*-->|<!DOCTYPE[^>]*>|\s)*<svg"),
    _kind(Family.ARCHIVE, "a zip archive", rb"PK(?:\x03\x04|\x05\x06)"),
    _kind(Family.ARCHIVE, "a gzip file", rb"\x1f\x8b"),
    _kind(Family.ARCHIVE, "a tar archive", rb".{257}ustar"),
    _kind(Family.OTHER_ARCHIVE, "a part of a zip archive of several files", rb"PK\x07\x08"),
    _kind(Family.OTHER_ARCHIVE, "compressed by xz", rb"\xfd7zXZ\0"),
    _kind(Family.OTHER_ARCHIVE, "compressed by lzma", rb"\x5d\0\0.{2}(?:\xff{8}|.{5}\0{3})"),
    _kind(Family.OTHER_ARCHIVE, "compressed by bzip2", rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    _kind(Family.OTHER_ARCHIVE, "compressed by Zstandard", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    _kind(Family.OTHER_ARCHIVE, "compressed by LZ4", rb"\x04\x22\x4d\x18"),
    _kind(Family.OTHER_ARCHIVE, "compressed by compress", rb"\x1f[\x9d\xa0]"),
    _kind(Family.OTHER_ARCHIVE, "compressed by lzip", rb"LZIP"),
    _kind(Family.OTHER_ARCHIVE, "a 7z archive", rb"7z\xbc\xaf\x27\x1c"),
    _kind(Family.OTHER_ARCHIVE, "a rar archive", rb"Rar!\x1a\x07"),
    _kind(Family.OTHER_ARCHIVE, "a cab archive", rb"MSCF"),
    _kind(Family.OTHER_ARCHIVE, "a cpio archive", rb"07070[127]"),
    _kind(Family.OTHER_ARCHIVE, "an ar archive", rb"!<arch>\n"),
    _kind(Family.ARRAY, "a NumPy array", rb"\x93NUMPY"),
    _kind(Family.PICKLE, "a pickle", rb"\x80[\x02-\x05]"),
    _kind(Family.OTHER, "a PDF document", rb"%PDF-"),
    _kind(Family.OTHER, "a PostScript document", rb"%!PS"),
    _kind(Family.OTHER, "a pointer of Git LFS; fetch the file itself by `git lfs pull`", rb"version https://git-lfs"),
    _kind(
        Family.OTHER,
        "a web page, as of a failed download",
        _MARKUP + rb"(?i:<!doctype html|<(?:html|head|title|meta|body|script|h1)\b)",
    ),
    _kind(Family.OTHER, "XML", _TEXT + rb"<\?xml"),
    _kind(Family.OTHER, "JSON", _TEXT + rb"[{\[]\s*[\"\[{\]}0-9]"),
    _kind(Family.OTHER, "a Parquet table; save its images as files or by np.save", rb"PAR1"),
    _kind(Family.OTHER, "an Arrow table; save its images as files or by np.save", rb"ARROW1"),
    _kind(Family.OTHER, "HDF5; save its images by np.save", rb"\x89HDF\r\n\x1a\n"),
    _kind(Family.OTHER, "a MATLAB file; save its images by np.save", rb"MATLAB \d\.\d"),
    _kind(Family.OTHER, "an IDX array, as MNIST has; save its images by np.save", rb"\0\0[\x08-\x0e][\x01-\x04]"),
    _kind(Family.OTHER, "a safetensors file", rb".{5}\0\0\0\{\""),
    _kind(Family.OTHER, "an SQLite database", rb"SQLite format 3\0"),
    _kind(Family.OTHER, "a program", rb"\x7fELF|MZ|\xfe\xed\xfa|\xcf\xfa\xed\xfe"),
    _kind(Family.OTHER, "a sound", rb"RIFF.{4}WAVE|ID3|fLaC"),
    _kind(Family.OTHER, "empty", rb"\Z"),
]


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file that begins with `head`, `HEAD_BYTES` or the whole file; None if it is not known."""
    head = head[:HEAD_BYTES]
    return next((kind for pattern, kind in _KINDS if pattern.match(head)), None)
