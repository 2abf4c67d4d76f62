"""The application as a whole: its documents, its problems, its health, and what it never imports."""

import os
import subprocess
import sys
from pathlib import Path

import httpx

from flowpp.presets import PRESETS
from tests.worker.conftest import Submit
from worker.redis_server import RedisServer
from worker.service import Service
from worker.settings import Settings

NO_TORCH = """
import os, sys, threading, time
import httpx, uvicorn
from api.app import create_app
from worker.redis_server import free_port

port = free_port()
server = uvicorn.Server(uvicorn.Config(create_app(), port=port, log_level="error"))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    time.sleep(0.01)
with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
    assert client.get("/v1/presets").status_code == 200
    with open(sys.argv[1], "rb") as file:
        dataset = client.post("/v1/datasets", files={"file": ("images.npy", file)}).json()
    wanted = {"dataset": dataset["id"], "model": {"preset": "tiny"}, "training": {"batch_size": 1}}
    job = client.post("/v1/training-jobs", json=wanted)
    print(job.status_code)
server.should_exit = True
thread.join()
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch"))
"""


def test_the_api_process_never_imports_torch(redis_server: RedisServer, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8))
    environment = {**os.environ, "FLOWPP_REDIS_URL": redis_server.url, "FLOWPP_DATA_DIRECTORY": str(tmp_path)}
    environment["FLOWPP_AUTHENTICATION"] = "false"
    command = [sys.executable, "-c", NO_TORCH, str(tmp_path / "images.npy")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split("\n")[:2] == ["202", "[]"], run.stderr


def test_every_endpoint_is_described_in_the_openapi_document(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation.get("description"), f"{method} {path}"
    for path in ("datasets", "training-jobs", "likelihood-jobs", "sampling-jobs", "jobs", "checkpoints", "presets"):
        assert f"/v1/{path}" in document["paths"]


def test_the_documentation_page_needs_no_other_server(http: httpx.Client) -> None:
    page = http.get("/docs").text
    assert "swagger" in page
    assert "https://" not in page.replace("https://fastapi", "").replace("https://github", "")


def test_presets_are_listed_with_every_value(http: httpx.Client) -> None:
    presets = {preset["id"]: preset for preset in http.get("/v1/presets").json()["data"]}
    assert presets.keys() == PRESETS.keys()
    assert presets["cifar10"]["model"] == PRESETS["cifar10"].model.model_dump(mode="json")
    assert presets["tiny"]["training"] == PRESETS["tiny"].training.model_dump(mode="json")


def test_unknown_paths_and_methods_are_problems(http: httpx.Client) -> None:
    for response, status, code in (
        (http.get("/v1/nothing"), 404, "not_found"),
        (http.put("/v1/datasets"), 405, "method_not_allowed"),
    ):
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["instance"] == response.request.url.path


def test_without_redis_the_api_answers_503(service: Service, tmp_path: Path) -> None:
    import asyncio

    from api.app import create_app
    from worker.redis_server import free_port

    settings = Settings(redis_url=f"redis://127.0.0.1:{free_port()}/0", data_directory=tmp_path, authentication=False)

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(create_app(settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            return await client.get("/v1/jobs"), await client.get("/readyz")

    jobs, ready = asyncio.run(ask())
    assert (jobs.status_code, jobs.json()["code"]) == (503, "redis_unreachable")
    assert "retry-after" in jobs.headers
    assert ready.status_code == 503
    assert "Redis does not answer" in ready.json()["missing"][0]


def test_answers_of_json_end_their_line_and_files_are_as_they_are(
    http: httpx.Client, service: Service, tmp_path: Path
) -> None:
    Submit(service)()
    (job,), written = service.jobs.claim("training", "a worker"), b'{"bits_per_dim": 3}'
    for path in ("/v1/jobs", f"/v1/jobs/{job.id}", "/v1/status", "/v1/jobs/job_nothing", "/openapi.json"):
        answer = http.get(path)
        assert answer.content.endswith(b"}\n")
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert answer.json()
    refused = http.post("/v1/training-jobs", json={})
    assert (refused.status_code, refused.content[-2:]) == (422, b"}\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "likelihood.json").write_bytes(written)
    service.store.put(f"jobs/{job.id}/output", tmp_path / "out")
    service.jobs.end(job, "succeeded", artifacts=f"jobs/{job.id}/output")
    file = http.get(f"/v1/jobs/{job.id}/artifacts/likelihood.json")
    assert (file.content, file.headers["content-type"]) == (written, "application/json")
