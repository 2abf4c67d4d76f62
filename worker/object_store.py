"""Object stores (S3) behind fsspec: what s3fs does otherwise than the artifact store needs.

It caches listings, though other processes write; it raises exceptions of botocore and aiohttp that are no `OSError`; a
file that is closed as its block raises is stored as far as it was written; and it says nothing of objects that it could
not delete. Endpoint, region and credentials are those of the AWS tools: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ..., or
the files and services that botocore looks into.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import fsspec
from fsspec.spec import AbstractBufferedFile

BLOCK_BYTES = 16 * 2**20
"""What is held in memory of a file that is read or written; larger ones are written in parts of this size (of which S3
takes 10,000: 156 GiB)."""


class StoreUnavailable(OSError):
    """The object store does not answer, or cannot do what it is asked for; the message says why."""


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    protocol = fsspec.utils.get_protocol(url)
    if protocol == "file":
        return fsspec.core.url_to_fs(url)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        options["default_block_size"] = BLOCK_BYTES
    return fsspec.core.url_to_fs(url, **options)


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Within it, what an object store's libraries raise of their own is raised as `StoreUnavailable`."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or library not in ("aiobotocore", "aiohttp", "botocore", "urllib3"):
            raise
        raise StoreUnavailable(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def uploading(fs: Any, path: str) -> Iterator[Any]:
    """A file to write, which is there at the end of the block; where the block raises, nothing of it is."""
    file = fs.open(path, "wb")
    try:
        yield file
        file.close()
    except BaseException:
        if isinstance(file, AbstractBufferedFile):
            with suppress(Exception):  # what went wrong first is raised
                file.discard()  # of S3: aborts the upload of parts
            file.closed = True  # else it is written when it is collected
        raise


class Upload(NamedTuple):
    """An upload of parts that has not come to its end."""

    name: str
    id: str
    began_at: float


def uploads(fs: Any, root: str) -> list[Upload]:
    """Those below a path, where the store has such."""
    if not hasattr(fs, "list_multipart_uploads"):
        return []
    bucket, _, folder = root.partition("/")
    found = fs.list_multipart_uploads(bucket)
    start = f"{folder}/" if folder else ""
    return [
        Upload(each["Key"].removeprefix(start), each["UploadId"], each["Initiated"].timestamp())
        for each in found
        if each["Key"].startswith(start)
    ]


def abort(fs: Any, root: str, upload: Upload) -> None:
    """Ends one of the `uploads` below a path, which may have ended."""
    bucket, _, folder = root.partition("/")
    with suppress(FileNotFoundError):
        fs.abort_mpu(bucket, f"{folder}/{upload.name}" if folder else upload.name, upload.id)
