"""Image files, arrays and archives, and damaged ones made of them: the same ones for the same seed."""

import io
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (32, 32, 3), np.uint8)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def image_files() -> dict[str, bytes]:
    """Valid files of each format that is taken, of many kinds, by name; some of kinds that are refused."""
    rgb = Image.fromarray(PIXELS)
    grey, palette, bits = rgb.convert("L"), rgb.quantize(16), rgb.convert("1")
    opaque = rgb.copy()
    opaque.putalpha(255)
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    cmyk = rgb.convert("CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = {"save_all": True, "append_images": [rgb.rotate(90)]}
    files = {
        "rgb.png": saved(rgb, "PNG", optimize=True),
        "grey.png": saved(grey, "PNG"),
        "palette.png": saved(palette, "PNG"),
        "bits.png": saved(bits, "PNG"),
        "opaque.png": saved(opaque, "PNG"),
        "deep.png": saved(deep, "PNG"),
        "annotated.png": saved(rgb, "PNG", exif=turned, icc_profile=profile, dpi=(72, 72)),
        "animated.png": saved(rgb, "PNG", **frames),
        "rgb.jpg": saved(rgb, "JPEG"),
        "grey.jpg": saved(grey, "JPEG", quality=30),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True, subsampling=0),
        "cmyk.jpg": saved(cmyk, "JPEG"),
        "annotated.jpg": saved(rgb, "JPEG", exif=turned, icc_profile=profile, comment=b"a comment"),
        "rgb.webp": saved(rgb, "WEBP", lossless=True),
        "lossy.webp": saved(rgb, "WEBP", quality=50),
        "opaque.webp": saved(opaque, "WEBP", lossless=True, exact=True),
        "annotated.webp": saved(rgb, "WEBP", exif=turned, icc_profile=profile),
        "animated.webp": saved(rgb, "WEBP", **frames),
        "rgb.bmp": saved(rgb, "BMP"),
        "grey.bmp": saved(grey, "BMP"),
        "palette.bmp": saved(palette, "BMP"),
        "bits.bmp": saved(bits, "BMP"),
        "rgb.tif": saved(rgb, "TIFF"),
        "deep.tif": saved(deep, "TIFF"),
        "cmyk.tif": saved(cmyk, "TIFF"),
        "pages.tif": saved(rgb, "TIFF", **frames),
        "annotated.tif": saved(rgb, "TIFF", exif=turned, icc_profile=profile),
        "rgb.gif": saved(rgb, "GIF"),
    }
    for compression in ("packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"):
        files[f"{compression}.tif"] = saved(bits if compression == "group4" else rgb, "TIFF", compression=compression)
    return files


def source_files() -> dict[str, bytes]:
    """Valid archives and arrays of each kind that is taken, by name."""
    images = image_files()
    entries = {f"{split}/{name}": images["rgb.png"] for split in ("train", "validation") for name in ("a.png", "b.png")}
    array = RANDOM.integers(0, 256, (6, 32, 32, 3), np.uint8)
    batch = pickle.dumps({b"data": array.transpose(0, 3, 1, 2).reshape(6, 3072), b"labels": [0] * 6}, protocol=2)
    batches = {f"cifar-10-batches-py/{name}": batch for name in ("data_batch_1", "test_batch")}
    return {
        "stored.zip": zipped(entries, zipfile.ZIP_STORED),
        "deflated.zip": zipped(entries, zipfile.ZIP_DEFLATED),
        "pax.tar": tarred(entries, "w", tarfile.PAX_FORMAT),
        "gnu.tar": tarred({f"{'long/' * 30}{name}": data for name, data in entries.items()}, "w", tarfile.GNU_FORMAT),
        "images.tar.gz": tarred(entries, "w:gz", tarfile.GNU_FORMAT),
        "images.npy": arrays(np.save, array),
        "images.npz": arrays(np.savez, train=array, validation=array[:2]),
        "packed.npz": arrays(np.savez_compressed, array),
        "cifar-10-python.tar": tarred(batches, "w", tarfile.GNU_FORMAT),
        "cifar-10-python.tar.gz": tarred(batches, "w:gz", tarfile.GNU_FORMAT),
        "data_batch_1": batch,
    }


