"""What the service holds, and what can be done with each: every call once, for both clients (api.client.calls)."""

import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import EventSource

from api.client.calls import Resource, W, call, each
from api.client.errors import ProblemError
from api.client.files import Report, as_file, counted, download, unpack
from api.client.objects import Artifact, Attempt, Checkpoint, Dataset, Event, Job, Metrics, Preset
from api.client.transport import CONNECT_SECONDS, Transport

RECONNECT_SECONDS = 30  # longer than the API takes to be started anew
HEARTBEAT_SECONDS = 60  # the stream is dead after so long without a byte; heartbeats come more often
INTAKE_SECONDS = 600  # the service decodes all images of an upload before it answers

Image = Path | tuple[str, bytes]
"""An image file: its path, or a name and its content."""


class _Part(Resource[W]):
    def __init__(self, way: W, transport: Transport) -> None:
        self.way = way
        self._transport = transport


class Datasets(_Part[W]):
    @call
    async def upload(self, source: Path, progress: Report | None = None) -> Dataset:
        """Uploads an archive of images, an .npy or .npz file, an image, or a folder of images (as a zip)."""
        with ExitStack() as opened:
            name, file = await self.way.run(partial(opened.enter_context, as_file(source)))
            files = [("file", (name, counted(file, progress)))]
            return await self._transport.create(Dataset, "/v1/datasets", files=files, timeout=INTAKE_SECONDS)

    @call
    async def get(self, dataset_id: str) -> Dataset:
        return await self._transport.get(Dataset, f"/v1/datasets/{dataset_id}")

    @each
    def list(self) -> AsyncIterator[Dataset]:
        """Newest first."""
        return self._transport.pages(Dataset, "/v1/datasets", {})

    @call
    async def delete(self, dataset_id: str) -> None:
        await self._transport.request("DELETE", f"/v1/datasets/{dataset_id}")


