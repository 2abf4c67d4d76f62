"""Webhooks by the Python clients and by the `flowpp` command, down to what a receiver gets."""

import asyncio
from collections.abc import Iterator

import pytest

from api.client import AsyncClient, Client, Delivery, ProblemError
from tests.api.conftest import Serve
from tests.api.receiver import Receiver, receiving
from tests.api.test_cli import flowpp, lines, printed
from tests.api.test_webhooks import LOOPBACK
from tests.waiting import until
from worker.service import Service


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def url(service: Service, serve: Serve) -> Iterator[str]:
    """Of a service whose webhooks may point at this machine."""
    with serve(service.settings.model_copy(update={"webhook_networks": (LOOPBACK,)})) as http:
        yield str(http.base_url).rstrip("/")


def settled(client: Client, webhook_id: str) -> Delivery:
    """The last delivery, when it is over."""

    def last() -> Delivery:
        return client.webhooks.deliveries(webhook_id)[0]

    return until(lambda: found if (found := last()).status != "pending" else None, last)


def test_a_webhook_is_made_listed_pinged_and_deleted(url: str, receiver: Receiver) -> None:
    with Client(url) as client:
        every = client.webhooks.create(receiver.url())
        some = client.webhooks.create(receiver.url("/some"), ["job.failed", "job.succeeded"])
        assert set(some.events) == {"job.succeeded", "job.failed"} < set(every.events)
        assert (some.status, some.disabled_reason, some.dropped) == ("active", None, 0)
        assert [webhook.id for webhook in client.webhooks.list()] == [some.id, every.id]
        assert client.webhooks.get(some.id).model_dump() == some.model_dump(exclude={"secret"})
        ping = client.webhooks.ping(some.id)
        assert (ping.type, ping.status, ping.attempts) == ("ping", "pending", 0)
        delivery = settled(client, some.id)
        assert (delivery.id, delivery.status, delivery.attempts, delivery.status_code) == (ping.id, "delivered", 1, 200)
        assert client.webhooks.deliveries(every.id) == ()
        (received,) = receiver.wait(1)
        assert (received.path, received.id) == ("/some", ping.id)
        assert received.verified(some.secret)["data"] == {"webhook": some.id}
        client.webhooks.delete(some.id)
        with pytest.raises(ProblemError, match=some.id) as caught:
            client.webhooks.get(some.id)
        assert (caught.value.status, caught.value.code) == (404, "webhook_not_found")


def test_a_webhook_is_made_and_pinged_awaited(url: str, receiver: Receiver) -> None:
    async def go() -> None:
        async with AsyncClient(url) as client:
            webhook = await client.webhooks.create(receiver.url(), ("job.failed",))
            assert [each.id async for each in client.webhooks.list()] == [webhook.id]
            ping = await client.webhooks.ping(webhook.id)
            await asyncio.to_thread(receiver.wait, 1)
            assert [each.id for each in await client.webhooks.deliveries(webhook.id)] == [ping.id]
            await client.webhooks.delete(webhook.id)
            with pytest.raises(ProblemError, match="webhook_not_found"):
                await client.webhooks.deliveries(webhook.id)

    asyncio.run(go())


def test_the_secret_is_in_no_representation(url: str, receiver: Receiver) -> None:
    with Client(url) as client:
        webhook = client.webhooks.create(receiver.url())
        assert webhook.secret.startswith("whsec_")
        assert webhook.secret not in repr(webhook) + str(webhook)


def test_what_is_refused_is_named(url: str) -> None:
    with Client(url) as client:
        with pytest.raises(ProblemError) as private:
            client.webhooks.create("http://10.0.0.1/")
        with pytest.raises(ProblemError, match=r"'job\.succeeded'"):
            client.webhooks.create("http://127.0.0.1/", ["job.done"])
        assert list(client.webhooks.list()) == []
    assert (private.value.status, private.value.code) == (422, "private_address")


def test_the_command_makes_shows_pings_and_deletes_a_webhook(url: str, receiver: Receiver) -> None:
    at = ("--url", url)
    created = flowpp("webhooks", "create", receiver.url(), "--event", "job.failed", "--event", "job.paused", *at)
    assert (created.returncode, created.stderr) == (0, "The secret is shown this once.\n")
    shown = dict(line.split()[:2] for line in created.stdout.splitlines() if len(line.split()) > 1)
    webhook = shown["id"]
    listed = flowpp("webhooks", "list", *at).stdout
    assert listed.startswith(f"{webhook}  active  ")
    assert listed.endswith(f"{receiver.url()}  job.paused job.failed\n")
    assert shown["secret"] not in listed + flowpp("webhooks", "show", webhook, *at).stdout
    ping = flowpp("webhooks", "ping", webhook, *at).stdout.strip()
    (received,) = receiver.wait(1)
    assert received.verified(shown["secret"])["type"] == "ping"
    with Client(url) as client:
        settled(client, webhook)
    said = flowpp("webhooks", "deliveries", webhook, *at).stdout.split()
    assert (said[:4], said[-1]) == ([ping, "ping", "delivered", "1"], "200")
    assert flowpp("webhooks", "delete", webhook, *at).returncode == 0
    gone = flowpp("webhooks", "show", webhook, *at)
    assert (gone.returncode, f"there is no webhook {webhook}" in gone.stderr) == (2, True), gone.stderr
    unknown = flowpp("webhooks", "create", receiver.url(), "--event", "job.done", *at)
    assert (unknown.returncode, "job.succeeded" in unknown.stderr) == (2, True), unknown.stderr


def test_the_command_prints_webhooks_as_json(url: str, receiver: Receiver) -> None:
    at = ("--url", url)
    webhook = printed("webhooks", "create", receiver.url(), *at)
    assert webhook.pop("secret").startswith("whsec_")
    assert printed("webhooks", "show", webhook["id"], *at) == webhook
    assert lines("webhooks", "list", *at) == [webhook]
    ping = printed("webhooks", "ping", webhook["id"], *at)
    (delivery,) = lines("webhooks", "deliveries", webhook["id"], *at)
    assert (delivery["id"], delivery["type"]) == (ping["id"], "ping")
    assert printed("webhooks", "delete", webhook["id"], *at) == {"id": webhook["id"], "deleted": True}
    assert lines("webhooks", "list", *at) == []