def zipped(entries: dict[str, bytes], compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(entries: dict[str, bytes], mode: str, tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tar_format) as archive:  # type: ignore[call-overload]
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def arrays(save: Callable[..., None], *of: np.ndarray, **named: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *of, **named)
    return buffer.getvalue()


def damaged(files: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """So many files with a name each, made of `files` by one to three kinds of damage."""
    chance = random.Random(seed)
    names = list(files)
    for index in range(count):
        name = names[index % len(names)]
        data = files[name]
        packed = data.startswith(b"\x1f\x8b") and chance.random() < 0.8  # else its checksum fails first
        if packed:
            data = zlib.decompress(data, 31)
        for _ in range(chance.randint(1, 3)):
            data = chance.choice(DAMAGES)(data, chance, files)
        if packed:
            data = _gzip(data)
        if data.startswith(PNG_SIGNATURE) and chance.random() < 0.7:
            data = with_right_checksums(data)
        if chance.random() < 0.1:
            name = chance.choice(["x", "x.png", "x.npy", "x.tar.gz", "test_batch"])
        yield name, data


def _gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def with_right_checksums(data: bytes) -> bytes:
    """A PNG whose chunks are what they say they are, so that damage inside of them reaches the decoder."""
    found, place = bytearray(data[:8]), 8
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + length]
        found += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += length + 12
    return bytes(found)


Damage = Callable[[bytes, random.Random, dict[str, bytes]], bytes]


def _place(data: bytes, chance: random.Random) -> int:
    """Somewhere, as often as not in the first 64 bytes, where headers are."""
    return chance.randrange(max(1, min(64, len(data)) if chance.random() < 0.5 else len(data)))


def flip_bits(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    found = bytearray(data or b"\0")
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        found[_place(found, chance)] ^= 1 << chance.randrange(8)
    return bytes(found)


def cut(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    return data[: _place(data, chance)]


def repeat_part(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    start = _place(data, chance)
    part = data[start : start + chance.randint(1, 256)]
    return data[:start] + part * chance.choice([2, 3, 1_000]) + data[start:]


def leave_out_part(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    start = _place(data, chance)
    return data[:start] + data[start + chance.randint(1, 256) :]


def lie_about_a_number(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    """Writes another length, size, count or offset somewhere."""
    number = chance.choice([0, 1, 0x7F, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1])
    size = 8 if number > 0xFFFFFFFF else chance.choice([4, 4, 2] if number <= 0xFFFF else [4])
    start = _place(data, chance)
    return data[:start] + number.to_bytes(size, chance.choice(["little", "big"])) + data[start + size :]


def write_other_digits(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    """Other digits where there are some: sizes of tar entries, shapes of arrays, memo indices of pickles."""
    digits = [index for index, byte in enumerate(data[:4096]) if byte in b"0123456789"]
    found = bytearray(data)
    for index in chance.sample(digits, min(len(digits), chance.choice([1, 4, 12]))):
        found[index] = chance.choice(b"01379-")
    return bytes(found)


def begin_like_another(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    other = files[chance.choice(list(files))]
    length = chance.choice([4, 8, 16, 64, 512])
    return other[:length] + data[length:]


def end_like_another(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    other = files[chance.choice(list(files))]
    return data[: _place(data, chance)] + other[_place(other, chance) :]


def append(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    return data + chance.choice([b"\0" * 1024, chance.randbytes(100), data, b"PK\5\6" + bytes(18)])


def enlarge(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    """Another width and height, where headers of PNG, JPEG, BMP, WebP and TIFF have them; else as a lie."""
    sides = [chance.choice([0, 1, 2, 31, 33, 255, 256, 257, 4096, 65535, 2**31 - 1, 2**32 - 1]) for _ in range(2)]
    if data.startswith(PNG_SIGNATURE):
        return data[:16] + struct.pack(">II", *sides) + data[24:]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<II", *sides) + data[26:]
    short = [side & 0xFFFF for side in sides]
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        if data.startswith(b"\xff\xd8") and (place := data.find(marker)) > 0:
            return data[: place + 5] + struct.pack(">HH", *short) + data[place + 9 :]
    if data.startswith(b"II*\0"):
        for tag, side in zip((256, 257), sides, strict=True):
            place = data.find(struct.pack("<HHI", tag, 4, 1))
            if place >= 0:
                data = data[: place + 8] + struct.pack("<I", side) + data[place + 12 :]
        return data
    if data.startswith(b"RIFF"):
        return data[:24] + struct.pack("<I", sides[0])[:3] + struct.pack("<I", sides[1])[:3] + data[30:]
    return lie_about_a_number(data, chance, files)


DAMAGES: list[Damage] = [
    flip_bits,
    cut,
    repeat_part,
    leave_out_part,
    lie_about_a_number,
    lie_about_a_number,
    write_other_digits,
    begin_like_another,
    end_like_another,
    append,
    enlarge,
]
