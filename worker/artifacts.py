"""The artifact store: directories of files on a local disk or behind any fsspec URL, each whole or not there.

`<prefix>/manifest.json` lists the files of a stored directory with sizes and sha256. It is written last and removed
first: what has no manifest does not exist.
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, ValidationError

from flowpp.checkpoint import StoredFile
from flowpp.config import Frozen
from flowpp.durable import new_directory, new_file
from worker.refusals import NotFound

MANIFEST = "manifest.json"

_PIECE_BYTES = 2**22
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_NAME = re.compile(rf"{_SEGMENT}(/{_SEGMENT}){{0,7}}")


def no_check() -> None:
    """Never ends what calls it."""


class DamagedArtifact(Exception):
    """A stored file has another size or sha256 than its manifest says; the message names it."""


class Manifest(Frozen):
    """Content of a stored directory's `manifest.json`. `record` is what Redis knows of it."""

    format: Literal[1] = 1
    created_at: float = Field(description="Unix seconds.")
    record: dict[str, Any] = Field({})
    record_sha256: str = Field("", description="Of the record as JSON with sorted keys; empty: an older one.")
    files: dict[str, StoredFile]

    @property
    def damaged(self) -> bool:
        """Whether the record is another than was written."""
        return bool(self.record_sha256) and self.record_sha256 != _sha256(self.record)


class Listed(NamedTuple):
    """A file in the store: its name within the folder that was listed, and when the store says it was written."""

    name: str
    bytes: int
    modified_at: float


