"""A run's TensorBoard event file: what metrics.jsonl tells, as scalars, and the sample grids; each step once.

It is a view of what the run has written else, and made anew of that whenever a run is taken up. Its format: records
(length, its checksum, an `Event`, its checksum), where an `Event` is the protobuf message of TensorFlow's event.proto.
"""

import io
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from flowpp.checkpoint import step_of
from flowpp.durable import replace_file
from flowpp.run_directory import SAMPLES, TENSORBOARD, RunDirectory

NAME = "events.out.tfevents.flowpp"
"""TensorBoard reads what has tfevents in its name."""

SCALARS = {
    "train_bits_per_dim": "bits_per_dim/train",
    "validation_bits_per_dim": "bits_per_dim/validation",
    "gradient_norm": "optimizer/gradient_norm",
    "learning_rate": "optimizer/learning_rate",
    "images_per_second": "images_per_second",
}
"""Metrics of metrics.jsonl, and what TensorBoard calls them."""

GRID = "samples"

_COLOURS = {"L": 1, "RGB": 3}


class EventFile:
    """The event file of a run. All of it raises `OSError` where the disk takes nothing; then the next makes it anew."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._path = run.path / TENSORBOARD / NAME
        self._whole = False

    def write(self) -> None:
        """Makes it of the rows of metrics.jsonl, and of the grids that were drawn at the steps of these."""
        events = [_record(Event(wall_time=0, file_version="brain.Event:2"))]
        grids = {step_of(path.with_suffix("")): path for path in (self._run.path / SAMPLES).glob("step-*.png")}
        for row in self._run.read_metrics():
            if row["step"] in grids:
                events.append(_grid(grids[row["step"]]))
            events.append(_scalars(row))
        self._path.parent.mkdir(exist_ok=True)
        replace_file(self._path, b"".join(events))
        self._whole = True

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows that metrics.jsonl has got."""
        if self._whole:
            self._append(map(_scalars, rows))
        else:
            self.write()

    def samples(self, step: int) -> None:
        """Adds the grid of samples that was written at this step; its row of metrics comes later."""
        if not self._whole:
            self.write()
        self._append([_grid(self._run.samples(step))])

    def _append(self, records: Iterable[bytes]) -> None:
        self._whole = False  # unless all of it is written
        content = b"".join(records)
        with self._path.open("ab", buffering=0) as file:
            self._whole = file.write(content) == len(content)


def _scalars(row: Mapping[str, Any]) -> bytes:
    values = [Summary.Value(tag=tag, simple_value=row[name]) for name, tag in SCALARS.items() if name in row]
    return _record(Event(wall_time=row["time"], step=row["step"], summary=Summary(value=values)))


def _grid(path: Path) -> bytes:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height, colours = *image.size, _COLOURS[image.mode]
    shown = Summary.Image(width=width, height=height, colorspace=colours, encoded_image_string=content)
    summary = Summary(value=[Summary.Value(tag=GRID, image=shown)])
    return _record(Event(wall_time=os.path.getmtime(path), step=step_of(path.with_suffix("")), summary=summary))


def _record(event: Event) -> bytes:
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return length + _checksum(length) + content + _checksum(content)


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
