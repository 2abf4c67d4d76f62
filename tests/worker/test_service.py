"""What can be asked of the service, and what it refuses before anything is written."""

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from flowpp import FlowPP
from flowpp.config import TrainingOverrides
from flowpp.data import build_image_set
from flowpp.presets import resolve_model
from tests.waiting import until
from worker import presence
from worker.datasets import Dataset
from worker.gpus import Gpu, visible
from worker.models import Checkpoint
from worker.presence import Offer, Presence, own_offer
from worker.refusals import Invalid, NotFound, Refusal
from worker.requests import LikelihoodRequest, SamplingRequest, TrainingRequest
from worker.service import Service
from worker.settings import Settings
from worker.submission import prepare_likelihood, prepare_sampling, submit_one, submit_training


@pytest.fixture
def checkpoint(service: Service, tmp_path: Path) -> Checkpoint:
    """Of a `tiny` model for images of 8 x 8."""
    FlowPP(resolve_model("tiny", {}, (3, 8, 8))).save(tmp_path / "saved")
    return service.checkpoints.register(tmp_path / "saved")


def training(dataset: str, **fields: Any) -> TrainingRequest:
    return TrainingRequest.model_validate({"dataset": dataset, "model": {"preset": "tiny"}, **fields})


def images(n: int = 2, size: int = 8) -> np.ndarray:
    return np.zeros((n, size, size, 3), np.uint8)


def test_a_training_job_knows_its_whole_configuration(service: Service, dataset: Dataset) -> None:
    asked = {"model": {"preset": "tiny", "filters": 4}, "training": {"steps": 7}, "metadata": {"a": "b"}}
    job = submit_training(service, training(dataset.id, **asked))
    assert job.request == {"dataset": dataset.id, "model": asked["model"], "training": asked["training"]}
    assert job.metadata == {"a": "b"}
    assert (job.plan["model"]["filters"], job.plan["model"]["height"], job.plan["training"]["steps"]) == (4, 8, 7)
    assert service.redis.llen("flowpp-training") == 1


