"""A whole life over S3: dataset, training, likelihood, samples, a checkpoint taken home, deletion; and Redis lost."""

import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from api.stack import Stack
from flowpp import FlowPP
from tests.s3 import S3, running_s3
from tests.waiting import PATIENCE_SECONDS, until
from worker.rebuilding import rebuild
from worker.redis_server import RedisServer
from worker.service import Service
from worker.settings import Settings


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


class Life:
    """What a client does."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def job(self, kind: str, **request: Any) -> dict[str, Any]:
        """The finished job."""
        job = self.http.post(f"/v1/{kind}-jobs", json=request).json()

        def now() -> dict[str, Any]:
            return self.http.get(f"/v1/jobs/{job['id']}").json()

        job = until(lambda: found if (found := now())["status"] not in ("queued", "running") else None, now)
        assert job["status"] == "succeeded", job
        return job

    def artifacts(self, job: dict[str, Any]) -> dict[str, bytes]:
        listed = self.http.get(f"/v1/jobs/{job['id']}/artifacts").json()["data"]
        return {file["name"]: self.http.get(file["url"]).content for file in listed}


def test_a_service_over_s3(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = s3.new_store()
    monkeypatch.setenv("FLOWPP_STORE", store)
    noise = np.random.default_rng(0).integers(0, 32, (40, 8, 8, 3), np.uint8)
    file = io.BytesIO()
    np.save(file, noise + np.linspace(0, 200, 8).astype(np.uint8)[:, None])
    with (
        Stack(tmp_path / "data", port=0) as stack,
        httpx.Client(base_url=stack.url, trust_env=False, timeout=PATIENCE_SECONDS) as http,
    ):
        life = Life(http)
        dataset = http.post("/v1/datasets", files={"file": ("images.npy", file.getvalue())}).json()
        sheet = http.get(f"/v1/datasets/{dataset['id']}/contact-sheet").content
        assert Image.open(io.BytesIO(sheet)).size == (70, 60), "40 images in 7 columns and 6 rows"
        trained = life.job("training", dataset=dataset["id"], model={"preset": "tiny"}, training={"steps": 4})
        assert "metrics.jsonl" in life.artifacts(trained)
        scored = life.job("likelihood", model=trained["id"], dataset=dataset["id"])
        assert life.artifacts(scored)["likelihood.csv"].count(b"\n") == 5
        sampled = life.job("sampling", model=trained["id"], num_samples=4)
        samples = life.artifacts(sampled)
        assert samples["grid.png"].startswith(b"\x89PNG")
        (checkpoint,) = http.get("/v1/checkpoints").json()["data"]
        taken = http.get(f"/v1/checkpoints/{checkpoint['id']}/download")
        zipfile.ZipFile(io.BytesIO(taken.content)).extractall(tmp_path / "taken")
        assert FlowPP.load(tmp_path / "taken" / checkpoint["id"]).config.image_shape == (3, 8, 8)
        assert not (tmp_path / "data" / "store").exists()
        paths = ("/v1/jobs", "/v1/datasets", "/v1/checkpoints", f"/v1/jobs/{trained['id']}/events?limit=100")
        before = [http.get(path).content for path in paths]
        wait_until_recorded(stack)

    shutil.rmtree(tmp_path / "data" / "redis")
    settings = Settings(data_directory=tmp_path / "data", store=store)
    with (
        RedisServer(tmp_path / "data" / "redis") as server,
        Service(settings.model_copy(update={"redis_url": server.url})) as service,
    ):
        assert rebuild(service).damaged == []
    with (
        Stack(tmp_path / "data", port=0) as stack,
        httpx.Client(base_url=stack.url, trust_env=False, timeout=PATIENCE_SECONDS) as http,
    ):
        assert [http.get(path).content for path in paths] == before
        assert Life(http).artifacts(sampled) == samples
        for job in (sampled, scored, trained):
            assert http.delete(f"/v1/jobs/{job['id']}").status_code == 204
        assert http.delete(f"/v1/datasets/{dataset['id']}").status_code == 204
        wait_until_recorded(stack)
        assert s3.objects(store) == {}


def wait_until_recorded(stack: Stack) -> None:
    settings = Settings(redis_url=(stack.data / "redis.url").read_text(), data_directory=stack.data)
    with Service(settings) as service:
        until(lambda: not service.redis.exists("flowpp:changed"))
