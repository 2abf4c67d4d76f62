"""Whole lives of jobs, with workers and training processes as they are in service."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from flowpp import FlowPP
from flowpp.checkpoint import verify
from flowpp.data import build_image_set, content_sha256
from flowpp.likelihood import likelihood
from flowpp.sampling import decode, sample
from tests.service.suspension import caught, resume, resume_when_told_to_end
from tests.waiting import LEASE_SECONDS, PATIENCE_SECONDS, until
from worker import child, submission
from worker.datasets import Dataset
from worker.jobs import Job
from worker.presence import count
from worker.redis_server import RedisServer
from worker.requests import LikelihoodRequest, SamplingRequest, TrainingRequest
from worker.service import Service
from worker.settings import Settings
from worker.submission import prepare_likelihood, prepare_sampling, submit_one

ENDLESS = 1_000_000


class Workers:
    """Worker processes over one data directory, by queue."""

    def __init__(self, settings: Settings) -> None:
        self.directory = settings.data_directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "FLOWPP_REDIS_URL": settings.redis_url,
            "FLOWPP_DATA_DIRECTORY": str(settings.data_directory),
            "FLOWPP_LEASE_SECONDS": str(settings.lease_seconds),
            "FLOWPP_GRACE_SECONDS": str(PATIENCE_SECONDS),
            "OMP_NUM_THREADS": "1",
        }
        if settings.max_processes is not None:
            self.environment["FLOWPP_MAX_PROCESSES"] = str(settings.max_processes)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, queue: str) -> subprocess.Popen[bytes]:
        log = self.directory / f"{queue}.log"
        self.processes[queue] = child.start([sys.executable, "-m", "worker", queue], log, self.environment)
        return self.processes[queue]

    def log(self, queue: str) -> str:
        return (self.directory / f"{queue}.log").read_text()

    def training_processes(self) -> list[psutil.Process]:
        """Those of our jobs; other tests may train, too."""
        found = psutil.process_iter(["cmdline"])
        return [process for process in found if f"{self.directory}/runs/" in " ".join(process.info["cmdline"] or [])]

    def stop(self) -> None:
        for process in self.processes.values():
            child.stop(process, PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        data = tmp_path_factory.mktemp("service") / "data"
        yield Settings(redis_url=server.url, data_directory=data, lease_seconds=LEASE_SECONDS, max_processes=2)


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[Service]:
    with Service(settings) as service:
        yield service


@pytest.fixture(scope="module")
def workers(settings: Settings) -> Iterator[Workers]:
    workers = Workers(settings)
    try:
        for queue in ("training", "inference"):
            workers.start(queue)
        yield workers
    finally:
        workers.stop()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Random images with a gradient, so that there is something to learn; uint8 [40, 8, 8, 3]."""
    noise = np.random.default_rng(0).integers(0, 32, (40, 8, 8, 3), np.uint8)
    return noise + np.linspace(0, 200, 8).astype(np.uint8)[:, None]


