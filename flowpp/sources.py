"""What the command line reads: images to be scored or encoded, with their names, and latents to be decoded."""

import zipfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flowpp.archives import members
from flowpp.config import ModelConfig
from flowpp.data import IMAGES, MANIFEST, BadImages, Limits, content_sha256, open_image_set, read_member
from flowpp.images import displayed
from flowpp.spool import check_form, too_many_images

LIMITS = Limits(max_images=1_000_000, max_uncompressed_bytes=4 * 2**30)
"""Of images held in memory; a larger set is read from an image set's directory or by its split."""


MAX_LATENTS = 100_000


class Split(StrEnum):
    """Which images of a set."""

    ALL = "all"
    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"


class Images(NamedTuple):
    """Images, uint8 [N, H, W, C], what each is called, and the content hash: of the image set, where it is one."""

    names: list[str]
    pixels: np.ndarray
    sha256: str


def open_images(sources: Sequence[Path], split: Split) -> Images:
    """The images of one folder, archive, array or image set, or of image files.

    With a split, and in an image set, whose files are gone, a name is such as `validation[3]`. Raises `BadImages`.
    """
    if len(sources) == 1 and (split is not Split.ALL or _is_image_set(sources[0])):
        image_set = open_image_set(sources[0])
        images = {
            Split.ALL: image_set.images,
            Split.TRAINING: image_set.training,
            Split.VALIDATION: image_set.validation,
            Split.TEST: image_set.test,
        }[split]
        if not len(images):
            raise BadImages("no_images", f"has no {split} images", str(sources[0]))
        names = [f"{split}[{index}]" for index in range(len(images))]
        return Images(names, np.asarray(images), image_set.sha256)
    if split is not Split.ALL:
        raise BadImages("no_images", "several image files have no split")
    names, pixels = _read(sources[0] if len(sources) == 1 else sources)
    return Images(names, pixels, content_sha256(pixels))


def read_latents(path: Path, config: ModelConfig) -> np.ndarray:
    """The array `latents` of a .npz file, float32 [N, *latent_shape]. Raises `BadImages`."""
    expected = f"expected is float32 [N, {', '.join(map(str, config.latent_shape))}], N up to {MAX_LATENTS:,}"
    try:
        # opened here, as numpy leaves a damaged zip file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            latents = arrays["latents"]
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise BadImages("bad_latents", f"is no .npz file that can be read ({error}); {expected}", str(path)) from error
    except KeyError as error:
        raise BadImages("bad_latents", f"holds no array `latents`; {expected}", str(path)) from error
    if latents.dtype != np.float32 or latents.shape[1:] != config.latent_shape or not 1 <= len(latents) <= MAX_LATENTS:
        raise BadImages("bad_latents", f"has latents of {latents.dtype} {list(latents.shape)}; {expected}", str(path))
    if not np.isfinite(latents).all():
        raise BadImages("bad_latents", "has latents that are not finite", str(path))
    return latents


def _is_image_set(source: Path) -> bool:
    return (source / MANIFEST).is_file() and (source / IMAGES).is_file()


def _read(source: Path | Sequence[Path]) -> tuple[list[str], np.ndarray]:
    names: list[str] = []
    parts: list[np.ndarray] = []
    for member in members(source, LIMITS):
        of_file = list(read_member(member, LIMITS))
        for part in of_file:
            parts.append(part)
            check_form(member.name, part.shape[1:], names[0] if names else member.name, parts[0].shape[1:])
        n = sum(map(len, of_file))
        name = displayed(member.name)
        names += [name] if n == 1 else [f"{name}[{index}]" for index in range(n)]
        if len(names) > LIMITS.max_images:
            raise too_many_images(LIMITS)
    if not names:
        raise BadImages("no_images", "holds no images", str(source))
    return names, np.concatenate(parts)
