"""The Python client of the HTTP service.

    with Client("http://127.0.0.1:8000") as flowpp:
        dataset = flowpp.datasets.upload(Path("photographs.zip"))
        job = flowpp.training_jobs.create(dataset=dataset.id, model={"preset": "small"})
        for event in flowpp.jobs.events(job.id):
            print(event.type, event.data)

Raised: `ProblemError` when the service refuses, `httpx.TransportError` when it cannot be reached.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
from httpx_sse import connect_sse
from pydantic import BaseModel, ConfigDict

from api.transport import Counted, ProblemError, Progress, Transport, as_file, checked

__all__ = ["Checkpoint", "Client", "Dataset", "Event", "Job", "ProblemError"]

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
RECONNECT_SECONDS = 30  # longer than the API takes to be started anew
HEARTBEAT_SECONDS = 60  # the stream is dead after so long without a byte; heartbeats come more often


class Resource(BaseModel):
    """What the service answers. Fields of newer services than this client are kept, as attributes."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    id: str
    object: str
    created_at: float


class Dataset(Resource):
    num_images: int
    num_validation: int
    shape: tuple[int, int, int]
    """Channels, height, width."""
    sha256: str


class JobError(BaseModel):
    code: str
    message: str


class Job(Resource):
    type: str
    status: str
    started_at: float | None = None
    finished_at: float | None = None
    attempt: int = 0
    request: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    progress: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    error: JobError | None = None

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL


class Event(BaseModel):
    """One entry of a job's stream; type is status, metrics, log, checkpoint or warning."""

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    type: str
    created_at: float
    data: dict[str, Any]

    @property
    def terminal(self) -> bool:
        return self.type == "status" and self.data.get("status") in TERMINAL


class Checkpoint(Resource):
    step: int
    images_seen: int


class Artifact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    name: str


class Datasets:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(self, source: Path, progress: Progress | None = None) -> Dataset:
        """Uploads an archive of images, an .npy or .npz file, an image, or a folder of images (as a zip)."""
        with as_file(source) as (name, file):
            body = Counted(file, progress) if progress is not None else file
            # the service decodes all images before it answers
            return self._transport.post(Dataset, "/v1/datasets", files={"file": (name, body)}, timeout=600)

    def get(self, dataset_id: str) -> Dataset:
        return self._transport.get(Dataset, f"/v1/datasets/{dataset_id}")

    def list(self) -> Iterator[Dataset]:
        return self._transport.pages(Dataset, "/v1/datasets", {})

    def delete(self, dataset_id: str) -> None:
        self._transport.request("DELETE", f"/v1/datasets/{dataset_id}")


class TrainingJobs:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        *,
        dataset: str,
        model: Mapping[str, Any],
        training: Mapping[str, Any] | None = None,
        resume_from: str | None = None,
    ) -> Job:
        """`model` is a preset and what to change of it: {"preset": "small", "filters": 48}.

        `resume_from` is a warm start: a checkpoint's or training job's id, whose weights the training begins with.
        """
        body: dict[str, Any] = {"dataset": dataset, "model": dict(model), "training": dict(training or {})}
        if resume_from is not None:
            body["resume_from"] = resume_from
        return self._transport.post(Job, "/v1/training-jobs", json=body)


class LikelihoodJobs:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        *,
        model: str,
        dataset: str | None = None,
        images: Sequence[Path | tuple[str, bytes]] = (),
        importance_samples: int = 1,
        bits_map: bool = False,
        latents: bool = False,
        seed: int = 0,
    ) -> Job:
        """Bits/dim of a dataset's validation images, or of image files (paths, or names with contents).

        `bits_map` and `latents` ask for artifacts of these names.
        """
        body = {
            "model": model,
            "importance_samples": importance_samples,
            "bits_map": bits_map,
            "latents": latents,
            "seed": seed,
        }
        if dataset is not None:
            return self._transport.post(Job, "/v1/likelihood-jobs", json={**body, "dataset": dataset})
        form = {name: str(value) for name, value in body.items()}
        return self._transport.post(Job, "/v1/likelihood-jobs", data=form, files=_image_files(images))


class SamplingJobs:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, *, model: str, num_samples: int = 16, temperature: float = 1, seed: int | None = None) -> Job:
        body = {"model": model, "num_samples": num_samples, "temperature": temperature, "seed": seed}
        return self._transport.post(Job, "/v1/sampling-jobs", json={k: v for k, v in body.items() if v is not None})

    def interpolate(self, *, model: str, images: Sequence[Path | tuple[str, bytes]], num_samples: int = 9) -> Job:
        """`num_samples` images on the way from the first of two image files to the second, both included."""
        form = {"model": model, "num_samples": str(num_samples)}
        return self._transport.post(Job, "/v1/sampling-jobs", data=form, files=_image_files(images))


