"""Jobs of every kind, once they are there: their records, events and files."""

import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import httpx
from httpx_sse import EventSource

from api.client.calls import W, call, each
from api.client.errors import ProblemError, Unreachable
from api.client.files import Report, download
from api.client.objects import Artifact, Attempt, Event, Job, Metrics
from api.client.transport import CONNECT_SECONDS, Part, path_of

RECONNECT_SECONDS = 30  # longer than the API takes to be started anew
HEARTBEAT_SECONDS = 60  # the stream is dead after so long without a byte; heartbeats come more often


class Absence:
    """The service's, which we bear for as long as its restart takes, if we have known it at all."""

    def __init__(self) -> None:
        self._known = False
        self._since: float | None = None

    def over(self) -> None:
        self._known, self._since = True, None

    def bear(self, error: Unreachable | ProblemError) -> None:
        """Raises what is no absence, or a long one."""
        refused = isinstance(error, ProblemError) and error.status != 503
        self._since = self._since or time.monotonic()
        if refused or not self._known or time.monotonic() > self._since + RECONNECT_SECONDS:
            raise error


class Jobs(Part[W]):
    """Jobs of every kind."""

    @call
    async def get(self, job_id: str) -> Job:
        return await self._transport.get(Job, path_of("jobs", job_id))

    @each
    def list(
        self, type: str | None = None, status: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> AsyncIterator[Job]:
        """Newest first: all, or those of a type, in a state, with this metadata."""
        query = {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        return self._transport.pages(Job, "/v1/jobs", {"type": type, "status": status, **query})

    @call
    async def cancel(self, job_id: str) -> Job:
        return await self._transport.post(Job, path_of("jobs", job_id, "cancel"))

    @call
    async def pause(self, job_id: str) -> Job:
        """A training job writes a checkpoint and frees its worker."""
        return await self._transport.post(Job, path_of("jobs", job_id, "pause"))

    @call
    async def resume(self, job_id: str) -> Job:
        """A paused job goes on from its last checkpoint."""
        return await self._transport.post(Job, path_of("jobs", job_id, "resume"))

    @call
    async def delete(self, job_id: str) -> None:
        """With its checkpoints and artifacts; one that runs is cancelled, and gone a few seconds after it has ended."""
        await self._transport.request("DELETE", path_of("jobs", job_id))

    @call
    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job when it has finished. Raises `TimeoutError` after `timeout` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        absence, pause = Absence(), 0.05
        while True:
            try:
                job = await self._transport.get(Job, path_of("jobs", job_id))
                absence.over()
                if job.finished:
                    return job
                if time.monotonic() > deadline:
                    raise TimeoutError(f"job {job_id} is still {job.status} after {timeout:g} s")
            except (Unreachable, ProblemError) as error:
                absence.bear(error)
            await self.way.sleep(pause)
            pause = min(1, 1.5 * pause)

    @each
    async def events(self, job_id: str, after: str | None = None, types: Sequence[str] = ()) -> AsyncIterator[Event]:
        """Each event once, from the first (or from behind event `after`), live, until the job has finished.

        Of these types, or all: status, metrics, log, checkpoint, warning.

        A broken stream is taken up where it broke; one that stays broken raises `Unreachable`.
        """
        absence = Absence()
        while True:
            try:
                async for event in self._stream(job_id, after, types):
                    absence.over()
                    yield event
                    if event.terminal:
                        return
                    after = event.id
                if (await self._transport.get(Job, path_of("jobs", job_id))).finished:  # it had before `after`
                    return
                absence.over()
            except (Unreachable, ProblemError) as error:
                absence.bear(error)
            await self.way.sleep(0.5)

    @each
    def history(self, job_id: str, types: Sequence[str] = ()) -> AsyncIterator[Event]:
        """Each event so far, newest first; of these types, or all."""
        return self._transport.pages(Event, path_of("jobs", job_id, "events"), {"order": "desc", **_of(types)})

    async def _stream(self, job_id: str, after: str | None, types: Sequence[str]) -> AsyncIterator[Event]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if after is not None:
            headers["Last-Event-ID"] = after
        timeout = httpx.Timeout(HEARTBEAT_SECONDS, connect=CONNECT_SECONDS)
        path = path_of("jobs", job_id, "events")
        async with self._transport.stream("GET", path, params=_of(types), headers=headers, timeout=timeout) as response:
            if response.status_code == 204:  # the job has finished, and these were its last events
                return
            async for message in EventSource(response).aiter_sse():
                if message.data:  # else a heartbeat
                    yield Event.model_validate_json(message.data)

    @call
    async def metrics(self, job_id: str) -> Metrics:
        """A training job's, so far."""
        return await self._transport.get(Metrics, path_of("jobs", job_id, "metrics"))

    @call
    async def logs(self, job_id: str) -> str:
        """A training job's log lines, so far."""
        return (await self._transport.request("GET", path_of("jobs", job_id, "logs"))).text

    @call
    async def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        """Oldest first."""
        return await self._transport.all(Attempt, path_of("jobs", job_id, "attempts"))

    @call
    async def artifacts(self, job_id: str) -> tuple[Artifact, ...]:
        return await self._transport.all(Artifact, path_of("jobs", job_id, "artifacts"))

    @call
    async def download(self, job_id: str, name: str, target: Path, progress: Report | None = None) -> Path:
        """Downloads an artifact to the file `target`, whole or not at all, and goes on with what an earlier try left.

        Raises `DamagedDownload`.
        """
        return await download(self._transport, path_of("jobs", job_id, "artifacts", *name.split("/")), target, progress)


def _of(types: Sequence[str]) -> dict[str, str]:
    return {"type": ",".join(types)} if types else {}