class ArtifactStore:
    """The store at `url`: a directory, or an fsspec URL such as s3://bucket/folder."""

    def __init__(self, url: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(url)
        self._root = str(root).rstrip("/")
        self.directory = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)

    def put(self, prefix: str, source: Path, record: dict[str, Any] | None = None, below: str = "") -> Manifest:
        """Stores the files of the directory `source`, at any depth, as `prefix`, and its manifest last.

        With `below` their names begin with this folder, which keeps the manifest of the directory itself apart.
        """
        files = {}
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            name = (Path(below) / path.relative_to(source)).as_posix()
            files[name] = self._put_file(path, self._path(prefix, name))
        record = record or {}
        manifest = Manifest(created_at=time.time(), record=record, record_sha256=_sha256(record), files=files)
        self._put_bytes(manifest.model_dump_json(indent=2).encode() + b"\n", self._path(prefix, MANIFEST))
        return manifest

    def manifest(self, prefix: str) -> Manifest:
        """Raises `NotFound`, and `DamagedArtifact` where it is not what was written."""
        try:
            manifest = Manifest.model_validate_json(self._fs.cat_file(self._path(prefix, MANIFEST)))
        except FileNotFoundError as error:
            raise NotFound("artifact_not_found", f"nothing is stored as {prefix}") from error
        except ValidationError as error:
            raise DamagedArtifact(f"{prefix}/{MANIFEST} is no manifest: {error}") from error
        if manifest.damaged:
            raise DamagedArtifact(f"the record in {prefix}/{MANIFEST} has another sha256 than it says")
        return manifest

    def open(self, prefix: str, name: str) -> IO[bytes]:
        """A stored file to read and seek in. Raises `NotFound`, also for what is no name."""
        if not _NAME.fullmatch(name) or name not in self.manifest(prefix).files:
            raise NotFound("artifact_not_found", f"there is no artifact {name[:256]!r}")
        try:
            return self._fs.open(self._path(prefix, name), "rb")
        except FileNotFoundError as error:  # deleted meanwhile
            raise NotFound("artifact_not_found", f"there is no artifact {name!r}") from error

    def fetch(self, prefix: str, cache: Path, check: Callable[[], None] = no_check) -> Path:
        """A local directory with the files of `prefix`: the store's own, or else a verified copy below `cache`.

        It is for reading only. Raises `NotFound` and `DamagedArtifact`, and calls `check` as `copy` does.
        """
        if self.directory is not None:
            self._check_sizes(prefix)
            return self.directory / prefix
        directory = cache / prefix
        if not directory.exists():
            try:
                with new_directory(directory) as unfinished:
                    self.copy(prefix, unfinished, check)
            except (FileExistsError, OSError):
                if not directory.exists():  # else another process of this machine was faster
                    raise
        return directory

    def copy(self, prefix: str, directory: Path, check: Callable[[], None] = no_check) -> None:
        """Copies the files of `prefix` into `directory`. Raises `NotFound` and `DamagedArtifact`.

        Every 4 MiB it calls `check`, which may raise to end it.
        """
        for name, stored in self.manifest(prefix).files.items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._fs.open(self._path(prefix, name), "rb") as source, new_file(target) as file:
                if _copy(source, file, check) != stored:
                    raise DamagedArtifact(f"{prefix}/{name} has another size or sha256 than its {MANIFEST} says")

    def verify(self, prefix: str) -> None:
        """Reads all files of `prefix`. Raises `NotFound` and `DamagedArtifact`."""
        for name, stored in self.manifest(prefix).files.items():
            with self._fs.open(self._path(prefix, name), "rb") as source:
                if _copy(source, None) != stored:
                    raise DamagedArtifact(f"{prefix}/{name} has another size or sha256 than its {MANIFEST} says")

    def listing(self, folder: str) -> list[Listed]:
        """All files below `folder`, at any depth, also those of which no manifest tells."""
        path = self._path(folder)
        found = self._fs.find(path, detail=True) if self._fs.exists(path) else {}
        start = len(path) + 1
        return [Listed(name[start:], file["size"], _modified_at(file)) for name, file in sorted(found.items())]

    def delete(self, prefix: str) -> None:
        """Removes all below `prefix`, of which there may be nothing."""
        path = self._path(prefix)
        manifests = [p for p in self._find(path) if p.endswith(f"/{MANIFEST}")]
        for manifest in sorted(manifests, key=len):
            self._fs.rm_file(manifest)
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    def check(self) -> None:
        """Raises `OSError` where nothing can be written."""
        name = f".check-{secrets.token_hex(4)}"
        self._fs.pipe_file(f"{self._root}/{name}", b"")
        self._fs.rm_file(f"{self._root}/{name}")

    def _find(self, path: str) -> list[str]:
        return list(self._fs.find(path)) if self._fs.exists(path) else []

    def _path(self, *parts: str) -> str:
        for part in parts:
            if not _NAME.fullmatch(part):
                raise ValueError(f"{part!r} is no name in the store")
        return "/".join((self._root, *parts))

    def _check_sizes(self, prefix: str) -> None:
        for name, stored in self.manifest(prefix).files.items():
            if self._fs.size(self._path(prefix, name)) != stored.bytes:
                raise DamagedArtifact(f"{prefix}/{name} has another size than its {MANIFEST} says")

    def _put_file(self, source: Path, path: str) -> StoredFile:
        with source.open("rb") as file, self._writing(path) as target:
            return _copy(file, target)

    def _put_bytes(self, content: bytes, path: str) -> None:
        with self._writing(path) as target:
            target.write(content)

    def _writing(self, path: str) -> AbstractContextManager[Any]:
        """A file that appears whole at the end of the block; objects of a remote store do so by themselves."""
        return _replacing(Path(path)) if self.directory is not None else self._fs.open(path, "wb")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with new_file(unfinished) as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _modified_at(file: Mapping[str, Any]) -> float:
    """Unix seconds, by what fsspec says of a file: on a local disk, in S3, in memory."""
    if "mtime" in file:
        return float(file["mtime"])
    return float((file.get("LastModified") or file["created"]).timestamp())


def _sha256(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _copy(source: Any, target: Any, check: Callable[[], None] = no_check) -> StoredFile:
    """Copies, if there is a target, and describes what was read."""
    digest, size = hashlib.sha256(), 0
    while piece := source.read(_PIECE_BYTES):
        check()
        digest.update(piece)
        size += len(piece)
        if target is not None:
            target.write(piece)
    return StoredFile(bytes=size, sha256=digest.hexdigest())
