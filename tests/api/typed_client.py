"""What a type checker must know of both clients; tests/api/test_async_client.py has it checked."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import assert_type

from api.client import AsyncClient, Client, CreatedWebhook, Dataset, Delivery, Event, Job, Webhook


def blocking(client: Client) -> None:
    assert_type(client.jobs.get("job_1"), Job)
    assert_type(client.jobs.events("job_1"), Iterator[Event])
    assert_type(client.jobs.history("job_1", ["log"]), Iterator[Event])
    assert_type(client.datasets.upload(Path("a.zip")), Dataset)
    assert_type(client.webhooks.list(), Iterator[Webhook])
    assert_type(client.webhooks.deliveries("wh_1"), tuple[Delivery, ...])
    client.jobs.get(1)  # type: ignore[arg-type]
    client.sampling_jobs.create(model="job_1", samples=3)  # type: ignore[call-arg]


async def awaited(client: AsyncClient) -> None:
    assert_type(await client.jobs.get("job_1"), Job)
    assert_type(client.jobs.events("job_1"), AsyncIterator[Event])
    assert_type(await client.datasets.upload(Path("a.zip")), Dataset)
    assert_type(await client.webhooks.create("https://example.com/"), CreatedWebhook)
    assert_type(client.webhooks.list(), AsyncIterator[Webhook])
