"""Datasets: image sets in the artifact store, each with a record in Redis."""

import math
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from redis import Redis

from flowpp.config import Shape
from flowpp.data import IMAGES, ImageSet
from worker.artifacts import ArtifactStore, DamagedArtifact, delete_directory, no_check
from worker.owners import LOCAL, index_of
from worker.paging import Order, Page, read_page
from worker.refusals import Conflict, NotFound, not_found
from worker.transitions import Transitions

_IMAGES = "image_set"  # the image set's directory within the stored one, since both have a manifest.json


class Dataset(BaseModel):
    """What is known of a dataset; its images are in the store."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["dataset"] = "dataset"
    owner: str = Field(LOCAL, description="Whose key sent it.")
    created_at: float = Field(description="Unix seconds.")
    name: str | None = Field(None, description="The uploaded file's.")
    num_images: int = Field(description="Training, validation and test images.")
    num_validation: int = Field(description="Images that validate a training and choose its best checkpoint.")
    num_test: int = Field(0, description="Images that no training uses.")
    shape: Shape = Field(description="Channels, height, width.")
    bytes: int = Field(description="In the store.")
    sha256: str = Field(description="Of the pixels, whatever files they came from.")

    @property
    def num_training(self) -> int:
        """Training images."""
        return self.num_images - self.num_validation - self.num_test


class Datasets:
    """The datasets of one Redis server and store. Copies of remote ones are kept below `cache`."""

    def __init__(self, redis: Redis, store: ArtifactStore, cache: Path) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._store = store
        self._cache = cache
        self._scripts = Transitions(redis)

    def register(self, image_set: ImageSet, name: str | None = None, owner: str = LOCAL, claim: str = "") -> Dataset:
        """Stores an image set, whose directory is not needed any more then, and notes it for an idempotency key."""
        dataset = Dataset(
            owner=owner,
            id=f"ds_{secrets.token_hex(12)}",
            created_at=time.time(),
            name=name,
            num_images=image_set.num_images,
            num_validation=image_set.num_validation,
            num_test=image_set.num_test,
            shape=image_set.shape,
            bytes=image_set.images.nbytes,
            sha256=image_set.sha256,
        )
        try:
            self._store.put(
                f"datasets/{dataset.id}", image_set.directory, dataset.model_dump(mode="json"), below=_IMAGES
            )
            self._scripts.register("dataset", dataset.id, dataset.model_dump_json(), claim=claim)
        except BaseException:
            self._store.delete(f"datasets/{dataset.id}")
            raise
        return dataset

    def same(self, image_set: ImageSet, owner: str = LOCAL, claim: str = "") -> Dataset | None:
        """Returns the dataset of `owner` with the content of an image set, or None if there is none that is whole.

        The content is shape, split and pixels. The dataset is noted for an idempotency key. Raises `StoreUnavailable`.
        """
        dataset_id = self._redis.hget(f"flowpp:contents:{owner}", image_set.sha256)
        found = self._load([dataset_id]) if dataset_id else []
        if not found:
            return None
        try:
            self._store.verify(f"datasets/{dataset_id}")  # an upload of the same images replaces a damaged dataset
        except (NotFound, DamagedArtifact):
            return None
        return found[0] if self._scripts.reuse("dataset", dataset_id, claim) else None

    def get(self, dataset_id: str, owner: str | None = None) -> Dataset:
        """Raises `NotFound`, also for what is not of `owner`, if one is given."""
        found = self._load([dataset_id])
        if not found or owner not in (None, found[0].owner):
            raise not_found("dataset", dataset_id)
        return found[0]

    def page(
        self, *, after: str | None = None, limit: int = 20, order: Order = "desc", owner: str | None = None
    ) -> Page[Dataset]:
        """By creation, everybody's or those of `owner`. Raises `NotFound` where there is no dataset `after`."""
        try:
            return read_page(
                self._redis, index_of("datasets", owner), self._load, after=after, limit=limit, order=order
            )
        except KeyError as error:
            raise not_found("dataset", str(after)) from error

    def delete(self, dataset_id: str) -> None:
        """Raises `NotFound`, and `Conflict` while a job that has not finished uses it."""
        answer = self._scripts.unregister("dataset", dataset_id)
        if answer == "missing":
            raise not_found("dataset", dataset_id)
        if answer == "in_use":
            raise Conflict("in_use", f"dataset {dataset_id} is used by a job that has not finished")
        self._store.delete(f"datasets/{dataset_id}")
        delete_directory(self._cache / "datasets" / dataset_id)  # other machines' copies go with `flowpp gc`

    def open(self, dataset_id: str, check: Callable[[], None] = no_check) -> ImageSet:
        """The images, on this machine. Raises `NotFound`, `DamagedArtifact` and `flowpp.data.BadImages`.

        As `ArtifactStore.copy` it calls `check`.
        """
        return ImageSet.open(self._store.fetch(f"datasets/{dataset_id}", self._cache, check) / _IMAGES)

    def some(self, dataset: Dataset, most: int) -> np.ndarray:
        """Up to `most` images, evenly spread, uint8 [n, H, W, C]: of a remote store no more is fetched than these.

        They are not verified. Raises `NotFound` and `DamagedArtifact`.
        """
        channels, height, width = dataset.shape
        count, size = dataset.num_images, math.prod(dataset.shape)
        n = min(most, count)
        places = [(count - index * count // n) * size for index in range(n)]
        images = self._store.parts(f"datasets/{dataset.id}", f"{_IMAGES}/{IMAGES}", places, size)
        return np.frombuffer(b"".join(images), np.uint8).reshape(n, height, width, channels)

    def _load(self, ids: Sequence[str]) -> list[Dataset]:
        records = self._redis.mget([f"flowpp:dataset:{dataset_id}" for dataset_id in ids])
        return [Dataset.model_validate_json(record) for record in records if record]
