"""Images of a few kB that came with a request: in the record of its job, since files take longer than the model."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_IN_RECORD_BYTES = 16_384
"""Of pixels: five images of 32 x 32; more go into the store."""


def in_record(images: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """uint8 [N, H, W, C] with N names, as JSON has it."""
    pixels = base64.b64encode(images.tobytes()).decode()
    return {"shape": images.shape, "pixels": pixels, "names": list(names) or _numbered(len(images))}


def from_record(record: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """What `in_record` was given."""
    pixels = np.frombuffer(base64.b64decode(record["pixels"]), np.uint8)
    return pixels.reshape(record["shape"]), record["names"]


def _numbered(count: int) -> list[str]:
    return [f"{index:04d}" for index in range(count)]
