"""Folders of images, which commands take in place of image files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from api.client.files import sendable

MAX_IMAGES, MAX_BYTES = 4_096, 2**30
"""Limits of one request, as the service has them by default."""

_SETS = {".zip", ".tar", ".gz", ".tgz", ".npy", ".npz"}
"""Endings of files that hold many images."""


def image_files(sources: Sequence[Path]) -> list[tuple[str, Path]]:
    """Files, and instead of each folder the images in it, however deep, sorted: names and paths.

    The name of one in a folder is its path below that. Raises `typer.BadParameter` where a folder holds none, or too
    many.
    """
    found: list[tuple[str, Path]] = []
    for source in sources:
        if source.is_dir():
            found += [(sendable(path.relative_to(source).as_posix()), path) for path in _images(source)]
        elif source.suffix.lower() in _SETS:
            raise typer.BadParameter(
                f"{source} is an image set; upload it (flowpp datasets upload {source}), and score it by --dataset"
            )
        else:
            found.append((sendable(source.name), source))
    return found


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
        raise typer.BadParameter(f"{folder} holds no images: no file named {', '.join(sorted(_suffixes()))}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _suffixes() -> set[str]:
    from flowpp.images import SUFFIXES  # which loads Pillow and NumPy, and most commands need neither

    return {suffix for suffix, kind in SUFFIXES.items() if kind != "GIF"}


def _files(folder: Path) -> Iterator[Path]:
    """Yields the images of a folder that are not hidden."""
    suffixes = _suffixes()
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in suffixes and not hidden and path.is_file():
            yield path
