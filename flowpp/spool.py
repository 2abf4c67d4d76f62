"""Images gathered from many files into one temporary file, and the order in which a set holds them."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np

from flowpp.images import BadImages, Limits, shortened
from flowpp.splits import Part, parts_by_name

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
        """(H, W, C) of all images."""
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


class Arrangement(NamedTuple):
    """The order of a set: `order`, int64 [N], are numbers of the spool: training, validation, test images."""

    order: np.ndarray
    num_validation: int
    num_test: int


def arrange(segments: list[Segment], validation_fraction: float | None, test_as_validation: bool) -> Arrangement:
    """Sorts images by name into their parts.

    Without a validation part, some training images are chosen for it at random. Raises `BadImages`.
    """
    if not segments:
        raise BadImages("no_images", "there are no images in it")
    segments = sorted(segments, key=lambda segment: segment.name)
    counts = np.array([segment.count for segment in segments])
    skipped = np.array([segment.start for segment in segments]) - np.concatenate([[0], np.cumsum(counts)[:-1]])
    order = np.repeat(skipped, counts) + np.arange(counts.sum())
    parts = parts_by_name([segment.name for segment in segments], counts.tolist())
    parts = parts or [Part.TRAINING] * len(segments)
    if test_as_validation:
        parts = _test_as_validation(parts)
    training, validation, test = (
        order[np.repeat([part is wanted for part in parts], counts)]
        for wanted in (Part.TRAINING, Part.VALIDATION, Part.TEST)
    )
    if not len(validation):
        chosen = _random_split(len(training), validation_fraction)
        training, validation = training[~chosen], training[chosen]
    elif validation_fraction is not None:
        raise BadImages("ambiguous_split", "the images bring their own validation part; leave validation_fraction out")
    return Arrangement(np.concatenate([training, validation, test]), len(validation), len(test))


def _test_as_validation(parts: list[Part]) -> list[Part]:
    if Part.VALIDATION in parts:
        raise BadImages("ambiguous_split", "the images bring their own validation part; leave test_as_validation out")
    if Part.TEST not in parts:
        raise BadImages("ambiguous_split", "the images bring no test part; leave test_as_validation out")
    return [Part.VALIDATION if part is Part.TEST else part for part in parts]


def _random_split(count: int, fraction: float | None) -> np.ndarray:
    chosen = np.zeros(count, bool)
    wanted = round(count * (_DEFAULT_FRACTION if fraction is None else fraction))
    if fraction != 0:
        wanted = max(0, min(max(1, wanted), count - 1))
    chosen[np.random.RandomState(_SPLIT_SEED).permutation(count)[:wanted]] = True  # a stream frozen for good
    return chosen


def _described(form: tuple[int, ...]) -> str:
    height, width, channels = form
    return f"{'grey' if channels == 1 else 'RGB'}, {width} pixels wide and {height} high"