def test_the_bell_carries_the_id_as_json_and_nothing_else(service: Service, dataset: Dataset) -> None:
    job = submit_training(service, training(dataset.id))
    [bell] = service.redis.lrange("flowpp-training", 0, -1)
    message = json.loads(bell)
    assert message["content-type"] == "application/json"
    arguments, keywords, _ = json.loads(base64.b64decode(message["body"]))
    assert (arguments, keywords) == ([job.id], {})
    assert len(bell) < 2_000


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"model": {"preset": "small", "flow": ["squeeze"] * 4}}, "model", "a squeeze needs an even height"),
        ({"model": {"preset": "tiny", "heads": 3}}, "model", "heads"),
        ({"training": {"steps": 5, "warmup_steps": 10}}, "training", "warmup_steps"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    service: Service, dataset: Dataset, fields: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(Invalid, match=words) as caught:
        submit_training(service, training(dataset.id, **fields))
    assert (caught.value.code, caught.value.field) == ("invalid_configuration", field)
    assert service.jobs.page().data == []


def test_more_processes_than_the_workers_offer_are_refused(service: Service, dataset: Dataset) -> None:
    def submit(num_processes: int) -> None:
        submit_training(service, training(dataset.id, training={"num_processes": num_processes, "batch_size": 32}))

    def offered(*processes: int | None) -> None:
        def announced() -> bool:
            return sorted(map(str, processes)) == sorted(
                str(offer.processes) for offer in presence.offers(service.redis, "training")
            )

        until(announced)

    def worker(processes: int | None) -> Presence:
        offer = Offer(bytes=2**40, shared=True, processes=processes)
        return Presence(service.redis, "training", f"with {processes}", offer)

    submit(32)  # a worker that comes may offer so many
    with worker(2):
        offered(2)
        submit(2)
        with pytest.raises(Invalid, match="up to 2 processes") as caught:
            submit(3)
        assert (caught.value.code, caught.value.field) == ("too_many_processes", "training.num_processes")
        with worker(4), worker(3):
            offered(2, 3, 4)
            submit(4)
            with pytest.raises(Invalid, match="up to 4 processes"):
                submit(5)
        offered(2)
        with pytest.raises(Invalid, match="up to 2 processes"):
            submit(4)
        with Presence(service.redis, "inference", "of another kind", Offer(bytes=1, shared=True, processes=32)):
            until(lambda: presence.count(service.redis, "inference") == 1)
            with pytest.raises(Invalid, match="up to 2 processes"):
                submit(4)
        with worker(None):
            offered(2, None)
            submit(32)
            older = '{"bytes": 1099511627776, "shared": true}'  # as the version before writes it
            service.redis.hset("flowpp:workers:training:memory", "with None", older)
            submit(32)


def test_a_worker_offers_its_gpus_or_else_its_cores_or_what_its_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert own_offer().processes == min(64, len(os.sched_getaffinity(0)))
    assert own_offer().shared
    assert own_offer(7).processes == 7
    found = [Gpu(str(index), 0, 2**30, None) for index in range(4)]
    for listed, left in (
        ("0", "0"),
        ("2, 1", "21"),
        ("0,9,1", "0"),
        ("garbage", ""),
        ("-1", ""),
        ("GPU-4f,GPU-5a", "01"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert "".join(gpu.name for gpu in visible(found)) == left, listed
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible(found) == found


def test_a_training_that_no_workers_memory_can_hold_is_refused_with_what_would_fit(
    service: Service, tmp_path: Path
) -> None:
    np.save(tmp_path / "many.npy", np.zeros((600, 8, 8, 3), np.uint8))
    dataset = service.datasets.register(build_image_set(tmp_path / "many.npy", tmp_path / "set"))
    stated = {"batch_size": 512, "micro_batch_size": 512, "activation_checkpointing": False}
    wide = training(dataset.id, model={"preset": "tiny", "blocks": 8, "filters": 64}, training=stated)

    def changed(**fields: Any) -> TrainingRequest:
        return wide.model_copy(update={"training": TrainingOverrides(**{**stated, **fields})})

    submit_training(service, wide)  # while nobody says what there is
    small, large = (Offer(bytes=size, shared=True) for size in (2**30, 2**40))
    with Presence(service.redis, "training", "small", small):
        until(lambda: presence.offers(service.redis, "training") == [small])
        with pytest.raises(Invalid, match=r"512 images a forward pass take about .* GiB, of 1.0 GiB") as caught:
            submit_training(service, wide)
        assert (caught.value.code, caught.value.field) == ("out_of_memory", "training.micro_batch_size")
        most = int(re.findall(r"micro_batch_size (\d+) would fit", str(caught.value))[0])
        submit_training(service, changed(micro_batch_size=most))
        with pytest.raises(Invalid):
            submit_training(service, changed(micro_batch_size=most + 1))
        submit_training(service, changed(micro_batch_size=None))  # the run chooses what fits
        with pytest.raises(Invalid, match=r"of 0.1 GiB that training.memory_gib allows; not even one image fits"):
            submit_training(service, changed(micro_batch_size=None, activation_checkpointing=None, memory_gib=0.1))
        with Presence(service.redis, "training", "large", large):
            until(lambda: len(presence.offers(service.redis, "training")) == 2)
            submit_training(service, wide)
    assert presence.offers(service.redis, "training") == []


@pytest.mark.parametrize(
    "fields",
    [
        {"model": {"preset": "huge"}},
        {"model": {"preset": "tiny", "height": 16}},
        {"model": {"preset": "tiny", "dropout": float("nan")}},
        {"training": {"learning_rate": -1}},
        {"metadata": {"k": "x" * 513}},
        {"metadata": {str(i): "" for i in range(17)}},
        {"surprise": 1},
    ],
)
def test_a_request_with_absurd_fields_cannot_be_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        training("ds_1", **fields)


def test_a_job_for_what_is_not_there_is_refused(service: Service, dataset: Dataset, checkpoint: Checkpoint) -> None:
    for submit in (
        lambda: submit_training(service, training("ds_nowhere")),
        lambda: submit_training(service, training(dataset.id, resume_from="ckpt_nowhere")),
        lambda: submit_one(service, prepare_likelihood(service, LikelihoodRequest(model="ckpt_nowhere"), images())),
        lambda: submit_one(
            service, prepare_likelihood(service, LikelihoodRequest(model=checkpoint.id, dataset="ds_nowhere"))
        ),
        lambda: submit_one(service, prepare_sampling(service, SamplingRequest(model="job_nowhere"))),
    ):
        with pytest.raises(NotFound, match="nowhere"):
            submit()
    assert service.jobs.page().data == []


def test_images_of_another_size_than_the_models_are_refused(service: Service, checkpoint: Checkpoint) -> None:
    with pytest.raises(Invalid, match="RGB, 8 wide and 8 high; these are RGB, 16 wide and 16 high") as caught:
        submit_one(service, prepare_likelihood(service, LikelihoodRequest(model=checkpoint.id), images(size=16)))
    assert caught.value.code == "wrong_image_shape"


def test_limits_hold(settings: Settings, service: Service, checkpoint: Checkpoint) -> None:
    limits = {"max_samples": 10, "max_request_images": 3, "max_importance_samples": 5, "max_queued_inference": 1}
    with Service(settings.model_copy(update=limits)) as limited:
        refused: list[tuple[str, Any]] = [
            (
                "too_many_samples",
                lambda: submit_one(
                    limited, prepare_sampling(limited, SamplingRequest(model=checkpoint.id, num_samples=11))
                ),
            ),
            (
                "too_many_images",
                lambda: submit_one(
                    limited, prepare_likelihood(limited, LikelihoodRequest(model=checkpoint.id), images(4))
                ),
            ),
            (
                "too_many_importance_samples",
                lambda: submit_one(
                    limited,
                    prepare_likelihood(limited, LikelihoodRequest(model=checkpoint.id, importance_samples=6), images()),
                ),
            ),
            (
                "no_images",
                lambda: submit_one(limited, prepare_likelihood(limited, LikelihoodRequest(model=checkpoint.id))),
            ),
        ]
        for code, submit in refused:
            with pytest.raises(Invalid) as caught:
                submit()
            assert caught.value.code == code
        submit_one(limited, prepare_sampling(limited, SamplingRequest(model=checkpoint.id, num_samples=10)))
        with pytest.raises(Refusal) as full:
            submit_one(limited, prepare_likelihood(limited, LikelihoodRequest(model=checkpoint.id), images(3)))
        assert full.value.code == "queue_full"
        assert not list((settings.data_directory / "store").rglob("images.npz"))


def test_a_start_from_a_checkpoint_of_another_model_is_refused(
    service: Service, dataset: Dataset, checkpoint: Checkpoint
) -> None:
    job = submit_training(service, training(dataset.id, resume_from=checkpoint.id))
    assert job.plan["resume_from"] == checkpoint.id
    with pytest.raises(Invalid, match="its filters is 8, and the model's 4") as caught:
        submit_training(
            service, training(dataset.id, model={"preset": "tiny", "filters": 4}, resume_from=checkpoint.id)
        )
    assert caught.value.field == "resume_from"


def test_a_deleted_job_leaves_nothing_in_the_store(service: Service, checkpoint: Checkpoint) -> None:
    job = submit_one(service, prepare_likelihood(service, LikelihoodRequest(model=checkpoint.id), images(100)))
    assert list((service.settings.data_directory / "store").rglob("images.npz"))
    service.jobs.cancel(job.id)
    service.delete_job(job.id)
    assert not list((service.settings.data_directory / "store" / "jobs").iterdir())
    with pytest.raises(NotFound):
        service.jobs.get(job.id)
