"""The service that benchmarks/scale.py measures: Redis server, API, and simulated workers, as processes."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import aiohttp
import numpy as np
import psutil

from benchmarks.simulated_workers import write_checkpoint
from flowpp.data import encode_png
from flowpp.presets import resolve_model
from worker import child, presence
from worker.keys import NewKey, Quota
from worker.queue import QUEUES
from worker.redis_server import HOST, RedisServer, free_port
from worker.service import Service
from worker.settings import Settings

START_SECONDS = 60
OWNER = "benchmark"
MANY = 10_000_000


class House:
    """All of it, over `directory`. A context manager; then `http` is a client with a key, once it was made."""

    http: aiohttp.ClientSession

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.redis = RedisServer(directory / "redis")
        self.port = free_port()
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.imports_torch = False
        self.dataset = self.checkpoint = ""
        self.jobs: list[str] = []
        """The ids of the training jobs."""
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        self.png = encode_png(noise)

    def __enter__(self) -> Self:
        self.redis.start()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("training", "inference", "api"):
            if name in self.children:
                child.stop(self.children[name], 20)
        if hasattr(self, "service"):
            self.service.close()
        self.redis.stop()

    def _start(self) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FLOWPP_")},
            "FLOWPP_REDIS_URL": self.redis.url,
            "FLOWPP_DATA_DIRECTORY": str(self.directory / "data"),
            "FLOWPP_MAX_JOBS_PER_OWNER": str(MANY),
        }
        self.service = Service(
            Settings(redis_url=self.redis.url, data_directory=self.directory / "data", max_jobs_per_owner=MANY)
        )
        listen = ["--host", HOST, "--port", str(self.port), "--no-access-log"]
        api = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", *listen]
        self.children["api"] = child.start(api, self._log("api"), environment)
        self.pipes: dict[str, Connection] = {}
        for queue in QUEUES:
            ours, theirs = Pipe()
            command = [sys.executable, "-m", "benchmarks.simulated_workers", queue, str(theirs.fileno())]
            self.children[queue] = child.start(command, self._log(queue), environment, pass_fds=[theirs.fileno()])
            theirs.close()
            self.pipes[queue] = ours
        assert self.redis.process is not None
        self.children["redis"] = self.redis.process
        self.until(lambda: all(presence.count(self.service.redis, queue) for queue in QUEUES), "a worker is missing")

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def session(self) -> aiohttp.ClientSession:
        """A client with a key that no limit holds."""
        _, token = self.service.keys.create(
            NewKey(owner=OWNER, scopes=("submit",), quota=Quota(requests_per_minute=MANY))
        )
        return aiohttp.ClientSession(
            self.url,
            headers={"Authorization": f"Bearer {token}"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),  # less than the five seconds of uvicorn
            timeout=aiohttp.ClientTimeout(600),
        )

    async def prepare(self) -> None:
        """A dataset, and a checkpoint of `small` without weights."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                async with self.http.get("/healthz"):
                    break
            except aiohttp.ClientError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the API does not answer: {child.tail(self._log('api'))}") from error
                time.sleep(0.1)
        file = io.BytesIO()
        np.save(file, np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), np.uint8))
        form = aiohttp.FormData()
        form.add_field("file", file.getvalue(), filename="images.npy")
        self.dataset = (await self.post("/v1/datasets", 201, data=form))["id"]
        path = write_checkpoint(self.directory, resolve_model("small", {}, (3, 32, 32)), 1, {"train_bits_per_dim": 4.0})
        self.checkpoint = self.service.checkpoints.register(path, owner=OWNER).id

    async def post(self, path: str, status: int, **what: Any) -> dict[str, Any]:
        """The body of the answer. Raises `RuntimeError` where it has another status."""
        async with self.http.post(path, **what) as answer:
            if answer.status != status:
                raise RuntimeError(f"{path} answered {answer.status}: {(await answer.text())[:500]}")
            body: dict[str, Any] = await answer.json()
            return body

    async def train(self) -> None:
        """Asks for a training job."""
        request = {
            "dataset": self.dataset,
            "model": {"preset": "tiny"},
            "training": {"steps": 1_000_000},
            "metadata": {"run": str(len(self.jobs))},
        }
        self.jobs.append((await self.post("/v1/training-jobs", 202, json=request))["id"])

    async def score(self, wait: bool) -> None:
        """Asks for the bits/dim of an image, and waits for them or does not."""
        form = aiohttp.FormData({"model": self.checkpoint})
        form.add_field("files", self.png, filename="image.png", content_type="image/png")
        headers = {"Prefer": "wait=60" if wait else "respond-async"}
        await self.post("/v1/likelihood-jobs", 200 if wait else 202, data=form, headers=headers)

    async def get(self, path: str) -> dict[str, Any]:
        """The body of the answer."""
        async with self.http.get(path) as answer:
            answer.raise_for_status()
            body: dict[str, Any] = await answer.json()
            return body

    def ask_fleet(self, do: str, **what: Any) -> dict[str, Any]:
        """What the simulated training workers answer. Raises `RuntimeError` where they could not do it."""
        pipe = self.pipes["training"]
        pipe.send_bytes(json.dumps({"do": do, **what}).encode())
        said: dict[str, Any] = json.loads(pipe.recv_bytes())
        if "error" in said:
            raise RuntimeError(f"the simulated training workers could not {do}: {said['error']}")
        self.imports_torch |= said["torch"]
        return said

    def until(self, condition: Callable[[], object], what: str, seconds: float = START_SECONDS) -> float:
        """Seconds until it holds."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() > start + seconds:
                logs = "\n".join(child.tail(self._log(name), 8) for name in ("api", *QUEUES))
                raise RuntimeError(f"{what} after {seconds:g} s\n{logs}")
            for name, process in self.children.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended: {child.tail(self._log(name))}")
            time.sleep(0.05)
        return time.monotonic() - start

    def info(self, section: str) -> dict[str, Any]:
        """What Redis says of itself."""
        said: dict[str, Any] = self.service.redis.info(section)
        return said

    def cpu_seconds(self, name: str) -> float:
        """Of a process, since it began."""
        times = psutil.Process(self.children[name].pid).cpu_times()
        return times.user + times.system

    def resident_bytes(self, name: str) -> int:
        """Of a process."""
        return int(psutil.Process(self.children[name].pid).memory_info().rss)
