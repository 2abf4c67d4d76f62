"""Image files without their metadata, and the orientation that the metadata give.

Decoders parse profiles, texts and EXIF before they decode a pixel, and fail if these are damaged, large or unusual.
Here they are left out without being parsed. The orientation is the only one that is read.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

UPRIGHT = 1
"""The EXIF orientation of an image that is stored as it is viewed."""

_MAX_TEXT_BYTES = 2**20  # unpacked, of a text that may hold the orientation
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_WEBP_PIXELS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
_WEBP_FLAGS = 0x10 | 0x02  # of VP8X: alpha and animation; the others announce metadata
_TIFF_PIXELS = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339}
_TIFF_PIXELS |= {529, 530, 531, 532}  # of YCbCr
_SUBFILE, _OLD_SUBFILE, _WIDTH, _PHOTOMETRIC, _ORIENTATION, _COLOUR_MAP, _XMP = 254, 255, 256, 262, 274, 320, 700
_SHORT, _LONG = 3, 4  # types of TIFF values
_MAX_DIRECTORIES, _MAX_ENTRIES = 64, 1_000  # that are read of a TIFF


class PlainImage(NamedTuple):
    """An image file of what defines its pixels; the EXIF orientation, 1 to 8; the number of pictures in it."""

    data: bytes
    orientation: int = UPRIGHT
    pictures: int = 1


def plain_image(data: bytes, file_format: str) -> PlainImage:
    """A PNG, JPEG, WebP, BMP or TIFF file without metadata.

    Raises `ValueError` if what defines the pixels is damaged, and `NotImplementedError` for kinds that are not read.
    """
    match file_format:
        case "PNG":
            return _plain_png(data)
        case "JPEG":
            return _plain_jpeg(data)
        case "WebP":
            return _plain_webp(data)
        case "TIFF":
            return _plain_tiff(data)
    return PlainImage(data)


def _plain_png(data: bytes) -> PlainImage:
    """Keeps the critical chunks and tRNS, and counts the pictures of an animation (APNG)."""
    if not data.startswith(_PNG_SIGNATURE):
        raise ValueError("its first bytes are damaged, as by a transfer in text mode")
    kept, exif, xmp, raw_profile = [_PNG_SIGNATURE], b"", b"", b""
    frames, is_first_frame, has_pixels, depth, colour = 0, False, False, 8, 0
    for kind, content, checksum in _png_chunks(data):
        if kind == b"IHDR":
            depth, colour = content[8], content[9]
        has_pixels = has_pixels or kind == b"IDAT"
        if not kind[0] & 0x20 or kind == b"tRNS":
            if zlib.crc32(kind + content) != checksum:
                raise ValueError(f"its chunk {_shown(kind)} has a wrong checksum")
            if kind not in _PNG_CRITICAL and kind != b"tRNS":
                raise NotImplementedError(f"has a chunk {_shown(kind)}, which is in no standard; save it again")
            kept.append(_png_chunk(kind, _scaled_key(content, depth) if (kind, colour) == (b"tRNS", 0) else content))
        elif kind == b"acTL" and len(content) == 8 and not has_pixels:
            frames = int.from_bytes(content[:4], "big")
        elif kind == b"fcTL" and not has_pixels:
            is_first_frame = True
        elif kind == b"eXIf":
            exif = content
        elif kind == b"iTXt" and content.startswith(b"XML:com.adobe.xmp\0"):
            xmp = xmp or _png_text(kind, content)
        elif kind in (b"tEXt", b"zTXt") and content.startswith(b"Raw profile type exif\0"):
            raw_profile = raw_profile or _png_text(kind, content)
    if kept[-1][4:8] != b"IEND":
        raise ValueError("it ends before its last chunk")
    pictures = frames + (not is_first_frame) if frames else 1  # pixels of no frame are another picture
    return PlainImage(b"".join(kept), _orientation(exif or _exif_in_text(raw_profile), xmp), pictures)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Kind, content and checksum of each, up to IEND. Raises `ValueError` if the file ends within one."""
    place, kind = 8, b""
    while kind != b"IEND" and place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        if end > len(data) or not kind.isalpha():
            raise ValueError(f"it ends or is damaged within the chunk {_shown(kind)}")
        yield kind, data[place + 8 : end - 4], int.from_bytes(data[end - 4 : end], "big")
        place = end


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _scaled_key(content: bytes, depth: int) -> bytes:
    """The grey level that is transparent, scaled to 8 bits as Pillow scales the pixels."""
    if depth >= 8 or len(content) != 2:
        return content
    return struct.pack(">H", int.from_bytes(content, "big") * 255 // (2**depth - 1))


def _png_text(kind: bytes, content: bytes) -> bytes:
    """The text behind the keyword, empty if it cannot be unpacked."""
    _, _, text = content.partition(b"\0")
    if kind == b"zTXt":
        return _unpacked(text[1:])
    if kind == b"iTXt":
        parts = text[2:].split(b"\0", 2)  # language, translated keyword, text
        return parts[-1] if text[:1] == b"\0" else _unpacked(parts[-1])
    return text


def _unpacked(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def _exif_in_text(text: bytes) -> bytes:
    """EXIF as ImageMagick writes it: a blank line, a name, a length, and hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode())
    except ValueError:
        return b""


def _plain_jpeg(data: bytes) -> PlainImage:
    """Keeps the tables, the JFIF and Adobe markers, which determine the colour space, and all from the first scan on.

    Further pictures after the first one, as of phones that store a gain map or a preview (MPO), are ignored.
    """
    kept, exif, xmp, place = [data[:2]], list[bytes](), b"", 2
    while True:
        place = data.find(b"\xff", place)
        while data[place : place + 2] == b"\xff\xff":
            place += 1
        if place < 0 or place + 4 > len(data):
            raise ValueError("it ends before its pixels")
        marker = data[place + 1]
        if marker == 0xDA:
            break
        if marker in (0x00, 0x01, *range(0xD0, 0xD9)):  # no segment
            place += 2
            continue
        segment = data[place : place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")]
        content = segment[4:]
        is_jfif = marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14
        is_adobe = marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12
        is_table = not 0xE0 <= marker <= 0xEF and marker != 0xFE
        if is_table or is_jfif or is_adobe:
            kept.append(segment)
        elif marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif.append(content[6:])
        elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = content
        place += max(2, len(segment))
    return PlainImage(b"".join([*kept, data[place:]]), _orientation(b"".join(exif), xmp))


def _plain_webp(data: bytes) -> PlainImage:
    """Keeps the chunks of pixels, and says in VP8X that there are no others."""
    chunks, exif, xmp, pictures, place = list[bytes](), b"", b"", 0, 12
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while place + 8 <= end:
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        content = data[place + 8 : min(place + 8 + length, end)]
        if kind in _WEBP_PIXELS:
            if place + 8 + length + length % 2 > len(data):
                raise ValueError(f"it ends within the chunk {_shown(kind)}")
            if kind == b"VP8X" and content:
                content = bytes([content[0] & _WEBP_FLAGS]) + content[1:]
            chunks.append(kind + struct.pack("<I", length) + content + bytes(length % 2))
            pictures += kind == b"ANMF"
        elif kind == b"EXIF":
            exif = content
        elif kind == b"XMP ":
            xmp = content
        place += 8 + length + length % 2
    kept = b"".join(chunks)
    riff = b"RIFF" + struct.pack("<I", 4 + len(kept)) + b"WEBP" + kept
    return PlainImage(riff, _orientation(exif, xmp), max(1, pictures))


class _Entry(NamedTuple):
    """An entry of a TIFF directory: 12 bytes, and what the first ones of them are."""

    raw: bytes
    tag: int
    kind: int
    number: int
    value: int
    """The value if it is one SHORT or LONG; else where the values are."""


def _plain_tiff(data: bytes) -> PlainImage:
    """Replaces the first directory by its entries that define pixels; all else keeps its place.

    Further directories are pictures unless they are marked as reduced ones (previews, pyramids).
    """
    order = "<" if data.startswith(b"II") else ">"
    start = int.from_bytes(data[4:8], "little" if order == "<" else "big")
    entries, following = _directory(data, start, order)
    tags = {entry.tag: entry for entry in entries}
    if _is_reduced(tags):
        raise NotImplementedError("is a TIFF that begins with a preview, as raw files of cameras do; convert it")
    pixels = [entry for entry in entries if entry.tag in _TIFF_PIXELS]
    directory = struct.pack(f"{order}H", len(pixels)) + b"".join(entry.raw for entry in pixels) + bytes(4)
    plain = bytearray(data)
    plain[start : start + len(directory)] = directory
    if _PHOTOMETRIC in tags and tags[_PHOTOMETRIC].value == 3 and _COLOUR_MAP in tags:
        _widen_colours(plain, tags[_COLOUR_MAP], order)
    orientation = _valid_orientation(tags[_ORIENTATION]) if _ORIENTATION in tags else None
    xmp = data[tags[_XMP].value :][: tags[_XMP].number] if _XMP in tags else b""
    pictures = 1 + _count_pictures(data, following, order, {start})
    return PlainImage(bytes(plain), orientation or _orientation(b"", xmp), pictures)


def _directory(data: bytes, start: int, order: str) -> tuple[list[_Entry], int]:
    """The entries of a directory, and where the next one is. Raises `ValueError` for a directory outside the file."""
    if start + 2 > len(data):
        raise ValueError("it ends before its directory")
    (count,) = struct.unpack_from(f"{order}H", data, start)
    if count > _MAX_ENTRIES or start + 2 + 12 * count > len(data):
        raise ValueError("it ends within its directory, or has too many tags")
    entries = []
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, value = struct.unpack_from(f"{order}HHII", data, place)
        if kind == _SHORT and number == 1:
            (value,) = struct.unpack_from(f"{order}H", data, place + 8)
        entries.append(_Entry(data[place : place + 12], tag, kind, number, value))
    end = start + 2 + 12 * count
    following = struct.unpack_from(f"{order}I", data, end)[0] if end + 4 <= len(data) else 0
    return entries, following


def _is_reduced(tags: dict[int, _Entry]) -> bool:
    new, old = tags.get(_SUBFILE), tags.get(_OLD_SUBFILE)
    return bool(new and new.value & 1) or bool(old and old.value == 2)


def _count_pictures(data: bytes, start: int, order: str, seen: set[int]) -> int:
    """The pictures of a chain of directories, which may be a loop or lead out of the file."""
    pictures = 0
    while start and start not in seen and len(seen) < _MAX_DIRECTORIES:
        seen.add(start)
        try:
            entries, start = _directory(data, start, order)
        except ValueError:
            break
        tags = {entry.tag: entry for entry in entries}
        pictures += _WIDTH in tags and not _is_reduced(tags)
    return pictures


def _widen_colours(data: bytearray, entry: _Entry, order: str) -> None:
    """Scales a colour map that uses 8 bits of the 16; libtiff recognizes it by its greatest value, too."""
    if entry.kind != _SHORT or entry.number < 3:
        raise NotImplementedError("is a TIFF with a colour map of another type than SHORT; save it again")
    if entry.value + 2 * entry.number > len(data):
        raise ValueError("it ends within its colour map")
    form = f"{order}{entry.number}H"
    colours = struct.unpack_from(form, data, entry.value)
    if max(colours) < 256:
        struct.pack_into(form, data, entry.value, *(256 * colour for colour in colours))


def _orientation(exif: bytes, xmp: bytes) -> int:
    """The orientation that EXIF gives, or else XMP."""
    found = _exif_orientation(exif)
    if found is None and (match := re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])\b", xmp)):
        return int(match[1])
    return found or UPRIGHT


def _exif_orientation(exif: bytes) -> int | None:
    """EXIF's orientation, `UPRIGHT` if its value is none, or None if it has no such entry that can be found."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    if len(exif) < 10 or exif[:4] not in (b"II*\0", b"MM\0*"):
        return None
    order = "<" if exif.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    readable = min(count, _MAX_ENTRIES, (len(exif) - start - 2) // 12)
    whole = exif[:start] + struct.pack(f"{order}H", readable) + exif[start + 2 :]
    entries = [entry for entry in _directory(whole, start, order)[0] if entry.tag == _ORIENTATION]
    return _valid_orientation(entries[0]) if entries else None


def _valid_orientation(entry: _Entry) -> int:
    is_number = entry.kind in (_SHORT, _LONG) and entry.number == 1
    return entry.value if is_number and 1 <= entry.value <= 8 else UPRIGHT


def _shown(kind: bytes) -> str:
    return kind.decode("latin-1")
