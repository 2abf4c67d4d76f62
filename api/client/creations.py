"""Training, likelihood and sampling jobs, as they are created."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from api.client.calls import W, call
from api.client.files import sendable
from api.client.objects import Job
from api.client.transport import Part

Image = Path | tuple[str, bytes]
"""An image file: its path, or a name and its content."""


class _Creating(Part[W]):
    """Jobs of one kind, to create.

    `metadata`: names and values of your own, to find the job by. `wait`: up to 60 seconds for its end, else it is
    answered as it is. `cancel_after`: seconds, or 90s, 5m, 2h, 1h30m, after which it is cancelled where it has not
    finished.
    """

    async def _create(
        self,
        path: str,
        body: Mapping[str, Any],
        metadata: Mapping[str, str] | None,
        wait: int,
        cancel_after: int | str | None,
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
        cancel_after: int | str | None = None,
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
        cancel_after: int | str | None = None,
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
        cancel_after: int | str | None = None,
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
        cancel_after: int | str | None = None,
    ) -> Job:
        """`num_samples` images on the way from the first of two image files to the second, both included."""
        body = {"model": model, "num_samples": num_samples}
        return await self._create("/v1/sampling-jobs", body, metadata, wait, cancel_after, images)


def _read(image: Image) -> tuple[str, bytes]:
    name, content = (image.name, image.read_bytes()) if isinstance(image, Path) else image
    return sendable(name), content
