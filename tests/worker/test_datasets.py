"""Datasets: stored whole, found by id, kept while a job needs them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.worker.conftest import Submit
from worker.artifacts import DamagedArtifact
from worker.datasets import Dataset
from worker.refusals import Conflict, NotFound
from worker.service import Service


def test_a_registered_dataset_opens_as_it_was(service: Service, dataset: Dataset, tmp_path: Path) -> None:
    assert service.datasets.get(dataset.id) == dataset
    assert (dataset.num_images, dataset.num_validation, dataset.shape, dataset.bytes) == (40, 4, (3, 8, 8), 7680)
    opened = service.datasets.open(dataset.id)
    opened.verify()
    assert opened.sha256 == dataset.sha256
    assert opened.directory != tmp_path / "image_set"
    service.store.verify(f"datasets/{dataset.id}")
    assert service.store.manifest(f"datasets/{dataset.id}").record["id"] == dataset.id


@pytest.mark.parametrize(("most", "places"), [(64, range(40)), (8, range(0, 40, 5)), (3, (0, 13, 26))])
def test_some_images_are_spread_evenly_over_all(
    service: Service, dataset: Dataset, most: int, places: Sequence[int]
) -> None:
    images = service.datasets.open(dataset.id).images
    np.testing.assert_array_equal(service.datasets.some(dataset, most), images[list(places)])


def test_images_that_are_not_all_there_are_damaged(service: Service, dataset: Dataset) -> None:
    (path,) = Path(service.settings.store_url).glob(f"datasets/{dataset.id}/**/images.npy")
    path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(DamagedArtifact, match=r"images\.npy is too short"):
        service.datasets.some(dataset, 64)


def test_datasets_are_listed_by_creation(service: Service, dataset: Dataset) -> None:
    second = service.datasets.register(service.datasets.open(dataset.id))
    assert [found.id for found in service.datasets.page().data] == [second.id, dataset.id]
    page = service.datasets.page(limit=1, order="asc")
    assert ([found.id for found in page.data], page.has_more) == ([dataset.id], True)
    assert service.datasets.page(limit=1, order="asc", after=dataset.id).data == [second]
    with pytest.raises(NotFound):
        service.datasets.page(after="ds_nowhere")


def test_a_dataset_is_kept_while_a_job_needs_it(service: Service, dataset: Dataset, submit: Submit) -> None:
    job = submit(uses=(dataset.id,))
    with pytest.raises(Conflict) as caught:
        service.datasets.delete(dataset.id)
    assert caught.value.code == "in_use"
    service.datasets.open(dataset.id).verify()
    service.jobs.cancel(job.id)
    service.datasets.delete(dataset.id)
    with pytest.raises(NotFound):
        service.datasets.get(dataset.id)
    assert service.datasets.page().data == []
    assert not list(Path(service.settings.store_url).rglob("images.npy"))
    with pytest.raises(NotFound):
        service.datasets.delete(dataset.id)
    with pytest.raises(NotFound, match=dataset.id):
        submit(uses=(dataset.id,))


def test_a_dataset_that_could_not_be_recorded_leaves_nothing(service: Service, dataset: Dataset) -> None:
    images = service.datasets.open(dataset.id)
    service.redis.set("flowpp:datasets", "of another type")  # so that the script fails
    with pytest.raises(Exception, match="WRONGTYPE"):
        service.datasets.register(images)
    assert [path.name for path in (Path(service.settings.store_url) / "datasets").iterdir()] == [dataset.id]


def test_a_dataset_with_a_flipped_byte_is_not_opened(service: Service, dataset: Dataset) -> None:
    (file,) = Path(service.settings.store_url).rglob("images.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    service.datasets.open(dataset.id)
    file.write_bytes(content)
    with pytest.raises(DamagedArtifact, match=dataset.id):
        service.datasets.open(dataset.id)
