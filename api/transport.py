"""Requests to the service, checked answers back, and files in both directions."""

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx
from pydantic import BaseModel

Progress = Callable[[int, int], None]
"""Called with bytes sent or received so far, and bytes in all."""


@dataclass(eq=False)
class ProblemError(Exception):
    """The service refused (RFC 9457): HTTP status, stable code, a sentence, and for a field its path."""

    status: int
    code: str
    detail: str
    errors: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        fields = "".join(f"\n  {error.get('path', '')}: {error.get('detail', '')}" for error in self.errors)
        return f"{self.detail} ({self.code}){fields}"


R = TypeVar("R", bound=BaseModel)


class Transport:
    """Requests in, checked answers out."""

    def __init__(self, base_url: str) -> None:
        # a proxy of the environment has no business between us and a local service
        self.http = httpx.Client(base_url=base_url, timeout=httpx.Timeout(60, connect=10), trust_env=False)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return checked(self.http.request(method, path, **kwargs))

    def get(self, kind: type[R], path: str) -> R:
        return kind.model_validate(self.request("GET", path).json())

    def post(self, kind: type[R], path: str, **kwargs: Any) -> R:
        return kind.model_validate(self.request("POST", path, **kwargs).json())

    def pages(self, kind: type[R], path: str, query: Mapping[str, Any]) -> Iterator[R]:
        """Every object of a list, page after page."""
        params = {name: value for name, value in query.items() if value is not None}
        while True:
            page = self.request("GET", path, params=params).json()
            yield from map(kind.model_validate, page["data"])
            if not page.get("has_more"):
                return
            params["after"] = page["last_id"]

    def download(self, path: str, target: Path, progress: Progress | None) -> Path:
        """Writes the body to `target`, whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        with self.http.stream("GET", path) as response:
            checked(response)
            total = int(response.headers.get("content-length", 0))
            try:
                with partial.open("wb") as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                        if progress is not None:
                            progress(file.tell(), total)
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)
        return target


def checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    response.read()
    if "json" not in response.headers.get("content-type", ""):  # not our service, or a proxy before it
        raise ProblemError(response.status_code, "http_error", response.text[:500] or response.reason_phrase)
    problem = response.json()
    raise ProblemError(
        response.status_code,
        problem.get("code", "http_error"),
        problem.get("detail") or problem.get("title") or response.reason_phrase,
        problem.get("errors") or [],
    )


@contextmanager
def as_file(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """A name and an open file; of a folder, its files in a temporary zip with their relative paths."""
    if not source.is_dir():
        with source.open("rb") as file:
            yield source.name, file
        return
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(source.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(source))
        file.seek(0)
        yield f"{source.resolve().name}.zip", file


class Counted:
    """A file that reports how much of it has been read."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self._total = os.fstat(file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._progress(self._file.tell(), self._total)
        return chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
