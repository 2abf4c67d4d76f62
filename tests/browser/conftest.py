"""Chromium on the dashboard of a real service: a stack without keys, an API beside it that asks for them, a model."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from api.client import Client, Dataset, Job
from api.stack import REDIS_URL, Stack
from flowpp import FlowPP
from tests.browser.pages import OUTPUT, Open, Seen
from worker import child
from worker.keys import NewKey
from worker.models import Checkpoint
from worker.redis_server import HOST, free_port
from worker.service import Service
from worker.settings import Settings

TINY = {"preset": "tiny"}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium: the one that CHROMIUM names, or the system's."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("there is no playwright: `make test-browser` installs it", pytrace=False)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.fail(
            "there is no Chromium: `apt-get install chromium`, or name one: CHROMIUM=/path/to/it", pytrace=False
        )
    OUTPUT.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]  # it may be root in a container
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens the page of a service at a hash, in a context of its own; afterwards no error may have been logged."""
    contexts: list[Any] = []
    all_seen: list[Seen] = []

    def open_page(url: str, where: str = "", provoked: tuple[str, ...] = (), **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, "locale": "en-GB"} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        seen = Seen(provoked=provoked)
        all_seen.append(seen)
        seen.listen(page)
        page.seen = seen
        page.goto(f"{url}/{where}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [fault for seen in all_seen for fault in seen.faults] == []


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack"), port=0) as stack:
        yield stack


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url) as client:
        yield client


@pytest.fixture(scope="session")
def settings(stack: Stack) -> Settings:
    """Of the stack."""
    return Settings(redis_url=(stack.data / REDIS_URL).read_text(), data_directory=stack.data)


@pytest.fixture(scope="session")
def unvalidated(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model for 32 x 32 images that nobody has trained, nor tried on validation images."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    FlowPP("tiny").save(directory)
    with Service(settings) as service:
        return service.checkpoints.register(directory)


class Guarded:
    """An API over the stack's records that asks for keys, one that may do all, and a process that can be killed."""

    def __init__(self, settings: Settings, log: Path) -> None:
        with Service(settings) as service:
            _, self.token = service.keys.create(NewKey(owner="alice", scopes=("admin",)))
        self._log = log
        self._port = free_port()
        self._environment = {
            **os.environ,
            "FLOWPP_REDIS_URL": settings.redis_url,
            "FLOWPP_DATA_DIRECTORY": str(settings.data_directory),
            "FLOWPP_AUTHENTICATION": "true",
        }
        self.start()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def start(self) -> None:
        """Returns when it answers."""
        listen = ["--host", HOST, "--port", str(self._port)]
        command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", *listen]
        self.process = child.start(command, self._log, self._environment)
        while True:
            assert self.process.poll() is None, child.tail(self._log)
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/healthz", trust_env=False).is_success:
                    return
            time.sleep(0.1)


@pytest.fixture(scope="session")
def guarded(stack: Stack, settings: Settings) -> Iterator[Guarded]:
    guarded = Guarded(settings, stack.logs / "guarded.log")
    yield guarded
    child.stop(guarded.process, 20)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Random images with a gradient, so that there is something to learn; uint8 [100, 16, 16, 3]."""
    noise = np.random.default_rng(0).integers(0, 40, (100, 16, 16, 3))
    across = np.linspace(0, 200, 16)[None, :, None]
    down = np.linspace(0, 1, 100)[:, None, None, None]
    return (noise + across * (1 - down) + across.swapaxes(0, 1) * down).astype(np.uint8)


@pytest.fixture(scope="session")
def archive(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of 80 training and 20 validation images."""
    path = tmp_path_factory.mktemp("images") / "gradients.npz"
    np.savez(path, train=images[:80], validation=images[80:])
    return path


@pytest.fixture(scope="session")
def dataset(client: Client, archive: Path) -> Dataset:
    return client.datasets.upload(archive)


@pytest.fixture(scope="session")
def trained(client: Client, dataset: Dataset) -> Job:
    """A `tiny` model after 40 steps, with grids of samples at each tenth."""
    job = client.training_jobs.create(dataset=dataset.id, model=TINY, training={"steps": 40})
    job = client.jobs.wait(job.id, timeout=120)
    assert job.status == "succeeded", job
    return job
