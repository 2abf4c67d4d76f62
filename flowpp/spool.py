"""Images gathered from many files into one temporary file, and the order in which a set holds them."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import numpy as np

from flowpp import cifar
from flowpp.images import BadImages, Limits, shortened

_ROLES = {"train": "training", "training": "training", "validation": "validation", "val": "validation", "test": "test"}
_DEFAULT_FRACTION = 0.1
_SPLIT_SEED = 0

PIECE_BYTES = 2**22
"""Read and hashed at a time, about."""


@dataclass(slots=True)
class Segment:
    """The images of one file: `count` in the spool, from `start` on."""

    name: str
    start: int
    count: int

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that the file is in; an array's name and CIFAR-10's batches count as such."""
        *folders, file = self.name.split("/")
        if cifar.is_batch(file):
            folders.append("test" if file.startswith("test") else "train")
        elif file.lower().endswith(".npy"):
            folders.append(PurePosixPath(file).stem)
        return tuple(folders)


class Spool:
    """Images of one size, appended to `file` as they come. Raises `BadImages`."""

    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        self.segments: list[Segment] = []
        self._file, self._limits = file, limits
        self._form: tuple[int, ...] = ()
        self._count = 0

    def append(self, name: str, images: np.ndarray) -> None:
        """Appends uint8 [n, H, W, C] of the file `name`."""
        if not self.segments:
            self._form = images.shape[1:]
        check_form(name, images.shape[1:], self.segments[0].name if self.segments else name, self._form)
        if not self.segments or self.segments[-1].name != name:
            self.segments.append(Segment(name, self._count, 0))
        self.segments[-1].count += len(images)
        self._count += len(images)
        if self._count > self._limits.max_images:
            raise too_many_images(self._limits)
        if self._count * int(np.prod(self._form)) > self._limits.max_uncompressed_bytes:
            most = self._limits.max_uncompressed_bytes
            raise BadImages("too_large", f"the decoded images have more than the {most:,} bytes that are accepted")
        self._file.write(np.ascontiguousarray(images).data)

    def form(self) -> tuple[int, ...]:
        """(H, W, C) of all images. Raises `BadImages` where there are none."""
        if not self._count:
            raise BadImages("no_images", "there are no images in it")
        return self._form

    def read(self, order: np.ndarray) -> Iterator[bytes]:
        """The pixels of the images of these numbers, some megabytes at a time.

        They are read, and not mapped: pages of a mapped file count as memory of the process, and stay.
        """
        self._file.flush()
        size = math.prod(self._form)
        length = max(1, PIECE_BYTES // size)
        for start in range(0, len(order), length):
            numbers = order[start : start + length]
            runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)  # each is in one place
            yield b"".join(os.pread(self._file.fileno(), len(run) * size, int(run[0]) * size) for run in runs)


def check_form(name: str, form: tuple[int, ...], first: str, first_form: tuple[int, ...]) -> None:
    """Raises `BadImages` where the (H, W, C) of `name` is not that of `first`."""
    if form != first_form:
        message = f"is {_described(form)}, but {shortened(first)} is {_described(first_form)}; all must be alike"
        raise BadImages("mixed_sizes", message, name)


def too_many_images(limits: Limits) -> BadImages:
    """The error for more than `limits.max_images`."""
    return BadImages("too_many_images", f"there are more than the {limits.max_images:,} images that are accepted")


def arrange(segments: list[Segment], validation_fraction: float | None) -> tuple[np.ndarray, int]:
    """The spool's image numbers in the order of the set, int64 [N], and how many at the end are for validation."""
    segments = sorted(segments, key=lambda segment: segment.name)
    counts = np.array([segment.count for segment in segments])
    skipped = np.array([segment.start for segment in segments]) - np.concatenate([[0], np.cumsum(counts)[:-1]])
    order = np.repeat(skipped, counts) + np.arange(counts.sum())
    held_out = _named_split(segments)
    if held_out is None:
        chosen = _random_split(len(order), validation_fraction)
    elif validation_fraction is not None:
        raise BadImages("ambiguous_split", "the images bring their own validation part; leave validation_fraction out")
    else:
        chosen = np.repeat(held_out, counts)
    return np.concatenate([order[~chosen], order[chosen]]), int(chosen.sum())


def _named_split(segments: list[Segment]) -> np.ndarray | None:
    """Which segments are for validation by their folders, bool; None where folders do not say."""
    folders = [segment.folders for segment in segments]
    depth = _common_depth(folders)
    roles = [_ROLES.get(path[depth].lower()) if len(path) > depth else None for path in folders]
    if "training" not in roles or not {"validation", "test"} & set(roles):
        return None
    if {"validation", "test"} <= set(roles):
        message = "there is a validation and a test part beside the training part; leave one of them out"
        raise BadImages("ambiguous_split", message)
    if None in roles:
        message = "is in neither the training nor the validation part"
        raise BadImages("ambiguous_split", message, segments[roles.index(None)].name)
    return np.array([role != "training" for role in roles])


def _common_depth(paths: list[tuple[str, ...]]) -> int:
    """How many folders at the beginning all paths share. The first and the last in order share the least."""
    first, last = min(paths), max(paths)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _random_split(count: int, fraction: float | None) -> np.ndarray:
    chosen = np.zeros(count, bool)
    wanted = round(count * (_DEFAULT_FRACTION if fraction is None else fraction))
    if fraction != 0:
        wanted = min(max(1, wanted), count - 1)
    chosen[np.random.RandomState(_SPLIT_SEED).permutation(count)[:wanted]] = True  # a stream frozen for good
    return chosen


def _described(form: tuple[int, ...]) -> str:
    height, width, channels = form
    return f"{'grey' if channels == 1 else 'RGB'}, {width} pixels wide and {height} high"
