"""Image sets: one memory-mapped uint8 array of training, validation and test images, with a content hash.

A directory holds an image set: `images.npy`, uint8 [N, H, W, C], and `manifest.json`, written last.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.lib import format as npy
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flowpp import cifar
from flowpp.archives import Member, Source, members, walk
from flowpp.arrays import read_array, read_header
from flowpp.durable import new_directory, new_file
from flowpp.images import (
    DEFAULT_LIMITS,
    BadImages,
    Limits,
    check_kind,
    decode_image,
    encode_png,
    expand_bits,
    reduce_bits,
)
from flowpp.kinds import HEAD_BYTES, Family, kind_of
from flowpp.spool import PIECE_BYTES, Arrangement, Spool, arrange, check_form, too_many_images

__all__ = [
    "BadImages",
    "ImageSet",
    "Limits",
    "build_image_set",
    "content_sha256",
    "decode_image",
    "encode_png",
    "expand_bits",
    "open_image_set",
    "read_images",
    "reduce_bits",
]

IMAGES, MANIFEST = "images.npy", "manifest.json"

_MAX_MANIFEST_BYTES = 2**16


class Manifest(BaseModel):
    """Content of `manifest.json`; `shape` is (channels, height, width)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    num_images: int = Field(ge=1)
    num_validation: int = Field(ge=0)
    num_test: int = Field(0, ge=0)
    shape: tuple[int, int, int]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _split(self) -> Self:
        held_out = self.num_validation + self.num_test
        if held_out > self.num_images:
            raise ValueError(f"num_validation and num_test ({held_out}) exceed num_images ({self.num_images})")
        return self


@dataclass(frozen=True, eq=False)
class ImageSet:
    """`images` is a read-only memory map, uint8 [N, H, W, C], of training, validation and test images in this order.

    Training never uses the test images. `sha256` is the hash of the shape, the split and the pixels.
    """

    images: np.ndarray
    num_validation: int
    num_test: int
    sha256: str
    directory: Path

    @classmethod
    def open(cls, directory: Path) -> "ImageSet":
        """The image set in `directory`; its manifest, header and sizes are checked, its pixels by `verify`.

        Raises `BadImages`: `bad_image_set`, or what `read_header` finds.
        """
        try:
            with (directory / MANIFEST).open("rb") as file:
                manifest = Manifest.model_validate_json(file.read(_MAX_MANIFEST_BYTES))
            channels, height, width = manifest.shape
            expected = (manifest.num_images, height, width, channels)
            with (directory / IMAGES).open("rb") as file:
                shape, start = read_header(file, IMAGES), file.tell()
                size = os.fstat(file.fileno()).st_size
                if shape != expected or size != start + math.prod(expected):
                    raise _bad_image_set(directory, f"{IMAGES} does not hold {list(expected)} and nothing else")
                images = np.memmap(file, np.uint8, "r", start, expected)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _bad_image_set(directory, f"lacks {Path(error.filename).name}") from error
        except ValidationError as error:
            raise _bad_image_set(directory, " ".join(str(error).split())) from error
        return cls(images, manifest.num_validation, manifest.num_test, manifest.sha256, directory)

    @property
    def training(self) -> np.ndarray:
        """The training images, uint8 [num_training, H, W, C]."""
        return self.images[: self.num_training]

    @property
    def validation(self) -> np.ndarray:
        """The validation images, uint8 [num_validation, H, W, C]."""
        return self.images[self.num_training : len(self.images) - self.num_test]

    @property
    def test(self) -> np.ndarray:
        """The test images, uint8 [num_test, H, W, C]."""
        return self.images[len(self.images) - self.num_test :]

    @property
    def num_images(self) -> int:
        """Training, validation and test images."""
        return len(self.images)

    @property
    def num_training(self) -> int:
        """Training images."""
        return len(self.images) - self.num_validation - self.num_test

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def verify(self) -> None:
        """Reads all pixels; raises `BadImages` where their hash is not `sha256`."""
        digest = _digest(self.images.shape, self.num_validation, self.num_test)
        for piece in _pieces(self.images):
            digest.update(piece)
        if digest.hexdigest() != self.sha256:
            raise _bad_image_set(self.directory, f"the pixels have another sha256 than {MANIFEST} says")


def build_image_set(
    source: Source,
    directory: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    validation_fraction: float | None = None,
    test_as_validation: bool = False,
) -> ImageSet:
    """Writes the images of `source` to the new `directory`, wholly or not at all.

    `source` is a folder, a .zip, .tar or .tar.gz archive (all three: of images, of .npy arrays or of CIFAR-10's
    official batches), a .npy or .npz file, an image file, or several files, which may come with names. Arrays are
    uint8 [N, H, W] or [N, H, W, C]; arrays of labels beside them are ignored. Images are sorted by name.

    Names of folders, arrays and files are the split if they contain words such as `train`, `val` and `test`
    (`flowpp.splits`), and so are CIFAR-10's batches. Without a validation part, `validation_fraction` of the training
    images (0.1 by default; at least one image of two or more, unless the fraction is 0) is chosen at random for it,
    by the same seed each time. Test images are stored, but training uses them only if `test_as_validation` makes
    them the validation part, as papers do that report results on CIFAR-10.

    Raises `BadImages` if images cannot be taken, and `FileExistsError` if `directory` exists.
    """
    if validation_fraction is not None and not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be at least 0 and less than 1")
    with new_directory(directory) as unfinished, tempfile.TemporaryFile(dir=unfinished) as file:
        spool = Spool(file, limits)
        for member in members(source, limits):
            for images in read_member(member, limits):
                spool.append(member.name, images)
        _write(unfinished, spool, arrange(spool.segments, validation_fraction, test_as_validation))
    return ImageSet.open(directory)


