"""Single images: what is taken comes through to the pixel, what is not is refused with a code."""

import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowpp.config import ModelConfig
from flowpp.images import (
    MAX_SIDE,
    MIN_WIDTH,
    BadImages,
    Limits,
    decode_image,
    encode_png,
    expand_bits,
    reduce_bits,
)
from tests.cost import cost

RANDOM = np.random.RandomState(0)
RGB = RANDOM.randint(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = RGB[..., :1]


def encoded(image: Image.Image | np.ndarray, file_format: str, **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG by hand, with any header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def refused(data: bytes, name: str = "image", limits: Limits | None = None) -> BadImages:
    with pytest.raises(BadImages) as caught:
        decode_image(data, name, limits or Limits())
    assert caught.value.name == name
    return caught.value


LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "BMP": {},
    "TIFF": {},
}


@pytest.mark.parametrize("image", [RGB, GREY], ids=["RGB", "grey"])
@pytest.mark.parametrize("file_format", LOSSLESS)
def test_lossless_formats_come_through_to_the_pixel(file_format: str, image: np.ndarray) -> None:
    decoded = decode_image(encoded(image, file_format, **LOSSLESS[file_format]), "image")
    if file_format == "WEBP":  # has no grey
        image = np.broadcast_to(image, RGB.shape)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize("compression", ["raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate"])
def test_plainly_compressed_tiff_comes_through_to_the_pixel(compression: str) -> None:
    np.testing.assert_array_equal(decode_image(encoded(RGB, "TIFF", compression=compression), "a.tif"), RGB)


@pytest.mark.parametrize("image", [RGB, GREY], ids=["RGB", "grey"])
def test_jpeg_is_decoded_as_pillow_does(image: np.ndarray) -> None:
    data = encoded(image, "JPEG")
    decoded = decode_image(data, "image.jpeg")
    assert decoded.shape == image.shape
    np.testing.assert_array_equal(decoded.squeeze(), np.asarray(Image.open(io.BytesIO(data))))


def test_a_palette_is_looked_up() -> None:
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encoded(palette, "PNG"), "a.png"), expected)


def test_a_bilevel_image_becomes_grey_of_0_and_255() -> None:
    bits = RANDOM.rand(9, 17) < 0.5
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(bits), "PNG"), "a.png")[..., 0], bits * 255)


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to view
    decoded = decode_image(encoded(RGB, "PNG", exif=exif), "a.png")
    np.testing.assert_array_equal(decoded, np.rot90(RGB, -1))


OPAQUE = Image.fromarray(RGB)
OPAQUE.putalpha(255)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_an_opaque_alpha_channel_is_dropped(file_format: str) -> None:
    data = encoded(OPAQUE, file_format, **LOSSLESS[file_format])
    np.testing.assert_array_equal(decode_image(data, "image"), RGB)


def test_an_opaque_grey_alpha_image_stays_grey() -> None:
    image = Image.fromarray(GREY[..., 0])
    image.putalpha(255)
    np.testing.assert_array_equal(decode_image(encoded(image, "PNG"), "image"), GREY)


def test_transparent_images_are_refused() -> None:
    almost = OPAQUE.copy()
    almost.putpixel((3, 4), (1, 2, 3, 254))
    keyed = encoded(RGB, "PNG", transparency=tuple(int(v) for v in RGB[0, 0]))
    palette = Image.fromarray(RGB).quantize(16)
    for data in (
        encoded(almost, "PNG"),
        encoded(almost, "WEBP", lossless=True),
        keyed,
        encoded(palette, "PNG", transparency=3),
        encoded(palette, "PNG", transparency=bytes(range(16))),
    ):
        assert refused(data).code == "transparent_image"