class _Creating(_Part[W]):
    """Jobs of one kind, to create.

    `metadata`: names and values of your own, to find the job by. `wait`: up to 60 seconds for its end, else it is
    answered as it is. `cancel_after`: seconds, after which it is cancelled where it has not finished.
    """

    async def _create(
        self,
        path: str,
        body: Mapping[str, Any],
        metadata: Mapping[str, str] | None,
        wait: int,
        cancel_after: int | None,
        images: Sequence[Image] = (),
    ) -> Job:
        fields = {name: value for name, value in body.items() if value is not None}
        headers = {"Prefer": f"wait={wait}"} if wait else {}
        if cancel_after is not None:
            headers["Cancel-After"] = str(cancel_after)
        if not images:
            content: dict[str, Any] = {"json": {**fields, "metadata": dict(metadata or {})}}
        else:
            data = {name: str(value) for name, value in fields.items()}
            data |= {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
            content = {"data": data, "files": [("files", await self.way.run(partial(_read, each))) for each in images]}
        return await self._transport.create(Job, path, headers=headers, timeout=wait, **content)


class TrainingJobs(_Creating[W]):
    @call
    async def create(
        self,
        *,
        dataset: str,
        model: Mapping[str, Any],
        training: Mapping[str, Any] | None = None,
        resume_from: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait: int = 0,
        cancel_after: int | None = None,
    ) -> Job:
        """`model` is a preset and what to change of it: {"preset": "small", "filters": 48}.

        `resume_from` is a warm start: a checkpoint's or training job's id, whose weights the training begins with.
        """
        body = {
            "dataset": dataset,
            "model": dict(model),
            "training": dict(training or {}),
            "resume_from": resume_from,
        }
        return await self._create("/v1/training-jobs", body, metadata, wait, cancel_after)


class LikelihoodJobs(_Creating[W]):
    @call
    async def create(
        self,
        *,
        model: str,
        dataset: str | None = None,
        images: Sequence[Image] = (),
        importance_samples: int = 1,
        bits_map: bool = False,
        latents: bool = False,
        seed: int = 0,
        metadata: Mapping[str, str] | None = None,
        wait: int = 0,
        cancel_after: int | None = None,
    ) -> Job:
        """Bits/dim of a dataset's validation images, or of image files.

        `bits_map` and `latents` ask for artifacts of these names.
        """
        body = {
            "model": model,
            "dataset": dataset,
            "importance_samples": importance_samples,
            "bits_map": bits_map,
            "latents": latents,
            "seed": seed,
        }
        return await self._create("/v1/likelihood-jobs", body, metadata, wait, cancel_after, images)


class SamplingJobs(_Creating[W]):
    @call
    async def create(
        self,
        *,
        model: str,
        num_samples: int = 16,
        temperature: float = 1,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        wait: int = 0,
        cancel_after: int | None = None,
    ) -> Job:
        body = {"model": model, "num_samples": num_samples, "temperature": temperature, "seed": seed}
        return await self._create("/v1/sampling-jobs", body, metadata, wait, cancel_after)

    @call
    async def interpolate(
        self,
        *,
        model: str,
        images: Sequence[Image],
        num_samples: int = 9,
        metadata: Mapping[str, str] | None = None,
        wait: int = 0,
        cancel_after: int | None = None,
    ) -> Job:
        """`num_samples` images on the way from the first of two image files to the second, both included."""
        body = {"model": model, "num_samples": num_samples}
        return await self._create("/v1/sampling-jobs", body, metadata, wait, cancel_after, images)


def _read(image: Image) -> tuple[str, bytes]:
    return (image.name, image.read_bytes()) if isinstance(image, Path) else image


class _Absence:
    """The service's, which we bear for as long as its restart takes, if we have known it at all."""

    def __init__(self) -> None:
        self._known = False
        self._since: float | None = None

    def over(self) -> None:
        self._known, self._since = True, None

    def bear(self, error: httpx.TransportError | ProblemError) -> None:
        """Raises what is no absence, or a long one."""
        refused = isinstance(error, ProblemError) and error.status != 503
        self._since = self._since or time.monotonic()
        if refused or not self._known or time.monotonic() > self._since + RECONNECT_SECONDS:
            raise error


class Jobs(_Part[W]):
    """Jobs of every kind."""

    @call
    async def get(self, job_id: str) -> Job:
        return await self._transport.get(Job, f"/v1/jobs/{job_id}")

    @each
    def list(
        self, type: str | None = None, status: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> AsyncIterator[Job]:
        """Newest first: all, or those of a type, in a state, with this metadata."""
        query = {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        return self._transport.pages(Job, "/v1/jobs", {"type": type, "status": status, **query})

    @call
    async def cancel(self, job_id: str) -> Job:
        return await self._transport.post(Job, f"/v1/jobs/{job_id}/cancel")

    @call
    async def pause(self, job_id: str) -> Job:
        """A training job writes a checkpoint and frees its worker."""
        return await self._transport.post(Job, f"/v1/jobs/{job_id}/pause")

    @call
    async def resume(self, job_id: str) -> Job:
        """A paused job goes on from its last checkpoint."""
        return await self._transport.post(Job, f"/v1/jobs/{job_id}/resume")

    @call
    async def delete(self, job_id: str) -> None:
        """With its checkpoints and artifacts; one that runs is cancelled, and gone a few seconds after it has ended."""
        await self._transport.request("DELETE", f"/v1/jobs/{job_id}")

    @call
    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job when it has finished. Raises `TimeoutError` after `timeout` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        absence, pause = _Absence(), 0.05
        while True:
            try:
                job = await self._transport.get(Job, f"/v1/jobs/{job_id}")
                absence.over()
                if job.finished:
                    return job
                if time.monotonic() > deadline:
                    raise TimeoutError(f"job {job_id} is still {job.status} after {timeout:g} s")
            except (httpx.TransportError, ProblemError) as error:
                absence.bear(error)
            await self.way.sleep(pause)
            pause = min(1, 1.5 * pause)

    @each
    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[Event]:
        """Each event once, from the first (or from behind event `after`), live, until the job has finished.

        A broken stream is taken up where it broke; one that stays broken raises `httpx.TransportError`.
        """
        absence = _Absence()
        while True:
            try:
                async for event in self._stream(job_id, after):
                    absence.over()
                    yield event
                    if event.terminal:
                        return
                    after = event.id
                if (await self._transport.get(Job, f"/v1/jobs/{job_id}")).finished:  # it had before `after`
                    return
                absence.over()
            except (httpx.TransportError, ProblemError) as error:
                absence.bear(error)
            await self.way.sleep(0.5)

    async def _stream(self, job_id: str, after: str | None) -> AsyncIterator[Event]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if after is not None:
            headers["Last-Event-ID"] = after
        timeout = httpx.Timeout(HEARTBEAT_SECONDS, connect=CONNECT_SECONDS)
        path = f"/v1/jobs/{job_id}/events"
        async with self._transport.stream("GET", path, headers=headers, timeout=timeout) as response:
            async for message in EventSource(response).aiter_sse():
                if message.data:  # else a heartbeat
                    yield Event.model_validate_json(message.data)

    @call
    async def metrics(self, job_id: str) -> Metrics:
        """A training job's, so far."""
        return await self._transport.get(Metrics, f"/v1/jobs/{job_id}/metrics")

    @call
    async def logs(self, job_id: str) -> str:
        """A training job's log lines, so far."""
        return (await self._transport.request("GET", f"/v1/jobs/{job_id}/logs")).text

    @call
    async def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        """Oldest first."""
        return await _all(self._transport, Attempt, f"/v1/jobs/{job_id}/attempts")

    @call
    async def artifacts(self, job_id: str) -> tuple[Artifact, ...]:
        return await _all(self._transport, Artifact, f"/v1/jobs/{job_id}/artifacts")

    @call
    async def download(self, job_id: str, name: str, target: Path, progress: Report | None = None) -> Path:
        """Downloads an artifact to the file `target`, whole or not at all, and goes on with what an earlier try left.

        Raises `DamagedDownload`.
        """
        return await download(self._transport, f"/v1/jobs/{job_id}/artifacts/{name}", target, progress)


class Checkpoints(_Part[W]):
    @call
    async def get(self, checkpoint_id: str) -> Checkpoint:
        return await self._transport.get(Checkpoint, f"/v1/checkpoints/{checkpoint_id}")

    @each
    def list(self, job: str | None = None) -> AsyncIterator[Checkpoint]:
        """Newest first: all, or those of a training job."""
        return self._transport.pages(Checkpoint, "/v1/checkpoints", {"job": job})

    @call
    async def upload(self, source: Path, preset: str, progress: Report | None = None) -> Checkpoint:
        """Imports the authors' .npz file of a preset's weights."""
        with source.open("rb") as file:
            files = [("file", (source.name, counted(file, progress)))]
            return await self._transport.create(
                Checkpoint, "/v1/checkpoints", data={"preset": preset}, files=files, timeout=INTAKE_SECONDS
            )

    @call
    async def download(self, checkpoint_id: str, target: Path, progress: Report | None = None) -> Path:
        """Downloads the checkpoint as a zip to the file `target`, and goes on with what an earlier try left."""
        return await download(self._transport, f"/v1/checkpoints/{checkpoint_id}/download", target, progress)

    @call
    async def fetch(self, checkpoint_id: str, directory: Path, progress: Report | None = None) -> Path:
        """Downloads the checkpoint to the new `directory`, which `flowpp.FlowPP.load` reads.

        Raises `FileExistsError` and `DamagedDownload`.
        """
        if directory.exists():
            raise FileExistsError(f"{directory} exists already; a checkpoint is unpacked into a new directory")
        archive = directory.with_name(f"{directory.name}.zip")
        await download(self._transport, f"/v1/checkpoints/{checkpoint_id}/download", archive, progress)
        try:
            await self.way.run(partial(unpack, archive, directory))
        finally:
            archive.unlink()
        return directory

    @call
    async def delete(self, checkpoint_id: str) -> None:
        await self._transport.request("DELETE", f"/v1/checkpoints/{checkpoint_id}")


class Presets(_Part[W]):
    @each
    def list(self) -> AsyncIterator[Preset]:
        return self._transport.pages(Preset, "/v1/presets", {})


async def _all(transport: Transport, kind: type[Any], path: str) -> tuple[Any, ...]:
    return tuple([found async for found in transport.pages(kind, path, {})])
