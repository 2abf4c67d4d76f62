"""Uploads take little memory, whatever their size: measured on a real API process."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.lib import format as npy

from flowpp.data import encode_png
from tests.api.served import await_answer
from tests.waiting import PATIENCE_SECONDS
from worker.redis_server import RedisServer, free_port
from worker.settings import MAX_ZIP_ENTRIES

MOST_GROWTH_BYTES = 64 * 2**20
"""An upload may raise the peak resident set, mapped files included, by this much after a small upload. The peak of the
small upload depends on the machine: its cores, its allocator, its C library."""


@contextmanager
def api(redis: RedisServer, data: Path) -> Iterator[tuple[httpx.Client, int]]:
    """A client of an API process, and the process's id."""
    port = free_port()
    (data / "tmp").mkdir(parents=True)
    environment = {
        **os.environ,
        "FLOWPP_REDIS_URL": redis.url,
        "FLOWPP_DATA_DIRECTORY": str(data),
        "FLOWPP_AUTHENTICATION": "false",
        "TMPDIR": str(data / "tmp"),
    }
    command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "warning"], env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_SECONDS) as client:
            await_answer(f"http://127.0.0.1:{port}")
            yield client, process.pid
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def peak_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def uploaded(client: httpx.Client, path: Path) -> dict:
    with path.open("rb") as file:  # httpx sends it piece by piece
        response = client.post("/v1/datasets", files={"file": (path.name, file)})
    assert response.status_code == 201, response.text
    answer: dict = response.json()
    return answer


def sparse_array(path: Path, total_bytes: int) -> int:
    """An .npy file of black images that takes no room on the disk; how many they are."""
    count = total_bytes // (32 * 32 * 3)
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, 32, 32, 3)})
        file.truncate(file.tell() + count * 32 * 32 * 3)
    return count


def peak_after_a_small_upload(client: httpx.Client, process: int, directory: Path) -> int:
    sparse_array(directory / "small.npy", 1_000_000)
    uploaded(client, directory / "small.npy")
    return peak_bytes(process)


@pytest.mark.parametrize("total_bytes", [256_000_000, pytest.param(2_000_000_000, marks=pytest.mark.slow)])
def test_an_array_of_any_size_uploads_in_little_memory(
    redis_server: RedisServer, tmp_path: Path, total_bytes: int
) -> None:
    count = sparse_array(tmp_path / "images.npy", total_bytes)
    with api(redis_server, tmp_path / "data") as (client, process):
        before = peak_after_a_small_upload(client, process, tmp_path)
        dataset = uploaded(client, tmp_path / "images.npy")
        assert dataset["num_images"] == count
        assert peak_bytes(process) - before < MOST_GROWTH_BYTES, f"{peak_bytes(process):,} bytes after {before:,}"
    assert list((tmp_path / "data" / "tmp").iterdir()) == []


@pytest.mark.parametrize("count", [5_000, pytest.param(MAX_ZIP_ENTRIES, marks=pytest.mark.slow)])
def test_an_archive_of_many_images_uploads_in_little_memory(
    redis_server: RedisServer, tmp_path: Path, count: int
) -> None:
    random = np.random.default_rng(0)
    pngs = [encode_png(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(16)]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index in range(count):
            archive.writestr(f"photographs/{index:07d}.png", pngs[index % len(pngs)])
    with api(redis_server, tmp_path / "data") as (client, process):
        before = peak_after_a_small_upload(client, process, tmp_path)
        dataset = uploaded(client, tmp_path / "images.zip")
        assert dataset["num_images"] == count
        assert peak_bytes(process) - before < MOST_GROWTH_BYTES, f"{peak_bytes(process):,} bytes after {before:,}"


def test_an_archive_of_more_files_is_refused_with_the_limit_before_its_directory_is_read(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index in range(MAX_ZIP_ENTRIES + 1):  # beyond what 16 bits hold
            archive.writestr(f"{index:07d}.png", b"")
    with api(redis_server, tmp_path / "data") as (client, process):
        before = peak_bytes(process)
        with (tmp_path / "images.zip").open("rb") as file:
            refused = client.post("/v1/datasets", files={"file": ("images.zip", file)})
        assert (refused.status_code, refused.json()["code"]) == (422, "too_many_entries")
        assert f"has {MAX_ZIP_ENTRIES + 1:,} entries, more than the {MAX_ZIP_ENTRIES:,}" in refused.json()["detail"]
        assert peak_bytes(process) - before < 20_000_000