def _image_files(images: Sequence[Path | tuple[str, bytes]]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (image.name, image.read_bytes()) if isinstance(image, Path) else image) for image in images]


class Jobs:
    """Jobs of every kind."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get(self, job_id: str) -> Job:
        return self._transport.get(Job, f"/v1/jobs/{job_id}")

    def list(self, type: str | None = None, status: str | None = None) -> Iterator[Job]:
        """Newest first."""
        return self._transport.pages(Job, "/v1/jobs", {"type": type, "status": status})

    def cancel(self, job_id: str) -> Job:
        return self._transport.post(Job, f"/v1/jobs/{job_id}/cancel")

    def pause(self, job_id: str) -> Job:
        """A training job writes a checkpoint and frees its worker."""
        return self._transport.post(Job, f"/v1/jobs/{job_id}/pause")

    def resume(self, job_id: str) -> Job:
        """A paused job goes on from its last checkpoint."""
        return self._transport.post(Job, f"/v1/jobs/{job_id}/resume")

    def delete(self, job_id: str) -> None:
        """With its checkpoints and artifacts; one that runs is cancelled, and gone a few seconds after it has ended."""
        self._transport.request("DELETE", f"/v1/jobs/{job_id}")

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job when it has finished. Raises `TimeoutError` after `timeout` seconds."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        pause = 0.05
        while not (job := self.get(job_id)).finished:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is still {job.status} after {timeout:g} s")
            time.sleep(pause)
            pause = min(1, 1.5 * pause)
        return job

    def events(self, job_id: str, after: str | None = None) -> Iterator[Event]:
        """Each event once, from the first (or from behind event `after`), live, until the job has finished.

        A broken stream is taken up where it broke; one that stays broken raises `httpx.TransportError`.
        """
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                for event in self._stream(job_id, after):
                    yield event
                    if event.terminal:
                        return
                    after = event.id
                    deadline = time.monotonic() + RECONNECT_SECONDS
                if self.get(job_id).finished:  # it had before `after`
                    return
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def artifacts(self, job_id: str) -> tuple[Artifact, ...]:
        return tuple(self._transport.pages(Artifact, f"/v1/jobs/{job_id}/artifacts", {}))

    def download(self, job_id: str, name: str, target: Path, progress: Progress | None = None) -> Path:
        """Downloads an artifact to the file `target`."""
        return self._transport.download(f"/v1/jobs/{job_id}/artifacts/{name}", target, progress)

    def _stream(self, job_id: str, after: str | None) -> Iterator[Event]:
        headers = {} if after is None else {"Last-Event-ID": after}
        timeout = httpx.Timeout(HEARTBEAT_SECONDS, connect=10)
        path = f"/v1/jobs/{job_id}/events"
        with connect_sse(self._transport.http, "GET", path, headers=headers, timeout=timeout) as source:
            checked(source.response)
            for message in source.iter_sse():
                if not message.data:  # a heartbeat
                    continue
                yield Event.model_validate_json(message.data)


class Checkpoints:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get(self, checkpoint_id: str) -> Checkpoint:
        return self._transport.get(Checkpoint, f"/v1/checkpoints/{checkpoint_id}")

    def list(self) -> Iterator[Checkpoint]:
        """Newest first."""
        return self._transport.pages(Checkpoint, "/v1/checkpoints", {})

    def upload(self, source: Path, preset: str, progress: Progress | None = None) -> Checkpoint:
        """Imports the authors' .npz file of a preset's weights."""
        with source.open("rb") as file:
            body = Counted(file, progress) if progress is not None else file
            files = {"file": (source.name, body)}
            return self._transport.post(
                Checkpoint, "/v1/checkpoints", data={"preset": preset}, files=files, timeout=600
            )

    def download(self, checkpoint_id: str, target: Path, progress: Progress | None = None) -> Path:
        return self._transport.download(f"/v1/checkpoints/{checkpoint_id}/download", target, progress)


class Client:
    """A service at `base_url`. A context manager, or call `close`."""

    def __init__(self, base_url: str) -> None:
        self._transport = Transport(base_url)
        self.datasets = Datasets(self._transport)
        self.training_jobs = TrainingJobs(self._transport)
        self.likelihood_jobs = LikelihoodJobs(self._transport)
        self.sampling_jobs = SamplingJobs(self._transport)
        self.jobs = Jobs(self._transport)
        self.checkpoints = Checkpoints(self._transport)

    def close(self) -> None:
        self._transport.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
