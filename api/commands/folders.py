"""Folders of images, as commands take them beside image files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff"})
"""Of the files in a folder that are images to the service."""

MAX_IMAGES, MAX_BYTES = 4_096, 2**30
"""Of one request; what the service takes is less, unless it was told otherwise."""


def image_files(sources: Sequence[Path]) -> list[Path]:
    """Files as they are, and instead of each folder the images in it, however deep, sorted by their paths.

    Raises `typer.BadParameter` where a folder holds none, or too many.
    """
    return [path for source in sources for path in (_images(source) if source.is_dir() else [source])]


def _images(folder: Path) -> list[Path]:
    found: list[Path] = []
    size = 0
    for path in _files(folder):
        size += path.stat().st_size
        found.append(path)
        if len(found) > MAX_IMAGES or size > MAX_BYTES:
            raise typer.BadParameter(
                f"{folder} holds more than {MAX_IMAGES:,} images, or {MAX_BYTES:,} bytes of them; upload it "
                f"(flowpp datasets upload {folder}), and score it by --dataset"
            )
    if not found:
        raise typer.BadParameter(f"{folder} holds no images: no file named {', '.join(sorted(SUFFIXES))}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _files(folder: Path) -> Iterator[Path]:
    """Its images, but not what is hidden."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path
