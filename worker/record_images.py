"""Images of a few kB that came with a request: in the record of its job, since files take longer than the model."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_IN_RECORD_BYTES = 16_384
"""Of pixels: five images of 32 x 32; more go into the store."""


def in_record(images: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Images, uint8 [N, H, W, C], with their N names, as JSON has them."""
    return {"shape": images.shape, "pixels": base64.b64encode(images.tobytes()).decode(), "names": list(names)}


def from_record(record: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """The images, uint8 [N, H, W, C], and names that `in_record` was given."""
    pixels = np.frombuffer(base64.b64decode(record["pixels"]), np.uint8)
    return pixels.reshape(record["shape"]), record["names"]
