"""A visitor of a served stack: a client with a key that asks for all there is; and what tests do beside the service."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from api.stack import Stack
from tests.waiting import PATIENCE_SECONDS, until
from worker.service import Service
from worker.settings import Settings


def flowpp(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("flowpp")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def key(data: Path, owner: str, scope: str) -> str:
    made = flowpp("keys", "create", "--owner", owner, "--scope", scope, "--data", data)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


class Visitor:
    """A client with a key, that asks for all there is."""

    def __init__(self, stack: Stack, token: str) -> None:
        self.http = httpx.Client(
            base_url=stack.url,
            headers={"Authorization": f"Bearer {token}", "X-Request-ID": "a-visit"},
            trust_env=False,
            timeout=PATIENCE_SECONDS,
        )

    def dataset(self, images: np.ndarray) -> dict[str, Any]:
        file = io.BytesIO()
        np.save(file, images)
        answer = self.http.post("/v1/datasets", files={"file": ("images.npy", file.getvalue())})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def job(self, kind: str, cancel_after: str | None = None, **request: Any) -> dict[str, Any]:
        headers = {"Cancel-After": cancel_after} if cancel_after else {}
        answer = self.http.post(f"/v1/{kind}-jobs", json=request, headers=headers)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def is_now(self, job: dict[str, Any], *statuses: str) -> dict[str, Any]:
        """The job, as soon as it is one of these."""

        def now() -> dict[str, Any]:
            return self.http.get(f"/v1/jobs/{job['id']}").json()

        return until(lambda: found if (found := now())["status"] in statuses else None, now)

    def has_checkpoint(self, job: dict[str, Any]) -> None:
        """Returns when it has."""
        until(lambda: self.http.get("/v1/checkpoints", params={"job": job["id"]}).json()["data"])

    def all_there_is(self) -> dict[str, tuple[int, bytes]]:
        """Each GET of the OpenAPI document for each id there is: its status and body."""
        found: dict[str, tuple[int, bytes]] = {}
        ids = {
            "job_id": self._ids("jobs"),
            "dataset_id": self._ids("datasets"),
            "checkpoint_id": self._ids("checkpoints"),
            "webhook_id": self._ids("webhooks"),
        }
        paths = self.http.get("/openapi.json").json()["paths"]
        del paths["/v1/status"]  # of the moment
        for path in [path for path, methods in paths.items() if path.startswith("/v1/") and "get" in methods]:
            name = next((name for name in ids if f"{{{name}}}" in path), None)
            for place in [path.replace(f"{{{name}}}", each) for each in ids[name]] if name else [path]:
                self._visit(place, found)
        return found

    def _ids(self, things: str) -> list[str]:
        return [thing["id"] for thing in self.http.get(f"/v1/{things}", params={"limit": 100}).json()["data"]]

    def _visit(self, place: str, found: dict[str, tuple[int, bytes]]) -> None:
        if "{name}" in place:
            for artifact in self.http.get(place.removesuffix("/{name}")).json()["data"]:
                self._visit(artifact["url"], found)
            return
        asked = [{}, {"order": "asc", "limit": 100}] if place.count("/") == 2 else [{}]
        if place == "/v1/jobs":
            asked += [{"status": status} for status in ("queued", "paused", "succeeded", "failed", "cancelled")]
        for parameters in asked:
            answer = self.http.get(place, params=parameters)
            found[str(answer.url.raw_path)] = answer.status_code, answer.content


def wait_until_recorded(data: Path) -> None:
    settings = Settings(redis_url=(data / "redis.url").read_text().strip(), data_directory=data)
    with Service(settings) as service:
        until(lambda: not service.redis.exists("flowpp:changed"))
