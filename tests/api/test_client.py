"""The Python client against a running service."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from api.client import Client, ClientError, Job, ProblemError, Unreachable
from api.stack import Stack
from flowpp.data import build_image_set, decode_image, encode_png
from tests.api.cutting_proxy import cutting_proxy
from tests.waiting import PATIENCE_SECONDS
from worker import child
from worker.redis_server import free_port
from worker.requests import TrainingRequest
from worker.service import Service
from worker.submission import submit_training


def test_an_upload_reports_its_progress_up_to_the_last_byte(client: Client, archive: Path) -> None:
    reports: list[tuple[int, int]] = []
    dataset = client.datasets.upload(archive, lambda sent, total: reports.append((sent, total)))
    assert reports == sorted(reports)
    assert reports[-1] == (archive.stat().st_size,) * 2
    assert (dataset.num_images, dataset.num_validation, dataset.shape) == (48, 16, (3, 32, 32))
    assert client.datasets.get(dataset.id) == dataset
    assert dataset in list(client.datasets.list())


def test_a_contact_sheet_shows_images_with_their_exact_pixels(
    client: Client, stack: Stack, archive: Path, images: np.ndarray
) -> None:
    dataset = client.datasets.upload(archive)
    picture = client.datasets.contact_sheet(dataset.id)
    sheet = decode_image(picture, "sheet.png")
    assert sheet.shape == (7 * 34, 7 * 34, 3), "48 images, a black pixel around each"
    places = range(1, 7 * 34, 34)
    tiles = {sheet[row : row + 32, column : column + 32].tobytes() for row in places for column in places}
    assert {image.tobytes() for image in images[:48]} < tiles, "and a black place"
    url = f"{stack.url}/v1/datasets/{dataset.id}/contact-sheet"
    first = httpx.get(url)
    assert (first.content, first.headers["Content-Type"]) == (picture, "image/png")
    known = httpx.get(url, headers={"If-None-Match": first.headers["ETag"]})
    assert (known.status_code, known.content) == (304, b"")


def test_a_contact_sheet_of_grey_images_is_grey_and_shows_64_of_them(client: Client, tmp_path: Path) -> None:
    images = np.arange(130 * 3 * 5, dtype=np.int64).astype(np.uint8).reshape(130, 3, 5)
    np.save(tmp_path / "grey.npy", images)
    sheet = decode_image(client.datasets.contact_sheet(client.datasets.upload(tmp_path / "grey.npy").id), "sheet.png")
    assert sheet.shape == (8 * 5, 8 * 7, 1)
    shown = sheet.reshape(8, 5, 8, 7).swapaxes(1, 2).reshape(64, 5, 7)[:, 1:-1, 1:-1]
    tiles = {tile.tobytes() for tile in shown}
    assert len(tiles) == 64
    assert tiles < {image.tobytes() for image in images}


def test_a_folder_uploads_as_the_images_in_it(client: Client, images: np.ndarray, tmp_path: Path) -> None:
    for split, part in (("train", images[:5]), ("validation", images[5:8])):
        (tmp_path / split).mkdir()
        for index, image in enumerate(part):
            (tmp_path / split / f"{index}.png").write_bytes(encode_png(image))
    dataset = client.datasets.upload(tmp_path)
    assert (dataset.num_images, dataset.num_validation) == (8, 3)


def test_a_deleted_dataset_is_a_problem_with_status_code_and_sentence(
    client: Client, images: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "deleted.npy", images[:7])  # no other test has a dataset of these
    dataset = client.datasets.upload(tmp_path / "deleted.npy")
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


def test_events_of_some_types_come_live_or_newest_first(client: Client, trained: Job) -> None:
    events = list(client.jobs.events(trained.id))
    some = [event for event in events if event.type in ("metrics", "checkpoint")]
    assert list(client.jobs.events(trained.id, types=["metrics", "checkpoint"])) == some
    assert list(client.jobs.history(trained.id)) == events[::-1]
    assert list(client.jobs.history(trained.id, ["metrics", "checkpoint"])) == some[::-1]


def test_a_stream_that_breaks_is_taken_up_where_it_broke(stack: Stack, client: Client, trained: Job) -> None:
    with (
        cutting_proxy(stack.port, bytes_each=2_000) as (port, connections),
        Client(f"http://127.0.0.1:{port}") as through,
    ):
        events = list(through.jobs.events(trained.id))
    assert events == list(client.jobs.events(trained.id))
    assert len(connections) > 2, "the proxy cut nothing"


def test_a_stream_outlives_the_api_that_is_killed_and_started_again(service: Service, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((16, 32, 32, 3), np.uint8))
    dataset = service.datasets.register(build_image_set(tmp_path / "images.npy", tmp_path / "set"))
    request = TrainingRequest.model_validate({"dataset": dataset.id, "model": {"preset": "tiny"}})
    job = submit_training(service, request)
    (claimed,) = service.jobs.claim("training", "a worker")
    port = free_port()

    def serve() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
        own = {"FLOWPP_REDIS_URL": service.settings.redis_url, "FLOWPP_AUTHENTICATION": "false"}
        data = {"FLOWPP_DATA_DIRECTORY": str(service.settings.data_directory)}
        return child.start(command, tmp_path / "api.log", os.environ | own | data)

    api = serve()
    try:
        with Client(f"http://127.0.0.1:{port}", max_retries=20) as client:
            events = client.jobs.events(job.id)
            assert [next(events).data["status"] for _ in range(2)] == ["queued", "running"]
            service.events.append(claimed, "metrics", {"step": 1})
            assert next(events).data == {"step": 1}
            api.kill()
            api.wait()
            service.events.append(claimed, "metrics", {"step": 2})
            api = serve()
            assert next(events).data == {"step": 2}
            service.jobs.cancel(job.id)
            service.jobs.end(claimed, "stopped")
            assert [event.data.get("status") for event in events] == ["cancelling", "cancelled"]
    finally:
        child.stop(api, PATIENCE_SECONDS)


def test_what_a_job_tells_is_typed(client: Client, trained: Job) -> None:
    job = client.jobs.get(trained.id)
    assert job.progress is not None
    assert (job.progress.step, job.progress.total_steps, job.progress.percent_done) == (20, 20, 100)
    assert (job.queue_position, job.error, job.attempt) == (None, None, 1)
    columns = client.jobs.metrics(job.id).columns
    assert columns["step"][-1] == 20
    assert len(columns["train_bits_per_dim"]) == len(columns["step"])
    assert "attempt 1" in client.jobs.logs(job.id)
    (attempt,) = client.jobs.attempts(job.id)
    assert (attempt.attempt, attempt.status) == (1, "succeeded")
    assert attempt.ended_at is not None
    presets = {preset.id: preset for preset in client.presets.list()}
    assert presets["tiny"].training["steps"] == 20
    assert "validation_bits_per_dim" in next(iter(client.checkpoints.list(job=job.id))).metrics


def test_jobs_are_found_by_their_metadata_images_sent_or_not(client: Client, trained: Job, images: np.ndarray) -> None:
    files = [(f"{index}.png", encode_png(image)) for index, image in enumerate(images[:2])]
    mine = {"experiment [1]": "a=b & ü"}
    scored = client.likelihood_jobs.create(model=trained.id, images=files, metadata=mine, wait=60)
    between = client.sampling_jobs.interpolate(model=trained.id, images=files, num_samples=3, metadata=mine, wait=60)
    drawn = client.sampling_jobs.create(model=trained.id, num_samples=1, metadata=mine, wait=60)
    assert [job.status for job in (scored, between, drawn)] == ["succeeded"] * 3, "they were waited for"
    found = [job.id for job in client.jobs.list(metadata=mine)]
    assert found == [drawn.id, between.id, scored.id]
    assert list(client.jobs.list(metadata={**mine, "no": "such"})) == []


def test_metadata_in_a_form_is_checked_as_it_is_in_json(stack: Stack, trained: Job, images: np.ndarray) -> None:
    forms = ({"metadata[who]": "x" * 513}, {"metadata[]": "nobody"}, {"metadata": "me", "metadata[who]": "me"})
    for form in forms:
        response = httpx.post(
            f"{stack.url}/v1/likelihood-jobs",
            data={"model": trained.id, **form},
            files=[("files", ("a.png", encode_png(images[0])))],
        )
        problem = response.json()
        assert (response.status_code, problem["code"]) == (422, "invalid_request")
        assert problem["errors"][0]["path"].startswith("metadata")


def test_a_deleted_checkpoint_is_gone(client: Client, trained: Job) -> None:
    job = client.training_jobs.create(
        dataset=trained.request["dataset"], model={"preset": "tiny"}, training={"steps": 2}
    )
    assert client.jobs.wait(job.id, timeout=PATIENCE_SECONDS).status == "succeeded"
    (checkpoint,) = client.checkpoints.list(job=job.id)
    client.checkpoints.delete(checkpoint.id)
    assert list(client.checkpoints.list(job=job.id)) == []


def test_likelihood_and_samples_by_http_only(client: Client, trained: Job, images: np.ndarray, tmp_path: Path) -> None:
    files = [(f"{index}.png", encode_png(image)) for index, image in enumerate(images[32:])]
    score = client.jobs.wait(client.likelihood_jobs.create(model=trained.id, images=files).id, timeout=PATIENCE_SECONDS)
    assert score.status == "succeeded", score
    assert score.result is not None
    assert 0 < score.result["bits_per_dim"] < 20

    job = client.sampling_jobs.create(model=trained.id, num_samples=4, seed=1)
    assert client.jobs.wait(job.id, timeout=PATIENCE_SECONDS).status == "succeeded"
    grid = client.jobs.download(job.id, "grid.png", tmp_path / "deep" / "grid.png")
    with Image.open(grid) as image:
        assert min(image.size) >= 2 * 32
    assert "grid.png" in {artifact.name for artifact in client.jobs.artifacts(job.id)}
    assert job.id in {listed.id for listed in client.jobs.list(type="sampling")}


def test_a_job_that_lasts_longer_than_one_waits_raises(client: Client, trained: Job) -> None:
    job = client.training_jobs.create(
        dataset=trained.request["dataset"], model={"preset": "tiny"}, training={"steps": 100_000}
    )
    with pytest.raises(TimeoutError, match=job.id):
        client.jobs.wait(job.id, timeout=0.2)
    client.jobs.cancel(job.id)
    assert client.jobs.wait(job.id, timeout=PATIENCE_SECONDS).status == "cancelled"


def test_a_checkpoint_downloads_whole(client: Client, trained: Job, tmp_path: Path) -> None:
    checkpoint = next(iter(client.checkpoints.list()))
    assert client.checkpoints.get(checkpoint.id) == checkpoint
    path = client.checkpoints.download(checkpoint.id, tmp_path / "checkpoint")
    assert path.stat().st_size > 1_000
    assert list(tmp_path.iterdir()) == [path]


def test_no_service_is_a_client_error_with_its_url() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(Unreachable, match=rf"{url} cannot .*is the service running") as caught:
        client.jobs.get("job_x")
    assert isinstance(caught.value, ClientError)
    assert caught.value.url == url