def sixteen_bit_tiff() -> bytes:
    """A TIFF of two RGB pixels of 16 bits a channel, which Pillow would open as 8-bit RGB."""
    tags = [
        (256, 3, 1, 2),
        (257, 3, 1, 1),
        (258, 3, 3, 134),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 140),
        (277, 3, 1, 3),
        (278, 3, 1, 1),
        (279, 4, 1, 12),
        (284, 3, 1, 1),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return (b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<3H", 16, 16, 16)) + bytes(range(12))


def test_images_of_more_than_8_bits_are_refused() -> None:
    deep_grey = Image.fromarray(RANDOM.randint(0, 65536, (8, 8)).astype(np.uint16))
    deep_rgb = png(8, 8, depth=16, data=(b"\0" + bytes(range(48))) * 8)
    assert Image.open(io.BytesIO(deep_rgb)).mode == "RGB"  # Pillow would take it
    assert Image.open(io.BytesIO(sixteen_bit_tiff())).mode == "RGB"
    floats = Image.fromarray(RANDOM.rand(8, 8).astype(np.float32))
    for data in (
        encoded(deep_grey, "PNG"),
        encoded(deep_grey, "TIFF"),
        deep_rgb,
        sixteen_bit_tiff(),
        encoded(floats, "TIFF"),
    ):
        error = refused(data)
        assert error.code == "unsupported_depth"
        assert "accepted are still, opaque images of 8 bits a channel" in str(error)


def test_cmyk_and_lab_images_are_refused() -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    for data in (encoded(cmyk, "JPEG"), encoded(cmyk, "TIFF"), encoded(Image.new("LAB", (8, 8)), "TIFF")):
        assert refused(data).code == "unsupported_colour"


FRAMES = {"save_all": True, "append_images": [Image.fromarray(RGB[::-1])]}


def test_animated_images_are_refused() -> None:
    for file_format in ("PNG", "WEBP", "TIFF"):
        assert refused(encoded(RGB, file_format, **FRAMES)).code == "animated_image", file_format
    error = refused(encoded(RGB, "GIF", **FRAMES), "a.gif")
    assert error.code == "unsupported_format"
    assert "is GIF" in str(error)


def test_a_tiff_of_unusual_compression_is_refused() -> None:
    assert refused(encoded(RGB, "TIFF", compression="jpeg")).code == "unsupported_format"


@pytest.mark.parametrize("name", ["a.png", "folder.png/a.JPG", "a.gif", "a.npy", "a", "", "a.zip", "."])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_the_content_says_what_a_file_is_whatever_its_name(name: str, file_format: str) -> None:
    data = encoded(RGB, file_format, **LOSSLESS[file_format])
    np.testing.assert_array_equal(decode_image(data, name), RGB)


@pytest.mark.parametrize("data", [b"hello", b"BM hello, I am a text about cars", b"\xef\xbb\xbfname,label\n", b"RIFF"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    error = refused(data, "a.png")
    assert error.code == "not_an_image"
    assert "a.png: is not an image of a known kind; accepted are" in str(error)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_anywhere_is_refused(file_format: str) -> None:
    data = encoded(RGB, file_format)
    for length in range(len(data)):
        assert refused(data[:length]).code in ("damaged_image", "not_an_image"), length


def test_a_png_of_a_wrong_checksum_is_refused() -> None:
    data = bytearray(encoded(RGB, "PNG"))
    data[len(data) // 2] ^= 1
    assert refused(bytes(data)).code == "damaged_image"


@pytest.mark.parametrize("side", [MAX_SIDE + 1, 10_000, 60_000, 2**31 - 1])
def test_a_huge_image_is_refused_by_its_header(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused(png(side, side)).code == "image_too_large"
        assert refused(png(2, side)).code == "image_too_large"
        assert refused(png(side, 1)).code == "image_too_large"


def test_a_huge_webp_is_refused_by_its_header() -> None:
    header = b"VP8X" + struct.pack("<IB3x", 10, 0) + (16382).to_bytes(3, "little") * 2
    frame = encoded(RGB, "WEBP", lossless=True)[12:]
    data = b"RIFF" + struct.pack("<I", 4 + len(header) + len(frame)) + b"WEBP" + header + frame
    assert refused(data).code in ("image_too_large", "damaged_image")


BOMB = zlib.compress(bytes(2**26))  # 64 kB


@pytest.mark.parametrize(
    "bomb",
    [
        chunk(b"zTXt", b"Comment\0\0" + BOMB),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB),
        chunk(b"iCCP", b"profile\0\0" + BOMB),
    ],
    ids=["text", "international text", "profile"],
)
def test_a_compressed_bomb_beside_the_pixels_of_a_png_is_not_unpacked(bomb: bytes) -> None:
    data = encoded(RGB, "PNG")
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(decode_image(data[:33] + 9 * bomb + data[33:], "a.png"), RGB)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_of_a_png_no_more_is_decompressed_than_it_has_pixels() -> None:
    data = png(256, 256, data=bytes(2**28))
    assert decode_image(data, "a.png").shape == (256, 256, 3)
    assert cost(lambda: decode_image(data, "a.png")) < 1, "it was decompressed"


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once() -> None:
    """120 kB that take a second to decode."""
    data = encoded(np.zeros((256, 256, 3), np.uint8), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode_image(data[:-2] + 20 * scan + b"\xff\xd9", "a.jpg").shape == (256, 256, 3)
    many = data[:-2] + 10_000 * scan + b"\xff\xd9"
    assert refused(many).code == "unsupported_format"
    assert cost(lambda: refused(many)) < 0.5


@pytest.mark.parametrize("loops", [True, False])
def test_a_tiff_of_pages_without_end_is_not_walked_through(loops: bool) -> None:
    data = encoded(RGB, "TIFF")
    directory = int.from_bytes(data[4:8], "little")
    link = directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], "little")
    chain = b"".join(struct.pack("<HI", 0, len(data) + 6 * (page + 1)) for page in range(300_000))
    target = directory if loops else len(data)
    data = data[:link] + struct.pack("<I", target) + data[link + 4 :] + chain
    np.testing.assert_array_equal(decode_image(data, "a.tif"), RGB)
    assert cost(lambda: decode_image(data, "a.tif")) < 5


def test_only_the_formats_that_are_taken_are_opened() -> None:
    """Of the others not even a decoder is asked, whatever the name says."""
    taken = {"PNG", "JPEG", "WEBP", "BMP", "TIFF", "MPO"}
    Image.init()
    others = [each for each in Image.SAVE if each not in taken]
    tried = set()
    for file_format in others:
        for image in (Image.fromarray(RGB), Image.fromarray(GREY[..., 0]), Image.fromarray(GREY[..., 0] > 127)):
            try:
                data = encoded(image, file_format)
            except Exception:  # some cannot be written here, or not of these colours
                continue
            if not data.startswith((b"BM", b"\x89PNG", b"\xff\xd8", b"II", b"MM")):
                tried.add(file_format)
                assert refused(data).code in ("not_an_image", "unsupported_format"), file_format
    assert len(tried) > 10


def test_a_file_of_too_many_bytes_is_refused() -> None:
    assert refused(encoded(RGB, "PNG"), limits=Limits(max_image_bytes=100)).code == "image_too_large"


def test_the_sizes_taken_are_those_of_models() -> None:
    fields = ModelConfig.model_json_schema()["properties"]
    assert (fields["height"]["minimum"], fields["height"]["maximum"]) == (1, MAX_SIDE)
    assert (fields["width"]["minimum"], fields["width"]["maximum"]) == (MIN_WIDTH, MAX_SIDE)
    assert refused(encoded(RGB[:, :1], "PNG")).code == "image_too_small"
    for height, width in ((1, MIN_WIDTH), (MAX_SIDE, MAX_SIDE)):
        image = np.zeros((height, width, 3), np.uint8)
        np.testing.assert_array_equal(decode_image(encoded(image, "PNG"), "a.png"), image)


def test_a_name_cannot_write_to_the_terminal() -> None:
    message = str(refused(b"", "\x1b[2Jevil\n" + 1000 * "x" + "\udcff.png"))
    assert message.isprintable()
    assert len(message) < 500


SAMPLES = [
    encoded(RGB, "PNG"),
    encoded(GREY, "JPEG"),
    encoded(RGB, "JPEG", progressive=True),
    encoded(RGB, "WEBP"),
    encoded(OPAQUE, "WEBP", lossless=True),
    encoded(RGB, "BMP"),
    encoded(RGB, "TIFF"),
    encoded(RGB, "TIFF", compression="tiff_lzw"),
    encoded(RGB, "PNG", **FRAMES),
    encoded(Image.fromarray(RGB).quantize(16), "PNG"),
]


def with_right_checksums(data: bytes) -> bytes:
    """The PNG with each chunk's CRC made right, so that mutations reach the decoder behind it."""
    fixed, position = data[:8], 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        fixed += chunk(data[position + 4 : position + 8], data[position + 8 : position + 8 + length])
        position += 12 + length
    return fixed


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    sample=st.sampled_from(SAMPLES),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    kept=st.floats(0.5, 1),
)
def test_of_damaged_files_nothing_comes_out_but_an_image_or_bad_images(
    sample: bytes, changes: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(sample[: int(len(sample) * kept)] if kept < 0.9 else sample)
    for place, value in changes:
        data[int(place * place * len(data))] = value  # headers rather than pixels
    for variant in (bytes(data), with_right_checksums(bytes(data)) if sample.startswith(b"\x89PNG") else bytes(data)):
        try:
            image = decode_image(variant, "image")
        except BadImages:
            continue
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] in (1, 3)
        assert max(image.shape) <= MAX_SIDE


@pytest.mark.parametrize("image", [RGB, GREY], ids=["RGB", "grey"])
def test_an_encoded_png_decodes_to_the_same(image: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_image(encode_png(image), "a.png"), image)


@pytest.mark.parametrize("bits", range(1, 9))
def test_reduced_bits_expand_to_black_and_white_and_back(bits: int) -> None:
    symbols = np.arange(2**bits, dtype=np.uint8)
    values = expand_bits(symbols, bits)
    assert values.dtype == np.uint8
    assert (values[0], values[-1]) == (0, 255)
    np.testing.assert_array_equal(reduce_bits(values, bits), symbols)
    np.testing.assert_array_equal(reduce_bits(np.arange(256, dtype=np.uint8), bits), np.arange(256) * 2**bits // 256)
