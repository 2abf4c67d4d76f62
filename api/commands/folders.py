"""Folders of images, which commands take in place of image files."""

from collections.abc import Sequence
from pathlib import Path

import typer

from api.client.files import sendable
from api.commands.output import note

MAX_IMAGES, MAX_BYTES = 4_096, 2**30
"""Limits of one request, as the service has them by default."""

_NAMED = 5
"""Skipped files that a message names."""


def image_files(sources: Sequence[Path]) -> list[tuple[str, Path]]:
    """Returns names and paths of files. The images in a folder, at any depth and sorted, replace the folder.

    The name of an image in a folder is its path in there. Content determines which files are images; a note names the
    others. Raises `typer.BadParameter` for an image set, and if a folder has no images or too many; `BadImages` if a
    folder contains a link to a folder.
    """
    found: list[tuple[str, Path]] = []
    for source in sources:
        if source.is_dir():
            found += [(sendable(name), path) for path, name in _images(source)]
        elif _is_set(source):
            raise typer.BadParameter(
                f"{source} is an image set; upload it (flowpp datasets upload {source}), and score it by --dataset"
            )
        else:
            found.append((sendable(source.name), source))
    return found


def _images(folder: Path) -> list[tuple[Path, str]]:
    from flowpp.archives import walk  # loads NumPy and Pillow, which most commands do not need
    from flowpp.images import DEFAULT_LIMITS, displayed
    from flowpp.kinds import Family, kind_of

    found: list[tuple[Path, str]] = []
    skipped: list[str] = []
    size = 0
    for path, name in walk(folder, DEFAULT_LIMITS):
        kind = kind_of(_head(path))
        if kind is None or kind.family is not Family.IMAGE:
            skipped.append(displayed(name))
            continue
        size += path.stat().st_size
        found.append((path, name))
        if len(found) > MAX_IMAGES or size > MAX_BYTES:
            raise typer.BadParameter(
                f"{folder} holds more than {MAX_IMAGES:,} images, or {MAX_BYTES:,} bytes of them; upload it "
                f"(flowpp datasets upload {folder}), and score it by --dataset"
            )
    others = ", ".join(skipped[:_NAMED]) + (" and others" if len(skipped) > _NAMED else "")
    if not found:
        detail = f"; these files are of other kinds: {others}" if skipped else ""
        raise typer.BadParameter(f"{folder} holds no images that can be scored{detail}")
    if skipped:
        note(f"skips {len(skipped):,} of the files in {folder}, which are no images of a kind that is read: {others}")
    return found


def _is_set(path: Path) -> bool:
    """Returns True if a file holds many images: an archive or an array."""
    from flowpp.kinds import Family, kind_of
    from flowpp.tar import is_tar

    head = _head(path)
    kind = kind_of(head)
    if kind is None:
        return any(head) and is_tar(head)
    return kind.family in (Family.ARCHIVE, Family.OTHER_ARCHIVE, Family.ARRAY)


def _head(path: Path) -> bytes:
    """Returns the beginning of a plain file. Returns nothing for a pipe, since reading it would wait."""
    from flowpp.kinds import HEAD_BYTES

    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
