"""What may be uploaded, and that what may not gets a code and a sentence and leaves nothing behind."""

import io
import os
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from flowpp.data import encode_png
from worker.models import Checkpoint
from worker.service import Service


def image_file(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (32, 32), **save: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **save)
    return buffer.getvalue()


def zip_of(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_with_link() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("image.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()


def array_file(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def bomb() -> bytes:
    """About 100 kB that unpack to 120 MB of black images."""
    return zip_of({"a.npy": array_file(np.zeros((40_000, 32, 32, 3), np.uint8))})


PNG = encode_png(np.zeros((32, 32, 3), np.uint8))

BAD_FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "no image": ("a.png", lambda: b"hello", "not_an_image"),
    "a truncated image": ("a.png", lambda: PNG[: len(PNG) // 2], "damaged_image"),
    "an animated image": ("a.webp", animated, "animated_image"),
    "a 16-bit image": ("a.png", lambda: image_file(mode="I;16"), "unsupported_depth"),
    "a CMYK image": ("a.jpg", lambda: image_file("JPEG", "CMYK"), "unsupported_colour"),
    "an image too large": ("a.png", lambda: image_file(size=(300, 300)), "image_too_large"),
    "an empty archive": ("a.zip", lambda: zip_of({}), "no_images"),
    "images of several sizes": (
        "a.zip", lambda: zip_of({"a.png": PNG, "b.png": image_file(size=(16, 16))}), "mixed_sizes",
    ),
    "a name that climbs": ("a.zip", lambda: zip_of({"../a.png": PNG}), "unsafe_archive"),
    "a link": ("a.tar.gz", tar_with_link, "unsafe_archive"),
    "a decompression bomb": ("a.zip", bomb, "too_large"),
    "pickled objects": ("a.npy", lambda: array_file(np.array([{}], dtype=object)), "unsupported_array"),
}  # fmt: skip


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process keeps temporary files."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_dataset_is_refused_and_leaves_nothing_behind(
    case: str, http: httpx.Client, service: Service, temporary: Path
) -> None:
    name, content, code = BAD_FILES[case]
    response = http.post("/v1/datasets", files={"file": (name, content())})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (413 if code == "too_large" else 422, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert len(problem["detail"].split()) > 4, "a sentence"
    assert http.get("/v1/datasets").json()["data"] == []
    assert files_below(temporary) == []
    assert files_below(service.settings.data_directory) == []


def test_a_dataset_is_registered_with_its_shape_split_and_hash(http: httpx.Client, service: Service) -> None:
    archive = zip_of({f"{split}/{index}.png": PNG for split in ("train", "validation") for index in range(3)})
    response = http.post("/v1/datasets", files={"file": ("../../photos.zip", archive)})
    assert response.status_code == 201
    dataset = response.json()
    assert (dataset["num_images"], dataset["num_validation"], dataset["shape"]) == (6, 3, [3, 32, 32])
    assert (dataset["object"], dataset["name"]) == ("dataset", "photos.zip")
    assert response.headers["location"] == f"/v1/datasets/{dataset['id']}"
    assert http.get(response.headers["location"]).json() == dataset
    assert http.delete(response.headers["location"]).status_code == 204
    assert http.get(response.headers["location"]).json()["code"] == "dataset_not_found"
    assert files_below(service.settings.data_directory) == []


def test_test_images_validate_a_training_only_if_the_form_requests_it(http: httpx.Client) -> None:
    files = {
        "file": ("a.zip", zip_of({f"{part}/{index}.png": PNG for part in ("train", "test") for index in range(3)}))
    }
    parts = []
    for fields in ({}, {"test_as_validation": "false"}, {"test_as_validation": "true"}):
        dataset = http.post("/v1/datasets", files=files, data=fields).json()
        parts.append((dataset["num_images"], dataset["num_validation"], dataset["num_test"]))
    assert parts == [(6, 1, 3), (6, 1, 3), (6, 3, 0)]
    response = http.post("/v1/datasets", files=files, data={"test_as_validation": "yes"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"][0]["path"] == "test_as_validation"


def test_nothing_trains_on_images_that_are_all_held_out(http: httpx.Client) -> None:
    for part in ("test", "validation"):
        files = {"file": ("a.zip", zip_of({f"{part}/{index}.png": PNG for index in range(3)}))}
        dataset = http.post("/v1/datasets", files=files).json()
        assert dataset[f"num_{part}"] == 3
        wanted = {"dataset": dataset["id"], "model": {"preset": "tiny"}}
        response = http.post("/v1/training-jobs", json=wanted)
        assert (response.status_code, response.json()["code"]) == (422, "no_training_images")


def test_several_image_files_make_a_dataset(http: httpx.Client) -> None:
    files = [("file", ("same.png", encode_png(np.full((32, 32, 3), value, np.uint8)))) for value in range(4)]
    assert http.post("/v1/datasets", files=files).json()["num_images"] == 4


def test_a_body_over_the_limit_is_refused_without_being_read(http: httpx.Client) -> None:
    host, port = http.base_url.host, http.base_url.port
    with socket.create_connection((host, port), timeout=10) as connection:
        head = f"POST /v1/datasets HTTP/1.1\r\nHost: {host}\r\nContent-Length: {10**12}\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # comes though no byte of the body was sent
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in answer
    assert b"1,000,000 bytes" in answer


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(http: httpx.Client, temporary: Path) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
        for _ in range(10_000):
            sent += 2**16
            yield bytes(2**16)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    try:
        response = http.post("/v1/datasets", content=body(), headers=headers)
    except httpx.TransportError:  # the server closed before we had sent all: as good an answer
        pass
    else:
        assert response.status_code == 413
    assert sent < 100 * 1_000_000
    assert http.get("/healthz").status_code == 200
    assert files_below(temporary) == []


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        ({"content": b"x"}, 415, "unsupported_media_type"),
        ({"files": {"image": ("a.png", PNG)}}, 422, "invalid_request"),
        ({"data": {"file": "text"}, "files": {"other": b""}}, 422, "invalid_request"),
        (
            {"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            422,
            "invalid_request",
        ),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, 422, "invalid_request"),
    ],
)
def test_what_is_no_form_with_a_file_is_refused(
    arguments: dict[str, object], status: int, code: str, http: httpx.Client
) -> None:
    response = http.post("/v1/datasets", **arguments)  # type: ignore[arg-type]
    assert (response.status_code, response.json()["code"]) == (status, code)


@pytest.mark.parametrize("case", [case for case, (name, _, _) in BAD_FILES.items() if not name.startswith("a.zip")])
def test_a_bad_image_to_score_is_refused_and_leaves_nothing_behind(
    case: str, http: httpx.Client, service: Service, checkpoint: Checkpoint, temporary: Path
) -> None:
    name, content, _ = BAD_FILES[case]
    before = files_below(service.settings.data_directory)
    response = http.post("/v1/likelihood-jobs", data={"model": checkpoint.id}, files={"files": (name, content())})
    assert response.status_code == 422
    assert name in response.json()["detail"]
    assert http.get("/v1/jobs").json()["data"] == []
    assert files_below(temporary) == []
    assert files_below(service.settings.data_directory) == before


def test_of_several_images_the_one_that_is_wrong_is_named(http: httpx.Client, checkpoint: Checkpoint) -> None:
    for wrong in (b"text", PNG[:-20], image_file(size=(16, 24))):
        files = [("files", ("fine.png", PNG)), ("files", ("wrong.png", wrong))]
        response = http.post("/v1/likelihood-jobs", data={"model": checkpoint.id}, files=files)
        assert response.status_code == 422
        assert response.json()["detail"].startswith("wrong.png: ")


def test_an_image_of_another_size_than_the_models_is_refused_with_both_sizes(
    http: httpx.Client, service: Service, checkpoint: Checkpoint
) -> None:
    before = files_below(service.settings.data_directory)
    files = {"files": ("a.png", image_file(size=(16, 24)))}
    response = http.post("/v1/likelihood-jobs", data={"model": checkpoint.id}, files=files)
    assert (response.status_code, response.json()["code"]) == (422, "wrong_image_shape")
    assert "16 wide and 24 high" in response.json()["detail"]
    assert "32 wide and 32 high" in response.json()["detail"]
    assert response.json()["detail"].startswith("a.png: ")
    several = [("files", (name, image_file(size=(16, 24)))) for name in ("b.png", "c.png", "d.png")]
    response = http.post("/v1/likelihood-jobs", data={"model": checkpoint.id}, files=several)
    assert response.json()["detail"].startswith("b.png and 2 more: ")
    assert response.json()["errors"][0]["path"] == "files"
    ends = http.post("/v1/sampling-jobs", data={"model": checkpoint.id, "num_samples": 3}, files=several[:2])
    assert ends.json()["detail"].startswith("b.png and 1 more: ")
    assert files_below(service.settings.data_directory) == before


def test_more_images_than_a_request_may_send_are_refused(http: httpx.Client, checkpoint: Checkpoint) -> None:
    files = [("files", (f"{index}.png", PNG)) for index in range(101)]
    response = http.post("/v1/likelihood-jobs", data={"model": checkpoint.id}, files=files)
    assert response.status_code == 422
    assert "100" in response.json()["detail"]


def test_uploads_leave_no_open_files(http: httpx.Client) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    http.post("/v1/datasets", files={"file": ("a.zip", zip_of({"a.png": b"x"}))})
    before = count()
    for _ in range(5):
        http.post("/v1/datasets", files={"file": ("a.zip", zip_of({"a.png": b"x"}))})
    assert count() <= before
