"""The Python client against a running service."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from api.client import Client, Job, ProblemError
from api.stack import Stack
from flowpp.data import encode_png
from worker.redis_server import free_port


def test_an_upload_reports_its_progress_up_to_the_last_byte(client: Client, archive: Path) -> None:
    reports: list[tuple[int, int]] = []
    dataset = client.datasets.upload(archive, lambda sent, total: reports.append((sent, total)))
    assert reports == sorted(reports)
    assert reports[-1] == (archive.stat().st_size,) * 2
    assert (dataset.num_images, dataset.num_validation, dataset.shape) == (48, 16, (3, 32, 32))
    assert client.datasets.get(dataset.id) == dataset
    assert dataset in list(client.datasets.list())


def test_a_folder_uploads_as_the_images_in_it(client: Client, images: np.ndarray, tmp_path: Path) -> None:
    for split, part in (("train", images[:5]), ("validation", images[5:8])):
        (tmp_path / split).mkdir()
        for index, image in enumerate(part):
            (tmp_path / split / f"{index}.png").write_bytes(encode_png(image))
    dataset = client.datasets.upload(tmp_path)
    assert (dataset.num_images, dataset.num_validation) == (8, 3)


def test_a_deleted_dataset_is_a_problem_with_status_code_and_sentence(client: Client, archive: Path) -> None:
    dataset = client.datasets.upload(archive)
    client.datasets.delete(dataset.id)
    with pytest.raises(ProblemError) as caught:
        client.datasets.get(dataset.id)
    assert caught.value.status == 404
    assert caught.value.code
    assert dataset.id in caught.value.detail


def test_a_refused_field_is_named_in_the_problem(client: Client, archive: Path) -> None:
    dataset = client.datasets.upload(archive)
    with pytest.raises(ProblemError) as caught:
        client.training_jobs.create(dataset=dataset.id, model={"preset": "tiny", "filters": -1})
    assert caught.value.status == 422
    assert any("filters" in str(error) for error in caught.value.errors), caught.value.errors
    assert "filters" in str(caught.value)


def test_the_events_of_a_job_come_once_in_order_and_end_with_its_end(client: Client, trained: Job) -> None:
    events = list(client.jobs.events(trained.id))
    assert len({event.id for event in events}) == len(events)
    assert [event.data["status"] for event in events if event.type == "status"] == ["queued", "running", "succeeded"]
    assert events[-1].terminal
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == sorted(steps)
    assert steps[-1] == 20
    assert list(client.jobs.events(trained.id, after=events[3].id)) == events[4:]
    assert list(client.jobs.events(trained.id, after=events[-1].id)) == []


def test_a_stream_that_breaks_is_taken_up_where_it_broke(stack: Stack, client: Client, trained: Job) -> None:
    with (
        cutting_proxy(stack.port, bytes_each=2_000) as (port, connections),
        Client(f"http://127.0.0.1:{port}") as through,
    ):
        events = list(through.jobs.events(trained.id))
    assert events == list(client.jobs.events(trained.id))
    assert len(connections) > 2, "the proxy cut nothing"


def test_likelihood_and_samples_by_http_only(client: Client, trained: Job, images: np.ndarray, tmp_path: Path) -> None:
    files = [(f"{index}.png", encode_png(image)) for index, image in enumerate(images[32:])]
    score = client.jobs.wait(client.likelihood_jobs.create(model=trained.id, images=files).id, timeout=60)
    assert score.status == "succeeded", score
    assert score.result is not None
    assert 0 < score.result["bits_per_dim"] < 20

    job = client.sampling_jobs.create(model=trained.id, num_samples=4, seed=1)
    assert client.jobs.wait(job.id, timeout=60).status == "succeeded"
    grid = client.jobs.download(job.id, "grid.png", tmp_path / "deep" / "grid.png")
    with Image.open(grid) as image:
        assert min(image.size) >= 2 * 32
    assert "grid.png" in {artifact.name for artifact in client.jobs.artifacts(job.id)}
    assert job.id in {listed.id for listed in client.jobs.list(type="sampling")}


def test_a_refused_download_leaves_no_file(client: Client, trained: Job, tmp_path: Path) -> None:
    with pytest.raises(ProblemError):
        client.jobs.download(trained.id, "no-such-artifact", tmp_path / "file")
    assert not any(tmp_path.iterdir())


def test_a_job_that_lasts_longer_than_one_waits_raises(client: Client, trained: Job) -> None:
    job = client.training_jobs.create(
        dataset=trained.request["dataset"], model={"preset": "tiny"}, training={"steps": 100_000}
    )
    with pytest.raises(TimeoutError, match=job.id):
        client.jobs.wait(job.id, timeout=0.2)
    client.jobs.cancel(job.id)
    assert client.jobs.wait(job.id, timeout=60).status == "cancelled"


def test_a_checkpoint_downloads_whole(client: Client, trained: Job, tmp_path: Path) -> None:
    checkpoint = next(client.checkpoints.list())
    assert client.checkpoints.get(checkpoint.id) == checkpoint
    path = client.checkpoints.download(checkpoint.id, tmp_path / "checkpoint")
    assert path.stat().st_size > 1_000
    assert list(tmp_path.iterdir()) == [path]


def test_no_service_is_a_transport_error() -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(httpx.ConnectError):
        client.jobs.get("job_x")


@contextmanager
def cutting_proxy(port: int, bytes_each: int) -> Iterator[tuple[int, list[int]]]:
    """A TCP proxy to `port` that ends each of its first three connections after `bytes_each` bytes of answer."""
    connections: list[int] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                downstream, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            connections.append(1)
            limit = bytes_each if len(connections) <= 3 else None
            threading.Thread(target=answer, args=(downstream, limit), daemon=True).start()

    def answer(downstream: socket.socket, limit: int | None) -> None:
        with downstream, socket.create_connection(("127.0.0.1", port)) as upstream:
            upstream.sendall(downstream.recv(65_536))
            sent = 0
            while (chunk := upstream.recv(512)) and (limit is None or sent < limit):
                downstream.sendall(chunk)
                sent += len(chunk)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1], connections
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