@pytest.fixture(scope="module")
def dataset(service: Service, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("images")
    np.save(directory / "images.npy", images)
    return service.datasets.register(build_image_set(directory / "images.npy", directory / "set"))


@pytest.fixture(scope="module")
def trained(service: Service, workers: Workers, dataset: Dataset) -> Job:
    """A `tiny` model after its 20 steps, with checkpoints at 10 and 20."""
    job = until_finished(service, submit_training(service, dataset).id)
    assert job.status == "succeeded", (job, workers.log("training"))
    return job


def submit_training(service: Service, dataset: Dataset, **training: int) -> Job:
    request = {"dataset": dataset.id, "model": {"preset": "tiny"}, "training": training}
    return submission.submit_training(service, TrainingRequest.model_validate(request))


def until_status(service: Service, job_id: str, *statuses: str) -> Job:
    until(lambda: service.jobs.get(job_id).status in statuses, lambda: f"{service.jobs.get(job_id)} is not {statuses}")
    return service.jobs.get(job_id)


def until_finished(service: Service, job_id: str) -> Job:
    return until_status(service, job_id, "succeeded", "failed", "cancelled")


def has_steps(service: Service) -> Callable[[Job], bool]:
    return lambda job: len(service.events.metrics(job.id)) >= 3


def statuses(service: Service, job: Job) -> list[str]:
    return [event.data["status"] for event in service.events.page(job.id, limit=1000).data if event.type == "status"]


def test_a_training_job_leaves_metrics_checkpoints_and_a_curve(service: Service, trained: Job) -> None:
    assert statuses(service, trained) == ["queued", "running", "succeeded"]
    assert trained.progress is not None
    assert (trained.progress.step, trained.progress.percent_done) == (20, 100)
    assert [row["step"] for row in service.events.metrics(trained.id)] == list(range(1, 21))
    checkpoints = service.checkpoints.of_job(trained.id)
    assert [checkpoint.step for checkpoint in checkpoints] == [10, 20]
    for checkpoint in checkpoints:
        assert verify(service.checkpoints.fetch(checkpoint)).step == checkpoint.step
    best = service.checkpoints.resolve(trained.id)
    assert trained.result is not None
    assert trained.result["best_checkpoint"] == best.id
    files = service.artifacts(trained).files
    samples = {"samples/step-00000010.png", "samples/step-00000020.png", "tensorboard/events.out.tfevents.flowpp"}
    assert {"config.json", "metrics.jsonl", "result.json", "training_curve.png", "log.txt"} | samples == files.keys()
    service.store.verify(trained.artifacts)
    until(lambda: not service.run_directory(trained.id).exists(), "the run directory is left on the disk")


def test_a_likelihood_job_gives_what_the_library_gives(service: Service, trained: Job, images: np.ndarray) -> None:
    request = LikelihoodRequest(model=trained.id, importance_samples=2, seed=3)
    job = until_finished(
        service, submit_one(service, prepare_likelihood(service, request, images[:3], ["a", "b", "c"])).id
    )
    assert job.status == "succeeded", job
    model = FlowPP.load(service.checkpoints.fetch(service.checkpoints.resolve(trained.id)))
    expected = np.concatenate(list(likelihood(model, images[:3], importance_samples=2, seed=3)))[:, 0]
    assert job.result is not None
    assert [row["name"] for row in job.result["images"]] == ["a", "b", "c"]
    np.testing.assert_allclose([row["log_likelihood"] for row in job.result["images"]], expected, rtol=1e-6)
    assert job.result["bits_per_dim"] == pytest.approx(-expected.mean() / (192 * np.log(2)))
    assert job.result["standard_error"] > 0
    assert sum(job.result["split"].values()) == pytest.approx(job.result["bits_per_dim"])
    assert job.result["checkpoint_sha256"] == model.checkpoint_sha256
    assert job.result["dataset_sha256"] == content_sha256(images[:3])
    assert not job.artifacts, "few images have all their figures in the result"


def test_a_likelihood_job_on_a_dataset_scores_its_validation_images(
    service: Service, trained: Job, dataset: Dataset
) -> None:
    request = LikelihoodRequest(model=trained.id, dataset=dataset.id)
    job = until_finished(service, submit_one(service, prepare_likelihood(service, request)).id)
    assert job.status == "succeeded", job
    assert job.result is not None
    assert job.result["num_images"] == dataset.num_validation == 4
    assert job.result["dataset_sha256"] == dataset.sha256


def arrays(service: Service, job: Job, name: str) -> dict[str, np.ndarray]:
    with service.store.open(job.artifacts, name) as file:
        return dict(np.load(io.BytesIO(file.read())))


def test_a_likelihood_job_leaves_bits_maps_and_latents_where_asked(
    service: Service, trained: Job, images: np.ndarray
) -> None:
    request = LikelihoodRequest(model=trained.id, bits_map=True, latents=True)
    job = until_finished(
        service, submit_one(service, prepare_likelihood(service, request, images[:3], ["a", "b", "c"])).id
    )
    assert job.status == "succeeded", job
    assert job.result is not None
    assert "bits_map.png" in service.artifacts(job).files
    bits = arrays(service, job, "bits_map.npz")["bits"]
    assert bits.shape == (3, 8, 8, 3)
    assert bits.mean() == pytest.approx(job.result["bits_per_dim"], rel=1e-5)
    latents = arrays(service, job, "latents.npz")["latents"]
    model = FlowPP.load(service.checkpoints.fetch(service.checkpoints.resolve(trained.id)))
    np.testing.assert_array_equal(np.concatenate(list(decode(model, latents))), images[:3])


@pytest.mark.parametrize("sent", [True, False])
def test_a_sampling_job_goes_from_one_image_to_another(
    service: Service, trained: Job, dataset: Dataset, sent: bool
) -> None:
    stored = service.datasets.open(dataset.id).images
    if sent:
        new = submit_one(
            service,
            prepare_sampling(service, SamplingRequest(model=trained.id, num_samples=5), stored[[7, 2]], ["a", "b"]),
        )
    else:
        ends = {"dataset": dataset.id, "images": (7, 2)}
        new = submit_one(
            service, prepare_sampling(service, SamplingRequest(model=trained.id, num_samples=5, between=ends))
        )
    job = until_finished(service, new.id)
    assert job.status == "succeeded", job
    between = arrays(service, job, "samples.npz")["images"]
    assert len(between) == 5
    np.testing.assert_array_equal(between[[0, -1]], stored[[7, 2]])


def test_a_sampling_job_gives_what_the_library_gives(service: Service, trained: Job) -> None:
    request = SamplingRequest(model=trained.id, num_samples=70, temperature=0.7, seed=5)
    job = until_finished(service, submit_one(service, prepare_sampling(service, request)).id)
    assert job.status == "succeeded", job
    files = service.artifacts(job).files
    assert {"grid.png", "samples.npz", "png/0000.png", "png/0069.png"} <= files.keys()
    with service.store.open(job.artifacts, "samples.npz") as file:
        images = np.load(io.BytesIO(file.read()))["images"]
    model = FlowPP.load(service.checkpoints.fetch(service.checkpoints.resolve(trained.id)))
    expected = np.concatenate(list(sample(model, 70, temperature=0.7, seed=5)))
    # batches of another size round otherwise, which may move a value across a boundary
    assert (images == expected).mean() > 0.999


def test_many_requests_at_once_are_each_answered_with_their_own_result(
    service: Service, trained: Job, images: np.ndarray
) -> None:
    request = LikelihoodRequest(model=trained.id)
    jobs = [submit_one(service, prepare_likelihood(service, request, images[i : i + 1], [f"{i}"])) for i in range(12)]
    model = FlowPP.load(service.checkpoints.fetch(service.checkpoints.resolve(trained.id)))
    for i, job in enumerate(jobs):
        result = until_finished(service, job.id).result
        assert result is not None
        expected = next(likelihood(model, images[i : i + 1]))
        assert result["images"][0]["name"] == f"{i}"
        assert result["log_likelihood"] == pytest.approx(expected[0, 0], rel=1e-6)


def test_a_job_cancelled_in_the_queue_does_no_work(service: Service, workers: Workers, dataset: Dataset) -> None:
    running = submit_training(service, dataset, steps=ENDLESS)
    waiting = submit_training(service, dataset)
    until_status(service, running.id, "running")
    assert service.jobs.cancel(waiting.id).status == "cancelled"
    service.jobs.cancel(running.id)
    until_finished(service, running.id)
    last = submit_training(service, dataset, steps=2, warmup_steps=0)  # the cancelled one's bell has rung before
    assert until_finished(service, last.id).status == "succeeded"
    assert statuses(service, waiting) == ["queued", "cancelled"]
    assert service.jobs.get(waiting.id).attempt == 0
    assert not service.run_directory(waiting.id).exists()


def test_a_job_cancelled_while_it_runs_keeps_its_last_checkpoint(
    service: Service, workers: Workers, dataset: Dataset
) -> None:
    job = submit_training(service, dataset, steps=ENDLESS, checkpoint_every=1_000_000)
    until(lambda: len(service.events.metrics(job.id)) >= 3, f"{service.jobs.get(job.id)} has no metrics")
    assert service.jobs.cancel(job.id).status == "cancelling"
    job = until_finished(service, job.id)
    assert statuses(service, job) == ["queued", "running", "cancelling", "cancelled"]
    [checkpoint] = service.checkpoints.of_job(job.id)
    assert checkpoint.step >= 3
    assert verify(service.checkpoints.fetch(checkpoint)).step == checkpoint.step
    assert workers.training_processes() == []


def test_a_job_that_runs_beyond_its_cancel_after_is_cancelled_and_keeps_its_last_checkpoint(
    service: Service, workers: Workers, dataset: Dataset
) -> None:
    request = {"dataset": dataset.id, "model": {"preset": "tiny"}, "training": {"steps": ENDLESS}}
    job = submission.submit_training(
        service, TrainingRequest.model_validate(request), submission.Terms(cancel_after=3_600)
    )

    def estimate() -> float:
        progress = service.jobs.get(job.id).progress
        return (progress and progress.estimated_finish_at) or 0

    until(lambda: estimate() > time.time(), f"{service.jobs.get(job.id)} has no estimated end")
    service.redis.zadd("flowpp:deadlines", {job.id: 1})  # as waiting would
    job = until_finished(service, job.id)
    assert statuses(service, job) == ["queued", "running", "cancelling", "cancelled"]
    last = service.events.page(job.id, limit=100_000).data[-1]
    assert last.data["message"] == "cancelled: its Cancel-After ran out"
    assert service.checkpoints.of_job(job.id)


def test_a_paused_job_holds_no_worker_and_goes_on_where_it_was(
    service: Service, workers: Workers, dataset: Dataset
) -> None:
    job, processes = caught(
        service, lambda: submit_training(service, dataset, steps=80), has_steps(service), workers.training_processes
    )
    service.jobs.pause(job.id)
    resume_when_told_to_end(processes)
    assert until_status(service, job.id, "paused", "succeeded").status == "paused"
    other = submit_training(service, dataset, steps=2, warmup_steps=0)
    assert until_finished(service, other.id).status == "succeeded"
    assert service.jobs.get(job.id).status == "paused"
    service.resume(job.id)
    job = until_finished(service, job.id)
    assert job.status == "succeeded", (job, workers.log("training"))
    assert job.attempt == 2
    with service.store.open(job.artifacts, "metrics.jsonl") as file:
        assert len(file.read().splitlines()) == 80
    assert [row["step"] for row in service.events.metrics(job.id)] == list(range(1, 81))


def test_a_job_of_two_processes_is_killed_tried_again_stopped_and_finished_like_one(
    service: Service, workers: Workers, dataset: Dataset
) -> None:
    job, processes = caught(
        service,
        lambda: submit_training(service, dataset, steps=60, num_processes=2),
        lambda job: service.checkpoints.of_job(job.id),
        workers.training_processes,
    )
    ranks = [process for process in processes if "torch.distributed.run" not in process.cmdline()]
    assert len(ranks) == 2
    ranks[-1].kill()
    resume(processes)
    until(lambda: service.jobs.get(job.id).attempt == 2, f"{service.jobs.get(job.id)} is not tried again")
    until(lambda: service.events.metrics(job.id)[-1]["step"] >= 30, f"{service.jobs.get(job.id)} does not go on")
    service.jobs.pause(job.id)
    if until_status(service, job.id, "paused", "succeeded").status == "paused":
        assert workers.training_processes() == []
        service.resume(job.id)
    job = until_finished(service, job.id)
    assert job.status == "succeeded", (job, workers.log("training"))
    assert [row["step"] for row in service.events.metrics(job.id)] == list(range(1, 61))
    assert workers.training_processes() == []


def test_a_damaged_dataset_fails_its_job_and_the_job_says_so(
    service: Service, workers: Workers, images: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", images)
    damaged = service.datasets.register(build_image_set(tmp_path / "images.npy", tmp_path / "set"))
    [file] = (Path(service.settings.store_url) / "datasets" / damaged.id).rglob("images.npy")
    file.write_bytes(file.read_bytes()[:-1])
    job = until_finished(service, submit_training(service, damaged).id)
    assert (job.status, job.attempt) == ("failed", 1)
    assert job.error is not None
    assert job.error.code == "bad_dataset"
    assert "images.npy" in job.error.message


def test_a_killed_training_process_is_tried_again_from_its_checkpoint(
    service: Service, workers: Workers, dataset: Dataset
) -> None:
    job, (process,) = caught(
        service,
        lambda: submit_training(service, dataset, steps=60),
        lambda job: service.checkpoints.of_job(job.id),
        workers.training_processes,
    )
    process.kill()
    job = until_finished(service, job.id)
    assert (job.status, job.attempt) == ("succeeded", 2), (job, workers.log("training"))
    assert [row["step"] for row in service.events.metrics(job.id)] == list(range(1, 61))


def test_a_worker_that_is_told_to_stop_puts_its_job_back_and_exits_0(
    service: Service, workers: Workers, dataset: Dataset
) -> None:
    job, processes = caught(
        service, lambda: submit_training(service, dataset, steps=100), has_steps(service), workers.training_processes
    )
    worker = workers.processes["training"]
    worker.send_signal(signal.SIGTERM)
    resume_when_told_to_end(processes)
    assert worker.wait(PATIENCE_SECONDS) == 0, workers.log("training")
    job = service.jobs.get(job.id)
    assert (job.status, job.failures) == ("queued", 0)
    assert workers.training_processes() == []
    assert service.checkpoints.of_job(job.id)
    workers.start("training")
    job = until_finished(service, job.id)
    assert (job.status, job.attempt) == ("succeeded", 2), (job, workers.log("training"))


def test_a_killed_worker_leaves_no_process_and_its_job_goes_on_elsewhere(
    service: Service, workers: Workers, dataset: Dataset
) -> None:
    job, _ = caught(
        service,
        lambda: submit_training(service, dataset, steps=60),
        lambda job: service.checkpoints.of_job(job.id),
        workers.training_processes,
    )
    worker = workers.processes["training"]
    worker.kill()
    worker.wait()
    until(lambda: workers.training_processes() == [], "the training process outlives its worker")
    workers.start("training")
    job = until_finished(service, job.id)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 2, 0), (job, workers.log("training"))
    assert [row["step"] for row in service.events.metrics(job.id)] == list(range(1, 61))


def test_workers_end_soon_though_redis_is_away(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        settings = Settings(redis_url=server.url, data_directory=tmp_path / "data")
        workers = Workers(settings)
        try:
            processes = [workers.start("training"), workers.start("inference")]
            with Service(settings) as service:
                until(lambda: count(service.redis, "training") == count(service.redis, "inference") == 1, "no workers")
            server.stop()
            time.sleep(1)
            for process in processes:
                process.terminate()
            assert [process.wait(60) for process in processes] == [0, 0]  # a container has a minute
        finally:
            workers.stop()
