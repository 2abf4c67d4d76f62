"""A refusal names the kind of a file, which its content determines, not its name."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowpp.data import BadImages, build_image_set, encode_png
from flowpp.images import decode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), np.uint8)


def box(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(12)


OTHER_IMAGES = {
    "GIF": b"GIF89a\1\0\1\0",
    "AVIF": box(b"avif"),
    "HEIC": box(b"heic"),
    "a Canon raw photograph (CR3)": box(b"crx "),
    "a Canon raw photograph (CR2)": b"II*\0\x10\0\0\0CR\2\0",
    "JPEG XL": b"\xff\x0a\xfa\x1f",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "a Photoshop document": b"8BPS\0\1",
    "an icon (ICO)": b"\0\0\1\0\1\0\x10\x10",
    "a portable any map": b"P6\n8 6\n255\n",
    "OpenEXR": b"\x76\x2f\x31\x01\2\0\0\0",
    "Radiance HDR": b"#?RADIANCE\n",
    "BigTIFF": b"II+\0\x08\0\0\0",
    "QOI": b"qoif",
    "FITS": b"SIMPLE  =                    T",
    "DICOM": bytes(128) + b"DICM",
    "SVG": b'<?xml version="1.0"?>\n<!-- drawn --><svg xmlns="http://www.w3.org/2000/svg"/>',
}
OTHER_FILES = {
    "empty": b"",
    "a PDF document": b"%PDF-1.7\n",
    "a video": box(b"isom"),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "a web page": b"\n<!DOCTYPE html><html><title>404</title>",
    "XML": b"<?xml version='1.0'?><annotation/>",
    "JSON": b'{"message": "Not Found"}',
    "a Parquet table": b"PAR1\x15\x04",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "a MATLAB file": b"MATLAB 5.0 MAT-file, Platform: GLNXA64",
    "an IDX array": b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c",
    "a safetensors file": struct.pack("<Q", 60) + b'{"weight":{"dtype":"F32"}}',
    "an SQLite database": b"SQLite format 3\0",
    "a program": b"\x7fELF\2\1\1",
    "a sound": b"ID3\4\0",
}


@pytest.mark.parametrize("kind", [*OTHER_IMAGES, *OTHER_FILES])
def test_what_is_not_read_is_named_as_what_it_is(tmp_path: Path, kind: str) -> None:
    data = OTHER_IMAGES.get(kind, OTHER_FILES.get(kind, b""))
    code = "unsupported_format" if kind in OTHER_IMAGES else "not_an_image"
    with pytest.raises(BadImages) as caught:
        decode_image(data, "photograph.jpg")
    assert (caught.value.code, f"is {kind}" in str(caught.value)) == (code, True)
    (tmp_path / "a.jpg").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train/a.jpg", data)
    for source in (tmp_path / "a.jpg", tmp_path / "a.zip"):
        with pytest.raises(BadImages) as caught:
            build_image_set(source, tmp_path / "set")
        assert (caught.value.code, f"is {kind}" in str(caught.value)) == (code, True)


def test_files_are_read_by_their_content_whatever_their_names(tmp_path: Path) -> None:
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, PIXELS)
    with zipfile.ZipFile(archive, "w") as entries:
        entries.writestr("blob", array.getvalue())
    batch = pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 4}, 2)
    picture = encode_png(PIXELS[0])
    for index, (data, count) in enumerate(((array.getvalue(), 4), (archive.getvalue(), 4), (batch, 4), (picture, 1))):
        for name in ("blob", "a.png", "a.npy", "a.tar.gz", "データ", "a.txt"):
            (tmp_path / name).write_bytes(data)
            image_set = build_image_set(tmp_path / name, tmp_path / f"{index}-{name}", validation_fraction=0)
            assert image_set.num_images == count
            (tmp_path / name).unlink()


def test_batches_and_images_are_told_apart_by_their_content(tmp_path: Path) -> None:
    batch = pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 4}, 2)
    rows = np.full((4, 3073), 9, np.uint8).tobytes()
    small = encode_png(PIXELS[0])
    for index, (name, data, count) in enumerate(
        (
            ("data_batch_1.bin", batch, 4),
            ("data_batch_1.bin", rows, 4),
            ("data_batch_1.bin", small, 1),
            ("test_batch", small, 1),
        )
    ):
        (tmp_path / name).write_bytes(data)
        found = build_image_set(tmp_path / name, tmp_path / f"set-{index}")
        assert found.num_images == count
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"\x89HDF\r\n\x1a\n", "not_an_image", "is HDF5"),
        (b"PAR1", "not_an_image", "is a Parquet table"),
        (b"%PDF-1.7\n", "not_an_image", "is a PDF document"),
        (b"GIF89a", "unsupported_format", "is GIF"),
        (b"label,pixel\n", "not_an_image", "is not an image of a known kind"),
        (b"\x89PNG\r\n\x1a\n", "image_too_large", "has more than"),
    ],
)
def test_a_file_of_another_kind_is_named_as_such_whatever_its_size(
    tmp_path: Path, data: bytes, code: str, message: str
) -> None:
    (tmp_path / "a.bin").write_bytes(data + bytes(3 * 2**20))
    with pytest.raises(BadImages) as caught:
        build_image_set(tmp_path / "a.bin", tmp_path / "set")
    assert (caught.value.code, message in str(caught.value)) == (code, True), str(caught.value)


@pytest.mark.parametrize(
    "page", [b"<?xml version='1.0'?>\n<!DOCTYPE html>", b"<!-- a -->\n<html>", b"<body>404", b"<h1>Not found</h1>"]
)
def test_a_web_page_is_named_as_one_however_it_begins(page: bytes) -> None:
    with pytest.raises(BadImages, match="is a web page"):
        decode_image(page, "a.jpg")


def test_a_png_of_a_transfer_in_text_mode_is_damaged() -> None:
    for data in (encode_png(PIXELS[0]).replace(b"\r\n", b"\n"), encode_png(PIXELS[0])[:6]):
        with pytest.raises(BadImages, match="transfer in text mode") as caught:
            decode_image(data, "a.png")
        assert caught.value.code == "damaged_image"


def test_a_pickle_that_is_no_batch_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"weight": 1}, 2))
    with pytest.raises(BadImages) as caught:
        build_image_set(tmp_path / "model.pt", tmp_path / "set")
    assert caught.value.code == "damaged_batch"
    assert "is no CIFAR-10 batch" in str(caught.value)


LAYOUTS: dict[str, tuple[np.ndarray, str]] = {
    "one image": (PIXELS[0], "[H, W, C] is one image; stack"),
    "one image of RGBA": (np.zeros((32, 32, 4), np.uint8), "[H, W, C] is one image; stack"),
    "one image of one channel": (np.zeros((32, 32, 1), np.uint8), "[H, W, C] is one image; stack"),
    "one image, channels first": (np.zeros((3, 32, 32), np.uint8), "[C, H, W] is one image"),
    "one RGBA image, channels first": (np.zeros((4, 32, 32), np.uint8), "[C, H, W] is one image"),
    "channels first": (np.zeros((9, 3, 32, 32), np.uint8), "channels first; save images.transpose(0, 2, 3, 1)"),
    "grey, channels first": (np.zeros((9, 1, 28, 28), np.uint8), "channels first; save images.transpose(0, 2, 3, 1)"),
    "alpha": (np.zeros((9, 32, 32, 4), np.uint8), "alpha channel; save images[..., :3]"),
    "two channels": (np.zeros((9, 32, 32, 2), np.uint8), "it has 2 channels"),
    "one grey image": (np.zeros((32, 32), np.uint8), "[H, W] is one grey image"),
    "flat": (np.zeros((9, 3072), np.uint8), "reshape flat images to [N, H, W, C]"),
    "video": (np.zeros((2, 9, 32, 32, 3), np.uint8), "it has 5 dimensions"),
    "a number": (np.array(5, np.uint8), "it has 0 dimensions"),
    "0 to 1": (np.zeros((9, 32, 32, 3), np.float32), "(255 * images).round()"),
    "half": (np.zeros((9, 32, 32, 3), np.float16), "is float16"),
    "int64": (np.zeros((9, 32, 32, 3), np.int64), "images.astype(np.uint8) if the values are 0 to 255"),
    "big endian": (np.zeros((9, 32, 32, 3), ">u2"), "is >u2 [9, 32, 32, 3]; save images.astype"),
    "bool": (np.zeros((9, 32, 32), bool), "255 * images.astype(np.uint8)"),
    "complex": (np.zeros((9, 32, 32), complex), "is complex128"),
    "objects": (np.array([PIXELS[0], PIXELS[0, 1:]], object), "is objects [2], which are pickled"),
    "structured": (np.zeros((9, 32), [("r", "u1"), ("g", "u1")]), "is [('r', 'u1'), ('g', 'u1')]"),
    "text": (np.array(["a.png"]), "is <U5"),
    "columns first": (np.asfortranarray(PIXELS), "in Fortran order; np.ascontiguousarray"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_array_of_another_layout_is_refused_with_what_to_save_instead(tmp_path: Path, kind: str) -> None:
    array, message = LAYOUTS[kind]
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", images=array)
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for index in range(3):
            archive.write(tmp_path / "a.npy", f"train/{index}.npy")
    for source in ("a.npy", "b.npz", "many.zip"):
        with pytest.raises(BadImages) as caught:
            build_image_set(tmp_path / source, tmp_path / "set")
        assert (caught.value.code, message in str(caught.value)) == ("unsupported_array", True), str(caught.value)


def test_narrow_grey_images_are_read_with_their_channel(tmp_path: Path) -> None:
    for shape in ((5, 8, 3), (3, 8, 8)):
        np.save(tmp_path / "a.npy", np.zeros((*shape, 1), np.uint8))
        assert build_image_set(tmp_path / "a.npy", tmp_path / str(shape)).shape == (1, shape[1], shape[2])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_each_version_of_npy_is_read(tmp_path: Path, version: tuple[int, int]) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, PIXELS, version)
    image_set = build_image_set(tmp_path / "a.npy", tmp_path / "set", validation_fraction=0)
    np.testing.assert_array_equal(image_set.images, PIXELS)


def test_labels_beside_the_images_are_no_images(tmp_path: Path) -> None:
    """As in Keras' mnist.npz, MedMNIST and others."""
    labels = {
        "y_train": np.arange(4, dtype=np.uint8),
        "y_test": np.arange(4, dtype=np.int64),
        "train_labels": np.zeros((4, 1), np.uint8),
        "targets": np.eye(4, dtype=np.float32),
        "class": np.array(["cat"] * 4),
    }
    np.savez(tmp_path / "a.npz", x_train=PIXELS, x_test=255 - PIXELS, **labels)
    image_set = build_image_set(tmp_path / "a.npz", tmp_path / "set")
    assert (image_set.num_training, image_set.num_validation, image_set.num_test) == (3, 1, 4)
    np.testing.assert_array_equal(image_set.test, 255 - PIXELS)
    np.savez(tmp_path / "b.npz", x=PIXELS, z=np.arange(4, dtype=np.uint8))
    with pytest.raises(BadImages, match=r"z\.npy: is uint8"):
        build_image_set(tmp_path / "b.npz", tmp_path / "other")
    np.savez(tmp_path / "c.npz", labels=np.arange(4))
    with pytest.raises(BadImages, match="no images"):
        build_image_set(tmp_path / "c.npz", tmp_path / "none")


def test_an_image_named_like_an_array_is_an_image(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").rename(tmp_path / "a.npy")
    assert build_image_set(tmp_path / "a.npy", tmp_path / "set").num_images == 1
