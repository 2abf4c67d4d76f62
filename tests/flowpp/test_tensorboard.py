"""The TensorBoard event file of a run: read back as the format has it, it holds each step once."""

import errno
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from flowpp.config import TrainingConfig
from flowpp.data import ImageSet
from flowpp.presets import resolve_model, resolve_training
from flowpp.run_directory import RunDirectory
from flowpp.tensorboard import GRID, NAME, SCALARS, EventFile
from flowpp.training import train


def read(directory: Path) -> list[Event]:
    """The events of a run, their checksums verified."""
    return [Event.FromString(content) for content in contents((directory / "tensorboard" / NAME).read_bytes())]


def contents(data: bytes) -> Iterator[bytes]:
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        content, rest = data[12 : 12 + length], data[12 + length :]
        assert (data[8:12], rest[:4]) == (checksum(data[:8]), checksum(content))
        yield content
        data = rest[4:]


def checksum(data: bytes) -> bytes:
    """As TFRecord masks it, by another implementation than the one that writes."""
    value = google_crc32c.value(data)
    return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def scalars(events: list[Event], tag: str) -> list[tuple[int, float]]:
    return [
        (e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == tag and not v.HasField("image")
    ]


def grids(events: list[Event]) -> list[int]:
    return [event.step for event in events for value in event.summary.value if value.HasField("image")]


def recipe(**changes: Any) -> TrainingConfig:
    return resolve_training(
        "tiny", {"steps": 8, "sample_every": 4, "evaluation_every": 4, "checkpoint_every": 4} | changes
    )


def run(directory: Path, image_set: ImageSet, training: TrainingConfig, steps: int | None = None) -> None:
    """To its end, or as if it was killed after so many steps."""
    model = resolve_model("tiny", {}, image_set.shape)
    for event in train(directory, model=model, training=training, images=image_set):
        if event.step == steps:
            return


def assert_agrees(directory: Path) -> None:
    """The event file says what metrics.jsonl says, at the same times, and shows the grids that lie there."""
    events, rows = read(directory), RunDirectory(directory).read_metrics()
    assert events[0].file_version == "brain.Event:2"
    for name, tag in SCALARS.items():
        told = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in scalars(events, tag)] == [step for step, _ in told], tag
        np.testing.assert_allclose([v for _, v in scalars(events, tag)], [v for _, v in told], rtol=1e-6)
    drawn = sorted(int(path.stem.removeprefix("step-")) for path in (directory / "samples").glob("step-*.png"))
    assert grids(events) == drawn
    times = {event.step: event.wall_time for event in events if any(v.tag != GRID for v in event.summary.value)}
    assert times == {row["step"]: row["time"] for row in rows}


def test_a_run_shows_its_metrics_and_samples(tmp_path: Path, image_set: ImageSet) -> None:
    run(tmp_path, image_set, recipe())
    assert_agrees(tmp_path)
    events = read(tmp_path)
    assert len(scalars(events, "bits_per_dim/train")) == 8
    assert [step for step, _ in scalars(events, "bits_per_dim/validation")] == [4, 8]
    assert grids(events) == [4, 8]
    (image,) = [v.image for e in events if e.step == 8 for v in e.summary.value if v.tag == GRID]
    with Image.open(io.BytesIO(image.encoded_image_string)) as shown:
        assert (shown.size, image.colorspace) == ((image.width, image.height), 3)


@pytest.mark.parametrize("killed_after", [5, 7])
def test_a_run_that_is_taken_up_repeats_no_step(tmp_path: Path, image_set: ImageSet, killed_after: int) -> None:
    run(tmp_path, image_set, recipe(), steps=killed_after)
    assert [step for step, _ in scalars(read(tmp_path), "bits_per_dim/train")] == list(range(1, killed_after + 1))
    run(tmp_path, image_set, recipe())
    assert_agrees(tmp_path)
    assert grids(read(tmp_path)) == [4, 8]


def test_a_run_that_was_killed_between_a_grid_and_its_metrics_shows_it_once(
    tmp_path: Path, image_set: ImageSet
) -> None:
    run(tmp_path, image_set, recipe(), steps=6)
    (tmp_path / "samples" / "step-00000008.png").write_bytes((tmp_path / "samples" / "step-00000004.png").read_bytes())
    run(tmp_path, image_set, recipe())
    assert_agrees(tmp_path)


def test_an_event_file_that_is_lost_is_made_of_what_is_there(tmp_path: Path, image_set: ImageSet) -> None:
    run(tmp_path, image_set, recipe(), steps=6)
    (tmp_path / "tensorboard" / NAME).unlink()
    run(tmp_path, image_set, recipe())
    assert_agrees(tmp_path)


def test_a_disk_that_was_full_for_a_while_loses_nothing(
    tmp_path: Path, image_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, refused = EventFile._append, []

    def full(self: EventFile, records: Any) -> None:
        if len(refused) < 2:
            refused.append(True)
            self._whole = False
            with self._path.open("ab") as file:  # as much as there was room for
                file.write(b"".join(records)[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, records)

    monkeypatch.setattr(EventFile, "_append", full)
    run(tmp_path, image_set, recipe())
    assert len(refused) == 2
    assert_agrees(tmp_path)
