"""The Python client of the HTTP service, blocking and asynchronous.

    with Client() as flowpp:
        dataset = flowpp.datasets.upload(Path("photographs.zip"))
        job = flowpp.training_jobs.create(dataset=dataset.id, model={"preset": "small"})
        for event in flowpp.jobs.events(job.id):
            print(event.type, event.data)

    async with AsyncClient() as flowpp:
        job = await flowpp.sampling_jobs.create(model="job_...", num_samples=4, wait=30)
        async for job in flowpp.jobs.list(type="sampling"):
            print(job.id, job.status)

Exceptions are in api.client.errors. It needs httpx, httpx-sse and pydantic, and nothing else of this repository.
"""

from collections.abc import Callable
from typing import Self

from api.client.calls import Awaited, Blocking, Resource, W, call
from api.client.creations import LikelihoodJobs, SamplingJobs, TrainingJobs
from api.client.errors import ClientError, DamagedDownload, ProblemError, Unreachable
from api.client.jobs import Jobs
from api.client.objects import (
    Artifact,
    Attempt,
    Checkpoint,
    CreatedWebhook,
    Dataset,
    Delivery,
    Event,
    Job,
    JobError,
    Metrics,
    Preset,
    Progress,
    QueueState,
    Readiness,
    RunningTraining,
    Status,
    Webhook,
)
from api.client.resources import Checkpoints, Datasets, Presets
from api.client.transport import Transport, parsed
from api.client.webhooks import Webhooks

__all__ = [
    "Artifact",
    "AsyncClient",
    "Attempt",
    "Checkpoint",
    "Client",
    "ClientError",
    "CreatedWebhook",
    "DamagedDownload",
    "Dataset",
    "Delivery",
    "Event",
    "Job",
    "JobError",
    "Metrics",
    "Preset",
    "ProblemError",
    "Progress",
    "QueueState",
    "Readiness",
    "RunningTraining",
    "Status",
    "Unreachable",
    "Webhook",
]


class _Service(Resource[W]):
    """A service. `url` defaults to FLOWPP_URL or http://127.0.0.1:8000, `key` to FLOWPP_API_KEY.

    `timeout`: seconds without a byte from the service. `max_retries`: how often a request is sent again if the service
    is busy or the connection breaks, and if a repetition is safe. `on_wait` is called before each wait that a busy
    service requests, with its seconds. Raises `ValueError` for a url or key that cannot be one.
    """

    def __init__(
        self,
        way: W,
        url: str | None = None,
        *,
        key: str | None = None,
        timeout: float = 60,
        max_retries: int = 3,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        self.way = way
        self._transport = Transport(way, url, key, timeout, max_retries, on_wait)
        self.datasets: Datasets[W] = Datasets(way, self._transport)
        self.training_jobs: TrainingJobs[W] = TrainingJobs(way, self._transport)
        self.likelihood_jobs: LikelihoodJobs[W] = LikelihoodJobs(way, self._transport)
        self.sampling_jobs: SamplingJobs[W] = SamplingJobs(way, self._transport)
        self.jobs: Jobs[W] = Jobs(way, self._transport)
        self.checkpoints: Checkpoints[W] = Checkpoints(way, self._transport)
        self.presets: Presets[W] = Presets(way, self._transport)
        self.webhooks: Webhooks[W] = Webhooks(way, self._transport)

    @property
    def url(self) -> str:
        return self._transport.url

    @call
    async def readiness(self) -> Readiness:
        """Returns the readiness of the service and its missing parts. Needs no key."""
        return parsed(Readiness, await self._transport.ask("/readyz"))

    @call
    async def status(self) -> Status:
        """Returns the current state of the service: workers, queues, jobs."""
        return await self._transport.get(Status, "/v1/status")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._transport.url!r})"


class Client(_Service[Blocking]):
    """Its calls block. A context manager, or call `close`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        timeout: float = 60,
        max_retries: int = 3,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(Blocking(), url, key=key, timeout=timeout, max_retries=max_retries, on_wait=on_wait)

    def close(self) -> None:
        self.way.call(self._transport.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Service[Awaited]):
    """Its calls are awaited. An asynchronous context manager, or call `aclose`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        timeout: float = 60,
        max_retries: int = 3,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(Awaited(), url, key=key, timeout=timeout, max_retries=max_retries, on_wait=on_wait)

    async def aclose(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
