"""The artifact store: directories of files on a local disk or behind any fsspec URL, each whole or not there.

`<prefix>/manifest.json` lists the files of a stored directory with sizes and sha256. It is written last and removed
first: what has no manifest does not exist. A prefix that ends in .json is a manifest without files, and no directory:
of records that are many, since directories take longer to make than files to write.
"""

import errno
import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, ValidationError

from flowpp.checkpoint import StoredFile
from flowpp.config import Frozen
from flowpp.durable import NewFiles, new_directory, new_file
from worker.object_store import StoreUnavailable, Upload, abort, file_system, reaching, uploading, uploads
from worker.refusals import NotFound

MANIFEST = "manifest.json"
ALONE = ".json"
"""Ends the names of manifests that have no files."""

_PIECE_BYTES = 2**22
_REMEMBERED = 100_000  # files that were verified
_TRIES = 5
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_NAME = re.compile(rf"{_SEGMENT}(/{_SEGMENT}){{0,7}}")


_STORE = "the artifact store"


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


class UnusableStore(OSError):
    """The store cannot be opened, or its directory cannot be made; the message is a sentence."""


class Together:
    """Records that are put into a store one by one, by any number of threads, and are all there after `finish`.

    On a disk that takes a fraction of the time; in an object store each is there at once.
    """

    def __init__(self) -> None:
        self._files = NewFiles()
        self._prefixes: dict[Path, str] = {}

    def write(self, prefix: str, path: Path, content: bytes) -> None:
        """Of a record on a disk its file. Raises `OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.write(path, content)
        self._prefixes[path] = prefix

    def finish(self) -> dict[str, OSError]:
        """Why those that could not be stored could not, by their prefixes. Raises `OSError` where it is not known."""
        return {self._prefixes[path]: error for path, error in self._files.finish().items()}


class ArtifactStore:
    """The store at `url`: a directory, or an fsspec URL such as s3://bucket/folder.

    All of it raises `OSError` where the store cannot be read or written, `StoreUnavailable` where it is not there.
    """

    def __init__(self, url: str) -> None:
        try:
            self._fs, root = file_system(url)
        except Exception as error:  # each file system of fsspec raises its own, and may connect first
            raise UnusableStore(f"FLOWPP_STORE cannot be used: {type(error).__name__}: {error!s:.200}") from error
        self._root = str(root).rstrip("/")
        self._verified: dict[tuple[str, str], tuple[int, int]] = {}
        self.directory = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                named = "FLOWPP_STORE, or else FLOWPP_DATA_DIRECTORY, names it"
                raise UnusableStore(f"the store {self._root} cannot be made: {error.strerror}; {named}") from error

    @reaching(_STORE)
    def put(self, prefix: str, source: Path, record: dict[str, Any] | None = None, below: str = "") -> Manifest:
        """Stores the files of the directory `source`, at any depth, as `prefix`, and its manifest last.

        With `below` their names begin with this folder, which keeps the manifest of the directory itself apart.
        """
        files = {}
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            name = (Path(below) / path.relative_to(source)).as_posix()
            files[name] = self._put_file(path, self._path(prefix, name))
        manifest = _manifest(record or {}, files)
        self._write_manifest(prefix, manifest)
        return manifest

    @reaching(_STORE)
    def put_record(self, prefix: str, record: dict[str, Any], together: "Together | None" = None) -> Manifest:
        """Stores a record that has no files; on a disk with others, when these are `finish`ed."""
        manifest = _manifest(record, {})
        content, path = _written(manifest), self._path(_manifest_of(prefix))
        if together is None or self.directory is None:
            self._put_bytes(content, path)
        else:
            together.write(prefix, Path(path), content)
        return manifest

    @reaching(_STORE)
    def manifest(self, prefix: str) -> Manifest:
        """Raises `NotFound`, and `DamagedArtifact` where it is not what was written."""
        try:
            manifest = Manifest.model_validate_json(self._fs.cat_file(self._path(_manifest_of(prefix))))
        except FileNotFoundError as error:
            raise NotFound("artifact_not_found", f"nothing is stored as {prefix}") from error
        except ValidationError as error:
            raise DamagedArtifact(f"{_manifest_of(prefix)} is no manifest: {error}") from error
        if manifest.damaged:
            raise DamagedArtifact(f"the record in {_manifest_of(prefix)} has another sha256 than it says")
        return manifest

    @reaching(_STORE)
    def open(self, prefix: str, name: str) -> AbstractContextManager[IO[bytes]]:
        """A stored file, to read parts of: these are not verified. Raises `NotFound`, also for what is no name."""
        self._stored(prefix, name)
        return self._reading(prefix, name)

    @reaching(_STORE)
    def parts(self, prefix: str, name: str, before_end: Sequence[int], size: int) -> list[bytes]:
        """`size` bytes of a stored file from each of these distances to its end; nothing else of it is fetched.

        They are not verified. Raises `NotFound`, also for what is no name, and `DamagedArtifact` where it is too short.
        """
        end = self._stored(prefix, name).bytes
        starts = [end - distance for distance in before_end]
        if min(starts, default=0) < 0:
            raise DamagedArtifact(f"{prefix}/{name} is too short")
        ends = [start + size for start in starts]
        parts: list[Any] = self._fs.cat_ranges([self._path(prefix, name)] * len(starts), starts, ends)
        for part in parts:
            if isinstance(part, FileNotFoundError):  # deleted meanwhile
                raise NotFound("artifact_not_found", f"there is no artifact {name!r}") from part
            if isinstance(part, Exception):
                raise part
        if any(len(part) != size for part in parts):
            raise DamagedArtifact(f"{prefix}/{name} is too short")
        return parts

    @reaching(_STORE)
    def pieces(self, prefix: str, name: str) -> Iterator[bytes]:
        """A stored file's bytes, 4 MiB at a time; of a damaged one the last piece does not come, but `DamagedArtifact`.

        Raises `NotFound`, also for what is no name, and before the first piece.
        """
        return self._verified_pieces(self._stored(prefix, name), prefix, name)

    def read(self, prefix: str, name: str) -> bytes:
        """All of a stored file. Raises `NotFound`, also for what is no name, and `DamagedArtifact`."""
        return b"".join(self.pieces(prefix, name))

    @reaching(_STORE)
    def path(self, prefix: str, name: str) -> Path:
        """A stored file of a store that is a directory, verified as by `fetch`. Raises as `read`."""
        assert self.directory is not None
        self._verify_once(self.directory / prefix, prefix, name, self._stored(prefix, name))
        return self.directory / prefix / name

    @reaching(_STORE)
    def fetch(self, prefix: str, cache: Path, check: Callable[[], None] = no_check) -> Path:
        """A local directory, to read, with the files of `prefix`: the store's own, or else a copy below `cache`.

        Files are verified once in the life of a process, as long as their size and time of change are what they were.
        Raises `NotFound` and `DamagedArtifact`, and calls `check` as `copy` does.
        """
        files = self.manifest(prefix).files
        directory = (self.directory or cache) / prefix
        if self.directory is None and not self._is_whole(directory, prefix, files, check):
            shutil.rmtree(directory, ignore_errors=True)
            self._copy_to_cache(prefix, directory, check)
        for name, stored in files.items():
            self._verify_once(directory, prefix, name, stored, check)
        return directory

    @reaching(_STORE)
    def copy(self, prefix: str, directory: Path, check: Callable[[], None] = no_check) -> None:
        """Copies the files of `prefix` into `directory`. Raises `NotFound` and `DamagedArtifact`.

        Every 4 MiB it calls `check`, which may raise to end it.
        """
        for name, stored in self.manifest(prefix).files.items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._reading(prefix, name) as source, new_file(target) as file:
                if _copy(source, file, check) != stored:
                    raise _damaged(prefix, name)

    @reaching(_STORE)
    def replicate(self, prefix: str, other: "ArtifactStore") -> bool:
        """Puts what is stored as `prefix` into another store, its manifest last; false where it is there already.

        Raises `NotFound` and `DamagedArtifact`; nothing new is there then.
        """
        manifest = self.manifest(prefix)
        if other._has(prefix, manifest):
            return False
        for name, stored in manifest.files.items():
            with self._reading(prefix, name) as source, other._writing(other._path(prefix, name)) as target:
                if _copy(source, target) != stored:
                    raise _damaged(prefix, name)
        other._write_manifest(prefix, manifest)
        return True

    @reaching(_STORE)
    def verify(self, prefix: str) -> None:
        """Reads all files of `prefix`. Raises `NotFound` and `DamagedArtifact`."""
        for name, stored in self.manifest(prefix).files.items():
            with self._reading(prefix, name) as source:
                if _copy(source, None) != stored:
                    raise _damaged(prefix, name)

    @reaching(_STORE)
    def listing(self, folder: str) -> list[Listed]:
        """All files below `folder`, at any depth, also those of which no manifest tells."""
        path = self._path(folder)
        found = self._find(path)
        start = len(path) + 1
        return [Listed(name[start:], file["size"], _modified_at(file)) for name, file in sorted(found.items())]

    @reaching(_STORE)
    def delete(self, prefix: str) -> None:
        """Removes all below `prefix`, of which there may be nothing. Others may do the same meanwhile."""
        path = self._path(prefix)
        if prefix.endswith(ALONE):
            with suppress(FileNotFoundError):
                self._fs.rm_file(path)
            return
        for manifest in sorted((name for name in self._find(path) if name.endswith(f"/{MANIFEST}")), key=len):
            with suppress(FileNotFoundError):
                self._fs.rm_file(manifest)
        if self.directory is not None and Path(path).is_file():
            Path(path).unlink(missing_ok=True)
        elif self.directory is not None:
            delete_directory(Path(path))
        elif rest := list(self._find(path)):
            self._fs.rm(rest)
            if rest := list(self._find(path)):  # s3fs does not say so
                raise StoreUnavailable(f"{rest[0]} cannot be deleted")

    @reaching(_STORE)
    def check(self) -> None:
        """Raises `OSError` where nothing can be written."""
        path = self._path("checks", secrets.token_hex(8))
        self._put_bytes(b"", path)
        self._fs.rm_file(path)

    @reaching(_STORE)
    def remove(self, folder: str, file: Listed) -> None:
        """Removes one file of a listing, which may be gone already."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._path(folder)}/{file.name}")

    @reaching(_STORE)
    def uploads(self) -> list[Upload]:
        """What is being uploaded in parts, or was when its process ended."""
        return uploads(self._fs, self._root)

    @reaching(_STORE)
    def abort(self, upload: Upload) -> None:
        """Ends an upload: its parts are deleted."""
        abort(self._fs, self._root, upload)

    def _find(self, path: str) -> dict[str, Any]:
        try:
            return dict(self._fs.find(path, detail=True))
        except FileNotFoundError:
            return {}

    def _path(self, *parts: str) -> str:
        for part in parts:
            if not _NAME.fullmatch(part):
                raise ValueError(f"{part!r} is no name in the store")
        return "/".join((self._root, *parts))

    def _stored(self, prefix: str, name: str) -> StoredFile:
        files = self.manifest(prefix).files if _NAME.fullmatch(name) else {}
        if name not in files:
            raise NotFound("artifact_not_found", f"there is no artifact {name[:256]!r}")
        return files[name]

    @contextmanager
    def _reading(self, prefix: str, name: str) -> Iterator[IO[bytes]]:
        with reaching(_STORE):
            try:
                file = self._fs.open(self._path(prefix, name), "rb")
            except FileNotFoundError as error:  # deleted meanwhile
                raise NotFound("artifact_not_found", f"there is no artifact {name!r}") from error
            with file:
                yield file

    def _verified_pieces(self, stored: StoredFile, prefix: str, name: str) -> Iterator[bytes]:
        digest, size, last = hashlib.sha256(), 0, b""
        with self._reading(prefix, name) as file:
            while piece := file.read(_PIECE_BYTES):
                if last:
                    yield last
                digest.update(piece)
                size += len(piece)
                last = piece
        if StoredFile(bytes=size, sha256=digest.hexdigest()) != stored:
            raise _damaged(prefix, name)
        if last:
            yield last

    def _verify_once(
        self, directory: Path, prefix: str, name: str, stored: StoredFile, check: Callable[[], None] = no_check
    ) -> None:
        path = directory / name
        try:
            now = path.stat()
            if self._verified.get((str(path), stored.sha256)) == (now.st_size, now.st_mtime_ns):
                return
            with path.open("rb") as file:
                if now.st_size != stored.bytes or _copy(file, None, check) != stored:
                    raise _damaged(prefix, name)
        except FileNotFoundError as error:
            raise NotFound("artifact_not_found", f"there is no artifact {name!r} of {prefix}") from error
        if len(self._verified) >= _REMEMBERED:
            self._verified.clear()
        self._verified[str(path), stored.sha256] = now.st_size, now.st_mtime_ns

    def _is_whole(
        self, directory: Path, prefix: str, files: Mapping[str, StoredFile], check: Callable[[], None]
    ) -> bool:
        try:
            for name, stored in files.items():
                self._verify_once(directory, prefix, name, stored, check)
        except (NotFound, DamagedArtifact):
            return False
        return directory.exists()

    def _copy_to_cache(self, prefix: str, directory: Path, check: Callable[[], None]) -> None:
        try:
            with new_directory(directory) as unfinished:
                self.copy(prefix, unfinished, check)
        except OSError:
            if not directory.exists():  # else another process of this machine was faster
                raise

    def _write_manifest(self, prefix: str, manifest: Manifest) -> None:
        self._put_bytes(_written(manifest), self._path(_manifest_of(prefix)))

    def _has(self, prefix: str, manifest: Manifest) -> bool:
        """Whether just this is stored as `prefix`."""
        try:
            return self.manifest(prefix) == manifest
        except (NotFound, DamagedArtifact):
            return False

    def _put_file(self, source: Path, path: str) -> StoredFile:
        with source.open("rb") as file, self._writing(path) as target:
            return _copy(file, target)

    def _put_bytes(self, content: bytes, path: str) -> None:
        with self._writing(path) as target:
            target.write(content)

    def _writing(self, path: str) -> AbstractContextManager[Any]:
        """A file that appears whole at the end of the block, or not at all."""
        return _replacing(Path(path)) if self.directory is not None else uploading(self._fs, path)


def _manifest(record: dict[str, Any], files: dict[str, StoredFile]) -> Manifest:
    return Manifest(created_at=time.time(), record=record, record_sha256=_sha256(record), files=files)


def _written(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=2).encode() + b"\n"


def _manifest_of(prefix: str) -> str:
    return prefix if prefix.endswith(ALONE) else f"{prefix}/{MANIFEST}"


def _damaged(prefix: str, name: str) -> DamagedArtifact:
    return DamagedArtifact(f"{prefix}/{name} has another size or sha256 than its {MANIFEST} says")


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


def delete_directory(path: Path) -> None:
    """Removes it with all in it, though others remove it, or write into it, meanwhile."""

    def fail(function: object, place: str, error: Any) -> None:
        if not isinstance(error[1], FileNotFoundError):
            raise error[1]

    for left in reversed(range(_TRIES)):
        try:
            return shutil.rmtree(path, onerror=fail)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not left:
                raise


def _modified_at(file: Mapping[str, Any]) -> float:
    """Unix seconds, by what fsspec says of a file: on a local disk, in S3, in memory."""
    time = next(file[name] for name in ("mtime", "LastModified", "created") if name in file)
    return float(time.timestamp() if isinstance(time, datetime) else time)


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
