"""What an inference job computes: rows, of which a batch may hold several jobs', and files made of them."""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowpp.data import content_sha256
from flowpp.likelihood import Likelihood, bits_maps, estimate
from flowpp.model import FlowPP
from flowpp.sampling import (
    encode,
    images_of_latents,
    interpolate,
    latent_of_seed,
    latents_of_ends,
    write_arrays,
    write_bits_map,
    write_samples,
)
from flowpp.seeds import seed_of
from worker.jobs import Job
from worker.pace import Pace
from worker.record_images import from_record
from worker.service import Service

MOST_IN_RECORD = 32
"""Images whose own figures a job's result holds; those of more are in likelihood.csv."""


class Work(ABC):
    """One claimed job. Jobs of the same group can be computed together, row by row."""

    def __init__(self, service: Service, job: Job) -> None:
        self.job = job
        self.count: int = job.plan["num_images"]
        self.seed: int = job.request["seed"]
        self.rows: list[Any] = [None] * self.count
        self.begun = 0
        self.done = 0
        self.pace = Pace(self.count)
        self.cold_start_seconds = 0.0

    @property
    def samples(self) -> int:
        """Rows of a forward pass that one row of the work is."""
        return int(self.job.request.get("importance_samples", 1))

    @property
    def left(self) -> int:
        """Rows that no batch has taken."""
        return self.count - self.begun

    @property
    def size(self) -> int:
        """Rows of a forward pass that they are."""
        return self.left * self.samples

    @property
    def finished(self) -> bool:
        return self.done == self.count

    def take(self, computed: Sequence[tuple[int, Any]]) -> None:
        """Rows by their index, as they come from a batch."""
        for index, row in computed:
            self.rows[index] = row
        self.done += len(computed)

    @property
    def leaves_files(self) -> bool:
        """Whether it leaves files."""
        return True

    @staticmethod
    @abstractmethod
    def compute(model: FlowPP, rows: Sequence[tuple["Work", int]], batch_size: int) -> np.ndarray:
        """The results of rows (work, index), in their order."""

    @abstractmethod
    def result(self, model: FlowPP) -> dict[str, Any]:
        """The job's result, of finished work. Raises `NotFinite` if a number of it is NaN or infinite."""

    @abstractmethod
    def write(self, model: FlowPP, directory: Path) -> None:
        """Writes the files of finished work."""


class LikelihoodWork(Work):
    """Estimates of log P, float64 [6] an image."""

    def __init__(self, service: Service, job: Job) -> None:
        super().__init__(service, job)
        self.importance_samples: int = job.request["importance_samples"]
        if "dataset" in job.request:
            image_set = service.datasets.open(job.request["dataset"])
            self.images = image_set.validation if image_set.num_validation else image_set.images
            self.names = [f"{index:06d}" for index in range(len(self.images))]
            self.sha256 = image_set.sha256
        else:
            self.images, self.names = _images_sent(service, job)
            self.sha256 = content_sha256(self.images)

    @property
    def leaves_files(self) -> bool:
        """None for a few images sent: their figures are all in the result."""
        asked = self.job.request.get("bits_map") or self.job.request.get("latents") or "dataset" in self.job.request
        return bool(asked) or self.count > MOST_IN_RECORD

    @staticmethod
    def compute(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        """float64 [b, 6]."""
        works = [(work, index) for work, index in rows if isinstance(work, LikelihoodWork)]
        images = np.stack([work.images[index] for work, index in works])
        seeds = [seed_of(work.seed, index) for work, index in works]
        return estimate(model, images, seeds, works[0][0].importance_samples, batch_size)

    def result(self, model: FlowPP) -> dict[str, Any]:
        scored = self._scored(model)
        scored.check_finite()
        result = scored.summary() | {"checkpoint": self.job.plan["checkpoint"]}
        if self.count <= MOST_IN_RECORD:
            result["images"] = list(scored.rows(self.names))
        return result

    def write(self, model: FlowPP, directory: Path) -> None:
        scored = self._scored(model)
        scored.check_finite()
        scored.write(directory, self.names)
        if self.job.request.get("bits_map"):
            maps = np.concatenate(list(bits_maps(model, self.images, self.seed)))
            write_bits_map(directory, self.images, maps, self.names)
        if self.job.request.get("latents"):
            latents = np.concatenate(list(encode(model, self.images, self.seed)))
            write_arrays(directory / "latents.npz", latents=latents, names=np.array(self.names))

    def _scored(self, model: FlowPP) -> Likelihood:
        return Likelihood(
            np.stack(self.rows),
            model.config.dimensions,
            self.importance_samples,
            self.seed,
            model.checkpoint_sha256,
            self.sha256,
        )


class SamplingWork(Work):
    """Samples, or images on the way between two; uint8 [H, W, C] each."""

    def __init__(self, service: Service, job: Job) -> None:
        super().__init__(service, job)
        self.ends: np.ndarray | None = None
        self._latents_of_ends: tuple[torch.Tensor, torch.Tensor] | None = None
        if between := job.request.get("between"):
            self.ends = service.datasets.open(between["dataset"]).images[list(between["images"])]
        elif job.plan.get("between_images_sent"):
            self.ends, _ = _images_sent(service, job)

    @staticmethod
    def compute(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        """uint8 [b, H, W, C]."""
        latents = [work.latent(model, index) for work, index in rows if isinstance(work, SamplingWork)]
        return images_of_latents(model, torch.cat(latents))

    def latent(self, model: FlowPP, index: int) -> torch.Tensor:
        """Of one row, [1, *latent_shape]."""
        if self.ends is None:
            return self.job.request["temperature"] * latent_of_seed(model, seed_of(self.seed, index))
        if self._latents_of_ends is None:
            self._latents_of_ends = latents_of_ends(model, self.ends, self.seed)
        return interpolate(*self._latents_of_ends, index / (self.count - 1))

    def write(self, model: FlowPP, directory: Path) -> None:
        write_samples(directory, np.stack(self.rows))

    def result(self, model: FlowPP) -> dict[str, Any]:
        return {
            "num_samples": self.count,
            "temperature": self.job.request["temperature"],
            "seed": self.seed,
            "checkpoint": self.job.plan["checkpoint"],
            "checkpoint_sha256": model.checkpoint_sha256,
        }


def _images_sent(service: Service, job: Job) -> tuple[np.ndarray, list[str]]:
    """Images, uint8 [N, H, W, C], that came with the request, and their names."""
    if "images" in job.plan:
        return from_record(job.plan["images"])
    with np.load(io.BytesIO(service.store.read(f"jobs/{job.id}/input", "images.npz")), allow_pickle=False) as stored:
        return stored["images"], stored["names"].tolist()


WORK: dict[str, type[Work]] = {"likelihood": LikelihoodWork, "sampling": SamplingWork}