def open_image_set(source: Path, cache: Path | None = None, *, test_as_validation: bool = False) -> ImageSet:
    """The image set in the directory `source`, or the one built of `source`, and kept in the folder `cache`.

    In the cache it is found again as long as no file of `source` changes. Without a cache it is built in a temporary
    directory that lasts as long as the result. `test_as_validation` is for sources that are built. Raises `BadImages`.
    """
    if (source / MANIFEST).is_file() and (source / IMAGES).is_file():
        if test_as_validation:
            message = "is an image set with fixed parts; build it again from its images with test_as_validation"
            raise BadImages("ambiguous_split", message, str(source))
        return ImageSet.open(source)
    if cache is None:
        temporary = Path(tempfile.mkdtemp(prefix="flowpp-"))
        try:
            image_set = build_image_set(source, temporary / "images", test_as_validation=test_as_validation)
        except BaseException:
            shutil.rmtree(temporary)
            raise
        weakref.finalize(image_set, shutil.rmtree, temporary)
        return image_set
    directory = cache / f"{source.name}-{_fingerprint(source, test_as_validation)}"
    if directory.exists():
        return ImageSet.open(directory)
    return build_image_set(source, directory, test_as_validation=test_as_validation)


def read_images(files: Iterable[tuple[str, bytes]], limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """The images of (name, file content) pairs, uint8 [N, H, W, C], in their order. Raises `BadImages`."""
    images: list[np.ndarray] = []
    first = ""
    for name, data in files:
        first = first or name
        images.append(decode_image(data, name, limits))
        check_form(name, images[-1].shape, first, images[0].shape)
        if len(images) > limits.max_images:
            raise too_many_images(limits)
    if not images:
        raise BadImages("no_images", "there are no images")
    return np.stack(images)


def content_sha256(images: np.ndarray) -> str:
    """The hash of images, uint8 [N, H, W, C]: that of an image set of them, all for training."""
    digest = _digest(images.shape, 0, 0)
    for piece in _pieces(images):
        digest.update(piece)
    return digest.hexdigest()


def read_member(member: Member, limits: Limits) -> Iterator[np.ndarray]:
    """The images of a file, uint8 [n, H, W, C] each. Its content determines its kind.

    Names matter only for files that do not begin with a mark of their kind: batches of CIFAR-10 and their companions.
    The kind is checked before the size: most files that are no images are larger than images.
    """
    head = member.stream.peek(HEAD_BYTES)
    kind = kind_of(head)
    family = kind.family if kind and head else None
    may_be_batch = cifar.is_batch(member.file) and (family is None or head[0] <= cifar.MAX_LABEL)
    if family is Family.ARRAY or (family is None and member.file.lower().endswith(".npy")):
        yield from read_array(member.stream, member.name, limits)
    elif family is Family.PICKLE or may_be_batch:
        if member.file not in cifar.COMPANIONS:
            yield cifar.read_batch(member.read(cifar.MAX_BATCH_BYTES), member.name)
    elif member.file not in cifar.COMPANIONS:
        check_kind(head, member.name)
        yield decode_image(member.read(limits.max_image_bytes), member.name, limits)[None]


def _write(directory: Path, spool: Spool, arrangement: Arrangement) -> None:
    """Writes the images in their order, then the manifest."""
    order, num_validation, num_test = arrangement
    shape = (len(order), *spool.form())
    digest = _digest(shape, num_validation, num_test)
    with new_file(directory / IMAGES) as file:
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for piece in spool.read(order):
            file.write(piece)
            digest.update(piece)
    _, height, width, channels = shape
    manifest = Manifest(
        num_images=len(order),
        num_validation=num_validation,
        num_test=num_test,
        shape=(channels, height, width),
        sha256=digest.hexdigest(),
    )
    with new_file(directory / MANIFEST) as file:
        file.write(manifest.model_dump_json(indent=2).encode())


def _digest(shape: tuple[int, ...], num_validation: int, num_test: int) -> "hashlib._Hash":
    """The content hash before any pixel."""
    split = {"shape": shape, "num_validation": num_validation}
    if num_test:  # sets without test images keep the hash that they had before there were any
        split["num_test"] = num_test
    return hashlib.sha256(json.dumps(split).encode())


def _pieces(images: np.ndarray) -> Iterator[bytes]:
    """The pixels of `images`, some megabytes at a time."""
    length = max(1, PIECE_BYTES // math.prod(images.shape[1:]))
    for start in range(0, len(images), length):
        yield images[start : start + length].tobytes()


def _fingerprint(source: Path, test_as_validation: bool) -> str:
    """16 hex digits that change when a file of `source` or the split changes."""
    files = [path for path, _ in walk(source, DEFAULT_LIMITS)] if source.is_dir() else [source]
    if not source.exists():
        raise BadImages("no_such_file", "there is no such file or folder", str(source))
    states: list[object] = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    states += ["test as validation"] * test_as_validation
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def _bad_image_set(directory: Path, what: str) -> BadImages:
    return BadImages("bad_image_set", f"is no image set, or a damaged one: {what}", str(directory))
