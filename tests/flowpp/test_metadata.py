"""Metadata of images: none keeps the pixels from being read, and only the orientation is applied."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from flowpp.images import BadImages, decode_image

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (12, 20, 3), np.uint8)
GREY = RGB[..., :1]
OPTIONS: dict[str, dict] = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "TIFF": {}, "BMP": {}}


def encoded(file_format: str, pixels: np.ndarray = RGB, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    image.save(buffer, file_format, **OPTIONS[file_format], **options)
    return buffer.getvalue()


PLAIN = {file_format: encoded(file_format) for file_format in OPTIONS}
PIXELS = {file_format: decode_image(data, "plain") for file_format, data in PLAIN.items()}


def png_chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_with(*chunks: bytes, at_end: bool = False) -> bytes:
    place = -12 if at_end else 33
    return PLAIN["PNG"][:place] + b"".join(chunks) + PLAIN["PNG"][place:]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg_with(*segments: bytes) -> bytes:
    return PLAIN["JPEG"][:2] + b"".join(segments) + PLAIN["JPEG"][2:]


def webp_with(kind: bytes, content: bytes, flags: int) -> bytes:
    size = (RGB.shape[1] - 1).to_bytes(3, "little") + (RGB.shape[0] - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + size + PLAIN["WEBP"][12:]
    chunks += kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


Tag = tuple[int, int, int, bytes]
"""Tag, type, count, and the value as bytes."""


def directory(entries: list[Tag], order: str = "<", start: int = 8, following: int = 0) -> bytes:
    """A TIFF directory, with values of more than 4 bytes behind it."""
    out, tail = struct.pack(f"{order}H", len(entries)), b""
    behind = start + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        if len(value) <= 4:
            out += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
        else:
            out += struct.pack(f"{order}HHII", tag, kind, count, behind + len(tail))
            tail += value
    return out + struct.pack(f"{order}I", following) + tail


def exif(*entries: Tag, order: str = "<") -> bytes:
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + directory(list(entries), order)


def short(tag: int, value: int, order: str = "<") -> Tag:
    return tag, 3, 1, struct.pack(f"{order}H", value)


def tiff(*entries: Tag, pixels: np.ndarray = GREY, order: str = "<", following: int = 0) -> bytes:
    """An uncompressed grey TIFF by hand; `entries` are added, or replace others of their tag."""
    height, width, samples = pixels.shape
    usual = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: samples, 278: height}
    entries_of = {tag: short(tag, value, order) for tag, value in usual.items()}
    entries_of[279] = (279, 4, 1, struct.pack(f"{order}I", pixels.nbytes))
    entries_of |= {entry[0]: entry for entry in entries}
    content = pixels.tobytes() + bytes(pixels.nbytes % 2)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    return head + content + directory(list(entries_of.values()), order, 8 + len(content), following)


ODD_TAGS: dict[str, Tag] = {
    "ResolutionUnit as text": (0x128, 2, 2, b"2\0"),
    "XResolution as text": (0x11A, 2, 3, b"72\0"),
    "XResolution of a rational beyond the end": (0x11A, 5, 1, struct.pack("<I", 2**31)),
    "XResolution 0/0": (0x11A, 5, 1, bytes(8)),
    "a type that is none": (0x10F, 99, 1, b"abcd"),
    "a GPS directory that is the first one": (0x8825, 4, 1, struct.pack("<I", 8)),
    "a GPS directory of text": (0x8825, 2, 20, b"not a directory at a"),
    "an EXIF directory beyond the end": (0x8769, 4, 1, struct.pack("<I", 2**32 - 1)),
    "a maker note of garbage": (0x927C, 7, 5_000, bytes(range(250)) * 20),
    "a count of four thousand million": (0x10E, 2, 2**32 - 1, struct.pack("<I", 8)),
    "an interoperability loop": (0xA005, 4, 1, struct.pack("<I", 8)),
    "a user comment of no encoding": (0x9286, 7, 12, b"\xff" * 12),
    "a date that is none": (0x132, 2, 20, b"0000:00:00 00:00:00\0"),
}


@pytest.mark.parametrize("odd", ODD_TAGS)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_of_any_kind_leaves_the_picture_turned_as_it_says(file_format: str, odd: str) -> None:
    content = exif(short(0x112, 6), ODD_TAGS[odd])
    data = {
        "PNG": lambda: png_with(png_chunk(b"eXIf", content)),
        "JPEG": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + content)),
        "WEBP": lambda: webp_with(b"EXIF", content, 0x08),
        "TIFF": lambda: tiff(short(0x112, 6), ODD_TAGS[odd]),
    }[file_format]()
    upright = GREY if file_format == "TIFF" else PIXELS[file_format]
    np.testing.assert_array_equal(decode_image(data, "a"), np.rot90(upright, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_each_orientation_is_applied_as_pillow_does(orientation: int, order: str) -> None:
    content = exif(short(0x112, orientation, order), order=order)
    for data in (
        png_with(png_chunk(b"eXIf", content), at_end=True),
        jpeg_with(segment(0xE1, b"Exif\0\0" + content)),
        webp_with(b"EXIF", b"Exif\0\0" + content, 0x08),
        tiff(short(0x112, orientation, order), order=order),
    ):
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(decode_image(data, "a").squeeze(), expected)


@pytest.mark.parametrize(
    "entry",
    [
        short(0x112, 0),
        short(0x112, 9),
        short(0x112, 65_535),
        (0x112, 2, 2, b"6\0"),
        (0x112, 5, 1, struct.pack("<II", 6, 1)),
        (0x112, 3, 2, struct.pack("<HH", 6, 6)),
        (0x112, 3, 0, bytes(4)),
        (0x112, 7, 4, b"\6\0\0\0"),
    ],
)
def test_an_orientation_that_is_none_turns_nothing(entry: Tag) -> None:
    for data in (png_with(png_chunk(b"eXIf", exif(entry))), jpeg_with(segment(0xE1, b"Exif\0\0" + exif(entry)))):
        file_format = "PNG" if data.startswith(b"\x89") else "JPEG"
        np.testing.assert_array_equal(decode_image(data, "a"), PIXELS[file_format])
    np.testing.assert_array_equal(decode_image(tiff(entry), "a"), GREY)


def test_a_long_orientation_is_one() -> None:
    entry = (0x112, 4, 1, struct.pack("<I", 8))
    np.testing.assert_array_equal(decode_image(png_with(png_chunk(b"eXIf", exif(entry))), "a"), np.rot90(RGB))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
XMP_AS_ELEMENT = b"<x:xmpmeta><tiff:Orientation>3</tiff:Orientation></x:xmpmeta>"


@pytest.mark.parametrize("xmp", [XMP, XMP_AS_ELEMENT])
def test_the_orientation_of_xmp_is_applied_if_exif_gives_none(xmp: bytes) -> None:
    name = b"XML:com.adobe.xmp\0"
    files = {
        "PNG": png_with(png_chunk(b"iTXt", name + b"\0\0\0\0" + xmp)),
        "JPEG": jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)),
        "WEBP": webp_with(b"XMP ", xmp, 0x04),
    }
    for file_format, data in files.items():
        np.testing.assert_array_equal(decode_image(data, "a"), PIXELS[file_format][::-1, ::-1])
    packed = png_with(png_chunk(b"iTXt", name + b"\1\0\0\0" + zlib.compress(xmp)))
    np.testing.assert_array_equal(decode_image(packed, "a"), RGB[::-1, ::-1])
    np.testing.assert_array_equal(decode_image(tiff((700, 1, len(xmp), xmp)), "a"), GREY[::-1, ::-1])
    both = png_with(png_chunk(b"iTXt", name + b"\0\0\0\0" + xmp), png_chunk(b"eXIf", exif(short(0x112, 1))))
    np.testing.assert_array_equal(decode_image(both, "a"), RGB)


@pytest.mark.parametrize("length", range(0, 40))
def test_exif_cut_anywhere_leaves_the_picture(length: int) -> None:
    content = exif(short(0x112, 6), (0x10F, 2, 10, b"a camera \0"))[:length]
    decoded = decode_image(png_with(png_chunk(b"eXIf", content)), "a")
    np.testing.assert_array_equal(decoded, np.rot90(RGB, -1) if length >= 34 else RGB)


ANCILLARY: dict[str, Callable[[], bytes]] = {
    "a profile of 1.5 MB": lambda: png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1_500_000))),
    "two profiles": lambda: 2 * png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100))),
    "a profile cut short": lambda: png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100))[:6]),
    "a profile and sRGB": lambda: png_chunk(b"iCCP", b"icc\0\0abc") + png_chunk(b"sRGB", b"\0"),
    "a text of 1.5 MB": lambda: png_chunk(b"tEXt", b"prompt\0" + bytes(1_500_000)),
    "texts of 80 MB in all": lambda: 80 * png_chunk(b"zTXt", b"graph\0\0" + zlib.compress(bytes(10**6))),
    "a text without a keyword": lambda: png_chunk(b"tEXt", b"no end of the keyword"),
    "a packed text that is none": lambda: png_chunk(b"zTXt", b"prompt\0\0garbage"),
    "a packed text of another method": lambda: png_chunk(b"zTXt", b"prompt\0\7garbage"),
    "an international text cut short": lambda: png_chunk(b"iTXt", b"workflow\0\1"),
    "a raw profile that is no hexadecimal": lambda: png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz"),
    "a text with a wrong checksum": lambda: png_chunk(b"tEXt", b"a\0b", checksum=1),
    "an EXIF chunk with a wrong checksum": lambda: png_chunk(b"eXIf", b"garbage", checksum=1),
    "a gamma of one byte": lambda: png_chunk(b"gAMA", b"\0"),
    "chromaticities of nothing": lambda: png_chunk(b"cHRM", b""),
    "a rendering intent of nothing": lambda: png_chunk(b"sRGB", b""),
    "a pixel size of two bytes": lambda: png_chunk(b"pHYs", b"\0\0"),
    "a date that is none": lambda: png_chunk(b"tIME", b"\xff" * 7),
    "a background of another colour type": lambda: png_chunk(b"bKGD", b"\0"),
    "significant bits of no length": lambda: png_chunk(b"sBIT", b""),
    "a histogram without a palette": lambda: png_chunk(b"hIST", b"\0\1"),
    "private chunks": lambda: png_chunk(b"prVt", b"x" * 1000) + png_chunk(b"vpAg", b""),
    "a suggested palette": lambda: png_chunk(b"sPLT", b"\0"),
    "an animation control of one frame, cut short": lambda: png_chunk(b"acTL", b"\0\0\0\1"),
    "twenty thousand empty chunks": lambda: 20_000 * png_chunk(b"teSt", b""),
}


@pytest.mark.parametrize("kind", ANCILLARY)
@pytest.mark.parametrize("at_end", [False, True])
def test_ancillary_chunks_of_a_png_of_any_kind_leave_the_picture(kind: str, at_end: bool) -> None:
    data = png_with(ANCILLARY[kind](), at_end=at_end)
    np.testing.assert_array_equal(decode_image(data, "a.png"), RGB)


def test_exif_in_a_text_of_imagemagick_is_applied() -> None:
    digits = exif(short(0x112, 6)).hex()
    text = f"\nexif\n{len(digits) // 2:8}\n{digits[:40]}\n{digits[40:]}\n".encode()
    data = png_with(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    np.testing.assert_array_equal(decode_image(data, "a.png"), np.rot90(RGB, -1))


@pytest.mark.parametrize("damage", ["checksum of pixels", "checksum of the header", "end", "unknown critical chunk"])
def test_damage_of_what_defines_the_pixels_is_refused(damage: str) -> None:
    data = bytearray(PLAIN["PNG"])
    if damage == "checksum of pixels":
        data[-16] ^= 1
    elif damage == "checksum of the header":
        data[30] ^= 1
    elif damage == "end":
        data = data[:-12]
    else:
        data = bytearray(png_with(png_chunk(b"CgBI", bytes(4))))
    with pytest.raises(BadImages) as caught:
        decode_image(bytes(data), "a.png")
    assert caught.value.code == ("unsupported_format" if damage == "unknown critical chunk" else "damaged_image")


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_grey_level_that_is_transparent_is_found_at_each_depth(depth: int, interlaced: bool) -> None:
    levels = 2**depth
    values = np.full((1, 8), levels - 1, np.uint8)
    values[0, 0] = 0
    bits = np.unpackbits(values.reshape(-1, 1), axis=1)[:, 8 - depth :]
    if interlaced:  # Adam7 of one row: passes 1, 2, 4 and 6 hold its columns 0, 4, 2 6 and the odd ones
        rows = [np.packbits(bits[columns].reshape(-1)).tobytes() for columns in ([0], [4], [2, 6], [1, 3, 5, 7])]
    else:
        rows = [np.packbits(bits.reshape(-1)).tobytes()]
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, interlaced))
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + png_chunk(b"IEND", b"")
    plain = decode_image(PLAIN["PNG"][:8] + header + pixels, "a.png")
    np.testing.assert_array_equal(plain[..., 0], values.astype(int) * 255 // (levels - 1))
    for level in range(min(levels, 5)):
        data = PLAIN["PNG"][:8] + header + png_chunk(b"tRNS", struct.pack(">H", level)) + pixels
        if level in (0, levels - 1):
            with pytest.raises(BadImages) as caught:
                decode_image(data, "a.png")
            assert caught.value.code == "transparent_image"
        else:
            np.testing.assert_array_equal(decode_image(data, "a.png"), plain)


SEGMENTS = {
    "a profile of two segments, the second missing": segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(60_000)),
    "a profile numbered 0 of 0": segment(0xE2, b"ICC_PROFILE\0\0\0" + bytes(10)),
    "a profile cut after its name": segment(0xE2, b"ICC_PROFILE\0"),
    "Photoshop resources of garbage": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff\xff\xff\xff"),
    "Photoshop resources of a resolution cut short": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10\0"),
    "a JFIF marker without its density": segment(0xE0, b"JFIF\0\1"),
    "a JFIF density of 0": segment(0xE0, b"JFIF\0\1\1\1\0\0\0\0\0\0"),
    "an MPF index of garbage": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "an MPF index of two pictures that are not there": segment(
        0xE2, b"MPF\0II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0xB001, 4, 1, 2) + bytes(4)
    ),
    "an Adobe marker cut short": segment(0xEE, b"Adobe"),
    "FlashPix": segment(0xE2, b"FPXR\0" + bytes(20)),
    "an empty APP1": segment(0xE1, b""),
    "EXIF of nothing": segment(0xE1, b"Exif\0\0"),
    "a comment of 60 kB, twice": 2 * segment(0xFE, b"\xff" * 60_000),
    "each APP": b"".join(segment(0xE0 + n, bytes([n]) * 50) for n in range(16)),
    "padding": b"\xff" * 100,
}


@pytest.mark.parametrize("kind", SEGMENTS)
def test_segments_of_a_jpeg_of_any_kind_leave_the_picture(kind: str) -> None:
    np.testing.assert_array_equal(decode_image(jpeg_with(SEGMENTS[kind]), "a.jpg"), PIXELS["JPEG"])


def test_the_markers_that_define_the_colours_of_a_jpeg_are_kept() -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "JPEG", quality=95, keep_rgb=True)  # without a JFIF marker
    data = buffer.getvalue()
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data, "a.jpg"), expected)
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")  # transform 0: the components are RGB
    place = PLAIN["JPEG"].index(b"\xff\xdb")
    data = PLAIN["JPEG"][:2] + adobe + PLAIN["JPEG"][place:]
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert not np.array_equal(expected, PIXELS["JPEG"])
    np.testing.assert_array_equal(decode_image(data, "a.jpg"), expected)


def test_of_a_photograph_with_further_pictures_the_first_is_taken() -> None:
    """As phones store a gain map or a depth map behind the picture (MPO)."""
    buffer = io.BytesIO()
    others = [Image.fromarray(RGB[::-1]), Image.fromarray(GREY[..., 0])]
    Image.fromarray(RGB).save(buffer, "MPO", quality=95, save_all=True, append_images=others)
    assert Image.open(io.BytesIO(buffer.getvalue())).n_frames == 3
    np.testing.assert_array_equal(decode_image(buffer.getvalue(), "a.jpg"), PIXELS["JPEG"])


@pytest.mark.parametrize(
    ("kind", "flags"), [(b"ICCP", 0x20), (b"EXIF", 0x08), (b"XMP ", 0x04), (b"abcd", 0), (b"ICCP", 0), (b"abcd", 0x2C)]
)
@pytest.mark.parametrize("content", [b"", b"\xff" * 7, b"Exif\0\0", bytes(100_000)])
def test_chunks_of_a_webp_of_any_kind_leave_the_picture(kind: bytes, flags: int, content: bytes) -> None:
    data = webp_with(kind, content, flags)
    np.testing.assert_array_equal(decode_image(data, "a.webp"), RGB)
    if content:  # the file was cut in its metadata
        np.testing.assert_array_equal(decode_image(data[: -len(content)], "a.webp"), RGB)


TIFF_TAGS: dict[str, list[Tag]] = {
    "a profile beyond the end": [(34675, 7, 2**31, struct.pack("<I", 8))],
    "a resolution of 0": [(282, 5, 1, bytes(8)), (283, 5, 1, bytes(8))],
    "a resolution as text": [(282, 2, 6, b"72dpi\0")],
    "tags of private kinds": [(65_000 + n, 99, 2**32 - 1, b"\xff" * 4) for n in range(9)],
    "a page name that is not ASCII": [(285, 2, 8, "größe".encode() + b"\0")],
    "sub-directories that loop": [(330, 4, 2, struct.pack("<II", 8, 8))],
    "a date of no end": [(306, 2, 20, b"x" * 20)],
    "metadata of IPTC as LONG": [(33723, 4, 3, bytes(12))],
    "Photoshop resources": [(34377, 7, 9, b"8BIM\xff\xff\xff\xff\xff")],
}


@pytest.mark.parametrize("kind", TIFF_TAGS)
def test_tags_of_a_tiff_of_any_kind_leave_the_picture(kind: str) -> None:
    for order in "<>":
        data = tiff(*TIFF_TAGS[kind], order=order)
        np.testing.assert_array_equal(decode_image(data, "a.tif"), GREY)


@pytest.mark.parametrize("following", [3, 100, 2**31, 2**32 - 1])
def test_a_next_directory_that_is_none_is_no_picture(following: int) -> None:
    np.testing.assert_array_equal(decode_image(tiff(following=following), "a.tif"), GREY)


def pages(first: int, second: int) -> bytes:
    """A TIFF of two directories with these subfile types."""
    one = tiff((254, 4, 1, struct.pack("<I", first)))
    link = len(one)
    two = directory([short(256, 4), short(257, 4), (254, 4, 1, struct.pack("<I", second))], start=link)
    return tiff((254, 4, 1, struct.pack("<I", first)), following=link) + two


def test_a_preview_beside_the_picture_is_no_second_picture() -> None:
    np.testing.assert_array_equal(decode_image(pages(0, 1), "a.tif"), GREY)
    for first, second, code in ((0, 0, "animated_image"), (1, 0, "unsupported_format")):
        with pytest.raises(BadImages) as caught:
            decode_image(pages(first, second), "a.tif")
        assert caught.value.code == code


def test_a_tiff_cut_anywhere_is_refused_also_with_its_directory_first() -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "TIFF", description="x" * 100)
    for data in (buffer.getvalue(), tiff()):
        for length in range(0, len(data) - 4, 7):
            with pytest.raises(BadImages):
                decode_image(data[:length], "a.tif")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_colour_map_of_8_bits_is_used_as_one(bits: int, order: str) -> None:
    indices = RANDOM.integers(0, 2**bits, (6, 8), np.uint8)
    stored = indices if bits == 8 else (indices[:, ::2] << 4 | indices[:, 1::2])
    colours = RANDOM.integers(0, 256, (3, 2**bits), np.uint16)
    expected = colours.T[indices].astype(np.uint8)
    for scale in (1, 256, 257):
        table = (colours * scale).astype(f"{order}u2").tobytes()
        tags = [short(256, 8, order), short(258, bits, order), short(262, 3, order), (320, 3, colours.size, table)]
        data = tiff(*tags, pixels=stored[..., None], order=order)
        np.testing.assert_array_equal(decode_image(data, "a.tif"), expected)


def test_a_colour_map_that_cannot_be_right_is_refused() -> None:
    for entry in ((320, 1, 768, bytes(768)), (320, 3, 768, struct.pack("<I", 2**31))):
        with pytest.raises(BadImages):
            decode_image(tiff(short(262, 3), entry), "a.tif")


def test_other_ways_to_store_the_pixels_of_a_tiff_are_read() -> None:
    np.testing.assert_array_equal(decode_image(tiff(short(262, 0)), "white is zero"), 255 - GREY)
    reversed_bits = np.packbits(np.unpackbits(GREY, axis=2)[..., ::-1], axis=2)
    np.testing.assert_array_equal(decode_image(tiff(short(266, 2), pixels=reversed_bits), "bit order"), GREY)
    np.testing.assert_array_equal(decode_image(tiff(order=">"), "big endian"), GREY)


@pytest.mark.parametrize("header_size", [40, 52, 56, 108, 124])
@pytest.mark.parametrize("top_down", [False, True])
def test_bitmaps_with_any_header_are_read(header_size: int, top_down: bool) -> None:
    height, width = 12, 20
    info = struct.pack("<IiiHHIIiiII", header_size, width, -height if top_down else height, 1, 24, 0, 0, -1, 0, 0, 0)
    info = info.ljust(header_size, b"\0")
    rows = RGB[..., ::-1] if top_down else RGB[::-1, :, ::-1]
    head = b"BM" + struct.pack("<IHHI", 0, 7, 7, 14 + header_size)  # reserved fields that are not 0, and no length
    np.testing.assert_array_equal(decode_image(head + info + rows.tobytes(), "a.bmp"), RGB)


HOSTILE = {
    "PNG of packed texts of XMP": png_with(
        1_500 * png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**20), 9))
    ),
    "JPEG of short EXIF segments": jpeg_with(140_000 * segment(0xE1, b"Exif\0\0abcd")),
    "JPEG of padding": jpeg_with(b"\xff" * 2_000_000),
    "WebP of empty chunks": PLAIN["WEBP"] + 200_000 * b"abcd\0\0\0\0",
    "WebP of empty chunks of pixels": b"RIFF" + struct.pack("<I", 2**21) + b"WEBP" + 200_000 * b"ALPH\0\0\0\0",
    "TIFF of large directories": b"II*\0\x08\0\0\0" + b"\xff\xff" * 10**6,
    "comments before no SVG": 140 * b"<!---->",
    "white space before no SVG": 2_000 * b" ",
}


@pytest.mark.timeout(60)  # quadratic or exponential work would take hours
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_metadata_end_in_a_picture_or_a_refusal(kind: str) -> None:
    if kind.startswith(("PNG", "JPEG", "WebP of empty chunks")) and not kind.endswith("pixels"):
        assert decode_image(HOSTILE[kind], "a").shape == RGB.shape
    else:
        with pytest.raises(BadImages):
            decode_image(HOSTILE[kind], "a")


def test_the_size_is_that_of_the_turned_picture() -> None:
    column = encoded("PNG", RGB[:2, :1])  # 1 wide and 2 high, turned 2 wide and 1 high
    turned = column[:33] + png_chunk(b"eXIf", exif(short(0x112, 6))) + column[33:]
    assert decode_image(turned, "a.png").shape == (1, 2, 3)
    row = encoded("PNG", RGB[:1, :2])
    with pytest.raises(BadImages, match="is 1 pixels wide and 2 high"):
        decode_image(row[:33] + png_chunk(b"eXIf", exif(short(0x112, 6))) + row[33:], "a.png")
