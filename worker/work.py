"""What an inference job computes: rows, of which a batch may hold several jobs', and files made of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowpp.likelihood import Likelihood, log_likelihood
from flowpp.model import FlowPP
from flowpp.sampling import sample_of_seeds, write_samples
from flowpp.seeds import seed_of
from worker.jobs import Job
from worker.service import Service

MOST_IN_RECORD = 32
"""Images whose own figures a job's result holds; those of more are in likelihood.csv."""


class Work(ABC):
    """One claimed job. Jobs of the same group can be computed together, row by row."""

    def __init__(self, service: Service, job: Job) -> None:
        self.job = job
        self.count: int = job.plan["num_images"]
        self.seed: int = job.request["seed"]
        self.rows: list[Any] = []

    @staticmethod
    @abstractmethod
    def compute(model: FlowPP, rows: Sequence[tuple["Work", int]], batch_size: int) -> np.ndarray:
        """The results of rows (work, index), in their order."""

    @abstractmethod
    def write(self, model: FlowPP, directory: Path) -> dict[str, Any]:
        """Writes the files of the finished work; the job's result."""


class LikelihoodWork(Work):
    """log P of each image, in nats."""

    def __init__(self, service: Service, job: Job) -> None:
        super().__init__(service, job)
        self.importance_samples: int = job.request["importance_samples"]
        if "dataset" in job.request:
            image_set = service.datasets.open(job.request["dataset"])
            self.images = image_set.validation if image_set.num_validation else image_set.images
            self.names = [f"{index:06d}" for index in range(len(self.images))]
        else:
            with service.store.open(f"jobs/{job.id}/input", "images.npz") as file:
                stored = np.load(file, allow_pickle=False)
                self.images, self.names = stored["images"], stored["names"].tolist()

    @staticmethod
    def compute(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        """float64 [b]."""
        works = [(work, index) for work, index in rows if isinstance(work, LikelihoodWork)]
        images = np.stack([work.images[index] for work, index in works])
        seeds = [seed_of(work.seed, index) for work, index in works]
        return log_likelihood(model, images, seeds, works[0][0].importance_samples, batch_size)

    def write(self, model: FlowPP, directory: Path) -> dict[str, Any]:
        scored = Likelihood(np.array(self.rows), model.config.dimensions, self.importance_samples, self.seed)
        scored.write(directory, self.names)
        result = scored.summary() | {"checkpoint": self.job.plan["checkpoint"]}
        if self.count <= MOST_IN_RECORD:
            figures = zip(self.names, scored.log_prob.tolist(), scored.bits_per_dim.tolist(), strict=True)
            result["images"] = [
                {"name": name, "log_likelihood": log_prob, "bits_per_dim": bits} for name, log_prob, bits in figures
            ]
        return result


class SamplingWork(Work):
    """Samples, uint8 [H, W, C] each."""

    @staticmethod
    def compute(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        """uint8 [b, H, W, C]."""
        seeds = [seed_of(work.seed, index) for work, index in rows]
        return sample_of_seeds(model, seeds, rows[0][0].job.request["temperature"])

    def write(self, model: FlowPP, directory: Path) -> dict[str, Any]:
        write_samples(directory, np.stack(self.rows))
        return {
            "num_samples": self.count,
            "temperature": self.job.request["temperature"],
            "seed": self.seed,
            "checkpoint": self.job.plan["checkpoint"],
        }


WORK: dict[str, type[Work]] = {"likelihood": LikelihoodWork, "sampling": SamplingWork}
