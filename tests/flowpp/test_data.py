"""Image sets: the same pixels and hash from whatever files, written wholly or not at all."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from flowpp.data import BadImages, ImageSet, Limits, build_image_set, encode_png, open_image_set, read_images
from flowpp.sources import Split, open_images

RANDOM = np.random.RandomState(0)
TRAINING = RANDOM.randint(0, 256, (11, 6, 8, 3), dtype=np.uint8)
VALIDATION = RANDOM.randint(0, 256, (4, 6, 8, 3), dtype=np.uint8)
ALL = np.concatenate([TRAINING, VALIDATION])
SHA256 = hashlib.sha256(b'{"shape": [15, 6, 8, 3], "num_validation": 4}' + ALL.tobytes()).hexdigest()
HEADER = {"descr": "|u1", "fortran_order": False}


def pngs(images: np.ndarray, folder: str = "") -> dict[str, bytes]:
    return {f"{folder}{i:03}.png": encode_png(image) for i, image in enumerate(images)}


SPLIT = pngs(TRAINING, "photos/train/") | pngs(VALIDATION, "photos/validation/")


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in reversed(files.items()):
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    folder = write_folder(path.with_name(path.name + ".files"), files)
    with tarfile.open(path, mode=mode) as archive:
        for name in reversed(files):
            archive.add(folder / name, name)
    return path


def refused(source: Path | list[Path], limits: Limits | None = None, **options: float) -> BadImages:
    """The error; and nothing is left behind."""
    parent = (source if isinstance(source, Path) else source[0]).parent
    before = sorted(parent.iterdir())
    with pytest.raises(BadImages) as caught:
        build_image_set(source, parent / "set", limits=limits or Limits(), **options)
    assert sorted(parent.iterdir()) == before
    return caught.value


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda path: write_folder(path, SPLIT),
    "zip": lambda path: write_zip(path, SPLIT),
    "tar": lambda path: write_tar(path, SPLIT),
    "tar.gz": lambda path: write_tar(path, SPLIT, "w:gz"),
    "val": lambda path: write_zip(path, pngs(TRAINING, "Training/a/") | pngs(VALIDATION, "VAL/b/")),
    "valid": lambda path: write_zip(path, pngs(TRAINING, "train/images/") | pngs(VALIDATION, "valid/images/")),
}


def write_npz(path: Path, *, compressed: bool = False, **arrays: np.ndarray) -> Path:
    with path.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, allow_pickle=False, **arrays)
    return path


SOURCES["npz"] = lambda path: write_npz(path, train=TRAINING, validation=VALIDATION)
SOURCES["npz compressed"] = lambda path: write_npz(path, compressed=True, x_train=TRAINING, x_val=VALIDATION)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_image_set(tmp_path: Path, kind: str) -> None:
    image_set = build_image_set(SOURCES[kind](tmp_path / "source"), tmp_path / "sets/set")
    np.testing.assert_array_equal(image_set.images, ALL)
    np.testing.assert_array_equal(image_set.training, TRAINING)
    np.testing.assert_array_equal(image_set.validation, VALIDATION)
    assert (image_set.num_images, image_set.num_validation, image_set.shape) == (15, 4, (3, 6, 8))
    assert isinstance(image_set.images, np.memmap)
    assert not image_set.images.flags.writeable
    assert image_set.sha256 == SHA256
    image_set.verify()


def test_another_split_of_the_same_pixels_has_another_hash(tmp_path: Path) -> None:
    image_set = build_image_set(write_npz(tmp_path / "b.npz", train=ALL[:10], val=ALL[10:]), tmp_path / "other")
    np.testing.assert_array_equal(image_set.images, ALL)
    assert image_set.sha256 != SHA256


def test_a_directory_holds_the_array_and_its_manifest(tmp_path: Path) -> None:
    image_set = build_image_set(SOURCES["zip"](tmp_path / "source"), tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["images.npy", "manifest.json"]
    np.testing.assert_array_equal(np.load(tmp_path / "set/images.npy"), ALL)
    assert json.loads((tmp_path / "set/manifest.json").read_bytes()) == {
        "format": 1,
        "num_images": 15,
        "num_validation": 4,
        "num_test": 0,
        "shape": [3, 6, 8],
        "sha256": image_set.sha256,
    }
    opened = ImageSet.open(tmp_path / "set")
    np.testing.assert_array_equal(opened.images, ALL)
    assert (opened.num_validation, opened.sha256) == (4, image_set.sha256)


@pytest.mark.parametrize(
    ("write", "images"),
    [
        (lambda path: write_zip(path, pngs(ALL)), ALL),
        (lambda path: write_folder(path, pngs(ALL, "train/")), ALL),
        (lambda path: np.save(path, ALL), ALL),
        (lambda path: np.save(path, ALL[..., 0]), ALL[..., :1]),
        (lambda path: write_npz(path, images=ALL[..., :1]), ALL[..., :1]),
    ],
    ids=["zip", "only one folder", "npy", "grey npy", "npz of one array"],
)
def test_without_a_named_split_a_tenth_is_chosen_by_chance_the_same_each_time(
    tmp_path: Path, write: Callable, images: np.ndarray
) -> None:
    write(tmp_path / "source.npy")
    image_set = build_image_set(tmp_path / "source.npy", tmp_path / "set")
    assert image_set.num_validation == 2
    chosen = np.sort(np.random.RandomState(0).permutation(15)[:2])
    np.testing.assert_array_equal(image_set.validation, images[chosen])
    np.testing.assert_array_equal(image_set.training, np.delete(images, chosen, axis=0))


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(1, None, 0), (2, None, 1), (3, 0.01, 1), (15, 0.0, 0), (15, 0.2, 3), (15, 0.999, 14), (2, 0.999, 1)],
)
def test_the_validation_fraction_leaves_an_image_on_both_sides(
    tmp_path: Path, count: int, fraction: float | None, expected: int
) -> None:
    np.save(tmp_path / "a.npy", ALL[:count])
    image_set = build_image_set(tmp_path / "a.npy", tmp_path / "set", validation_fraction=fraction)
    assert image_set.num_validation == expected
    assert len(image_set.training) + len(image_set.validation) == count


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_fraction_is_refused(tmp_path: Path, fraction: float) -> None:
    np.save(tmp_path / "a.npy", ALL)
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        build_image_set(tmp_path / "a.npy", tmp_path / "set", validation_fraction=fraction)


def test_several_files_make_a_set_and_so_does_one(tmp_path: Path) -> None:
    write_folder(tmp_path, pngs(ALL))
    files = sorted(tmp_path.glob("*.png"))
    image_set = build_image_set(files, tmp_path / "several", validation_fraction=0)
    np.testing.assert_array_equal(image_set.images, ALL)
    np.testing.assert_array_equal(build_image_set(files[0], tmp_path / "one").images, ALL[:1])


def test_files_that_come_with_names_are_split_by_these(tmp_path: Path) -> None:
    write_folder(tmp_path, pngs(ALL))
    paths = sorted(tmp_path.glob("*.png"))
    named = [(f"{'train' if i < 11 else 'val'}/{path.name}", path) for i, path in enumerate(paths)]
    assert build_image_set(named, tmp_path / "set").sha256 == SHA256


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stray = refused(write_zip(tmp_path / "a.zip", SPLIT | pngs(ALL[:1], "photos/")))
    assert (stray.code, stray.name) == ("ambiguous_split", "photos/000.png")
    assert refused(SOURCES["zip"](tmp_path / "a.zip"), validation_fraction=0.5).code == "ambiguous_split"


TEST = 255 - VALIDATION


def test_test_images_are_a_part_that_training_does_not_see(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "a.npz", train=TRAINING, test=TEST)
    image_set = build_image_set(source, tmp_path / "two")
    np.testing.assert_array_equal(image_set.test, TEST)
    assert (image_set.num_images, image_set.num_training, image_set.num_validation, image_set.num_test) == (
        15,
        10,
        1,
        4,
    )
    drawn = np.concatenate([image_set.training, image_set.validation])
    assert sorted(image.tobytes() for image in drawn) == sorted(image.tobytes() for image in TRAINING)
    image_set.verify()
    source = write_npz(tmp_path / "b.npz", train=TRAINING, val=VALIDATION, test=TEST)
    image_set = build_image_set(source, tmp_path / "three")
    for found, expected in zip((image_set.training, image_set.validation), (TRAINING, VALIDATION), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(image_set.test, TEST)
    assert build_image_set(write_npz(tmp_path / "c.npz", test=TEST), tmp_path / "one").num_test == 4


def test_each_part_of_a_set_can_be_read_by_its_name(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "a.npz", train=TRAINING, val=VALIDATION, test=TEST)
    for split, expected in ((Split.TRAINING, TRAINING), (Split.VALIDATION, VALIDATION), (Split.TEST, TEST)):
        names, pixels, _ = open_images([source], split)
        np.testing.assert_array_equal(pixels, expected)
        assert names[-1] == f"{split}[{len(expected) - 1}]"


def test_names_of_images_are_text_that_can_be_encoded(tmp_path: Path) -> None:
    names = [b"caf\xe9.png", b"caf\\xe9.png", "größe.png".encode()]
    (tmp_path / "source").mkdir()
    for name in names:
        (tmp_path / "source" / os.fsdecode(name)).write_bytes(encode_png(ALL[0]))
    found, _, _ = open_images([tmp_path / "source"], Split.ALL)
    assert len(set(found)) == 3
    assert json.loads(json.dumps(found, ensure_ascii=False).encode()) == found
    assert "größe.png" in found


def test_test_images_validate_only_if_that_is_requested(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "a.npz", train=TRAINING, test=VALIDATION)
    image_set = build_image_set(source, tmp_path / "set", test_as_validation=True)
    np.testing.assert_array_equal(image_set.validation, VALIDATION)
    assert (image_set.num_test, image_set.sha256) == (0, SHA256)
    with pytest.raises(BadImages, match="fixed parts"):
        open_image_set(tmp_path / "set", test_as_validation=True)
    shutil.rmtree(tmp_path / "set")
    cached = [open_image_set(source, tmp_path / "cache", test_as_validation=each) for each in (True, False, True)]
    assert [each.num_test for each in cached] == [0, 4, 0]
    for path, message in (
        (write_npz(tmp_path / "b.npz", train=TRAINING, val=VALIDATION, test=TEST), "own validation part"),
        (write_npz(tmp_path / "c.npz", train=TRAINING), "no test part"),
    ):
        error = refused(path, test_as_validation=True)
        assert (error.code, message in str(error)) == ("ambiguous_split", True)


def test_sets_from_before_there_were_test_images_open(tmp_path: Path) -> None:
    build_image_set(SOURCES["npz"](tmp_path / "a.npz"), tmp_path / "set")
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    del manifest["num_test"]
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    image_set = ImageSet.open(tmp_path / "set")
    image_set.verify()
    assert (image_set.num_validation, image_set.num_test, image_set.sha256) == (4, 0, SHA256)


def test_mixed_sizes_are_refused_naming_both(tmp_path: Path) -> None:
    files = pngs(ALL) | {"other.png": encode_png(ALL[0, :5])}
    error = refused(write_zip(tmp_path / "a.zip", files))
    assert error.code == "mixed_sizes"
    assert "other.png: is RGB, 8 pixels wide and 5 high" in str(error)
    assert "000.png is RGB, 8 pixels wide and 6 high" in str(error)


def test_grey_among_rgb_is_refused(tmp_path: Path) -> None:
    error = refused(write_folder(tmp_path / "a", pngs(ALL) | {"grey.png": encode_png(ALL[0, :, :, :1])}))
    assert error.code == "mixed_sizes"
    assert "grey.png: is grey" in str(error)


@pytest.mark.parametrize("write", [write_zip, write_tar, write_folder])
def test_a_source_without_images_is_refused(tmp_path: Path, write: Callable) -> None:
    assert refused(write(tmp_path / "empty", {})).code == "no_images"
    assert refused(write(tmp_path / "junk", {".DS_Store": b"junk"})).code == "no_images"


@pytest.mark.parametrize("write", [write_zip, write_tar, write_folder])
def test_an_entry_that_is_no_image_is_named(tmp_path: Path, write: Callable) -> None:
    error = refused(write(tmp_path / "source", SPLIT | {"photos/train/notes.txt": b"hello"}))
    assert (error.code, error.name) == ("not_an_image", "photos/train/notes.txt")


def test_a_hostile_archive_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in ("../000.png", "/tmp/000.png"):
        assert refused(write_zip(tmp_path / "a.zip", {name: encode_png(ALL[0])})).code == "unsafe_archive"


def test_limits_hold(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", pngs(ALL))
    assert refused(source, Limits(max_images=14)).code == "too_many_images"
    assert refused(source, Limits(max_uncompressed_bytes=ALL.nbytes - 1)).code == "too_large"
    assert refused(source, Limits(max_entries=14)).code == "too_many_entries"
    assert refused(source, Limits(max_bytes=100)).code == "too_large"
    assert refused(source, Limits(max_image_bytes=100)).code == "image_too_large"


def test_images_that_grow_on_decoding_count_decoded(tmp_path: Path) -> None:
    flat = np.zeros((256, 256, 3), np.uint8)
    source = write_folder(tmp_path / "a", pngs(np.stack([flat] * 20)))
    assert sum(path.stat().st_size for path in source.iterdir()) < 50_000
    assert refused(source, Limits(max_uncompressed_bytes=2**20)).code == "too_large"


def header(shape: tuple[int, ...], **changes: object) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {**HEADER, "shape": shape, **changes})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (header((10, 6, 8, 3)), "damaged_array"),
        (header((2, 6, 8, 3)) + bytes(2 * 144 - 1), "damaged_array"),
        (header((2, 6, 8, 3)) + bytes(2 * 144 + 1), "damaged_array"),
        (header((2, 3, 6, 8)) + bytes(2 * 144), "unsupported_array"),
        (header((2, 6, 8, 2)) + bytes(2 * 96), "unsupported_array"),
        (header((2, 6, 8, 3), descr="<f4") + bytes(8 * 144), "unsupported_array"),
        (header((2, 6, 8, 3), descr="|i1") + bytes(2 * 144), "unsupported_array"),
        (header((2, 6, 8, 3), descr="|O") + bytes(99), "unsupported_array"),
        (header((2, 6, 8, 3), descr=[("a", "|u1")]) + bytes(2 * 144), "unsupported_array"),
        (header((2, 6, 8, 3), descr="|V1") + bytes(2 * 144), "unsupported_array"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65_535, "damaged_array"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"9" * 65_535, "damaged_array"),
        (header((2, 6, 8, 3), fortran_order=True) + bytes(2 * 144), "unsupported_array"),
        (header((48,)) + bytes(48), "unsupported_array"),
        (header((10**12, 6, 8, 3)), "too_many_images"),
        (header((-1, 6, 8, 3)), "too_many_images"),
        (header((1, 10**9, 10**9, 3)), "image_too_large"),
        (header((1, 8, 1, 3)) + bytes(24), "image_too_small"),
        (header((1, 0, 8, 3)), "image_too_small"),
        (header((0, 6, 8, 3)), "no_images"),
        (b"\x93NUMPY\x01\x00", "damaged_array"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "damaged_array"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': open('", "damaged_array"),
        (b"hello", "damaged_array"),
        (b"", "damaged_array"),
    ],
)
def test_arrays_that_are_no_images_are_refused_by_their_header(tmp_path: Path, data: bytes, code: str) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    assert refused(tmp_path / "a.npy").code == code
    assert refused(write_zip(tmp_path / "a.npz", {"images.npy": data})).code == code


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert refused(tmp_path / "a.npy").code == "unsupported_array"


def test_a_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"mine": b"precious"})
    with pytest.raises(FileExistsError):
        build_image_set(SOURCES["npz"](tmp_path / "a.npz"), tmp_path / "set")
    assert (tmp_path / "set/mine").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "set"]


def truncate(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "manifest.json").unlink(),
        lambda d: (d / "images.npy").unlink(),
        lambda d: truncate(d / "manifest.json", 20),
        lambda d: truncate(d / "images.npy", 0),
        lambda d: truncate(d / "images.npy", 2000),
        lambda d: (d / "images.npy").write_bytes(header((15, 6, 8, 3), descr="|O") + bytes(15 * 144)),
        lambda d: (d / "images.npy").write_bytes(header((15, 6, 8, 3), fortran_order=True) + bytes(15 * 144)),
        lambda d: (d / "images.npy").write_bytes(header((14, 6, 8, 3)) + bytes(15 * 144)),
        lambda d: (d / "images.npy").write_bytes(header((15, 6, 8, 3)) + bytes(15 * 144 + 1)),
        lambda d: (d / "images.npy").write_bytes(header((10**30, 6, 8, 3))),
        lambda d: edit(d / "manifest.json", num_images=14),
        lambda d: edit(d / "manifest.json", num_validation=16),
        lambda d: edit(d / "manifest.json", num_test=12),
        lambda d: edit(d / "manifest.json", num_validation=-1),
        lambda d: edit(d / "manifest.json", format=2),
        lambda d: edit(d / "manifest.json", shape=[3, 8, 6]),
        lambda d: edit(d / "manifest.json", extra=1),
        lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"),
    ],
)
def test_a_damaged_image_set_does_not_open(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    build_image_set(SOURCES["npz"](tmp_path / "a.npz"), tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(BadImages) as caught:
        ImageSet.open(tmp_path / "set")
    assert caught.value.code in ("bad_image_set", "damaged_array", "unsupported_array")


def test_verify_finds_a_changed_pixel(tmp_path: Path) -> None:
    build_image_set(SOURCES["npz"](tmp_path / "a.npz"), tmp_path / "set")
    path = tmp_path / "set/images.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadImages, match="another sha256"):
        ImageSet.open(tmp_path / "set").verify()


def test_opening_builds_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", pngs(ALL))
    first = open_image_set(source, tmp_path / "cache")
    inode = (first.directory / "images.npy").stat().st_ino
    assert (open_image_set(source, tmp_path / "cache").directory / "images.npy").stat().st_ino == inode
    np.testing.assert_array_equal(open_image_set(first.directory, tmp_path / "cache").images, first.images)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    (source / "000.png").write_bytes(encode_png(255 - ALL[0]))
    assert open_image_set(source, tmp_path / "cache").sha256 != first.sha256


def test_opening_without_a_cache_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    image_set = open_image_set(SOURCES["npz"](tmp_path / "a.npz"))
    training = image_set.training
    assert image_set.directory.is_relative_to(tmp_path)
    del image_set
    np.testing.assert_array_equal(training, TRAINING)
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(BadImages):
        open_image_set(tmp_path / "a.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz"]


def test_opening_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(BadImages, match="no such file"):
            open_image_set(tmp_path / "nothing", cache)


def test_files_in_memory_are_read_in_their_order() -> None:
    np.testing.assert_array_equal(read_images(reversed(pngs(ALL).items())), ALL[::-1])
    with pytest.raises(BadImages, match="no images"):
        read_images([])
    with pytest.raises(BadImages, match=r"b\.png: is RGB, 8 pixels wide and 5 high, but a\.png is"):
        read_images([("a.png", encode_png(ALL[0])), ("b.png", encode_png(ALL[0, :5]))])
    with pytest.raises(BadImages, match="more than the 3 images"):
        read_images(pngs(ALL).items(), Limits(max_images=3))


def test_building_takes_little_memory_and_no_torch(tmp_path: Path) -> None:
    images = np.zeros((2**13, 64, 64, 3), np.uint8)  # 96 MiB
    np.save(tmp_path / "a.npy", images)
    program = (
        "import sys, resource; from pathlib import Path; from flowpp.data import build_image_set\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, (before * 1024 + 2**26, -1))\n"
        f"build_image_set(Path({str(tmp_path / 'a.npy')!r}), Path({str(tmp_path / 'set')!r})).verify()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
