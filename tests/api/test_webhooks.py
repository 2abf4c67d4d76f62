"""Webhooks over HTTP, and what a receiver gets of them."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trustme
from standardwebhooks import WebhookVerificationError

from api import webhooks
from api.addresses import Addresses
from api.schemas import JobEvent, JobEventData
from api.webhooks import Sender
from tests.api.conftest import Serve
from tests.api.receiver import Answer, Receiver, receiving
from tests.waiting import PATIENCE_SECONDS, until
from tests.worker.conftest import Submit
from worker import child
from worker.jobs import JobError
from worker.redis_server import RedisServer, free_port
from worker.service import Service
from worker.settings import Settings
from worker.webhooks import MAX_WEBHOOKS, CreatedWebhook, Delivery, NewWebhook

LOOPBACK = ip_network("127.0.0.0/8")
SOON = (0.1, 0.1, 0.1)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def open_settings(service: Service) -> Settings:
    """That let webhooks point at this machine."""
    return service.settings.model_copy(update={"webhook_networks": (LOOPBACK,)})


@pytest.fixture
def open_http(open_settings: Settings, serve: Serve) -> Iterator[httpx.Client]:
    with serve(open_settings) as client:
        yield client


@contextmanager
def sending(service: Service, addresses: Addresses | None = None, **given: Any) -> Iterator[None]:
    """A sender in a thread of its own."""
    sender = Sender(service.webhooks, addresses or Addresses([LOOPBACK]), **{"retry_seconds": SOON} | given)
    ended, begun = threading.Event(), threading.Event()

    async def send() -> None:
        async with sender.sending():
            begun.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(send(),))
    thread.start()
    try:
        assert begun.wait(PATIENCE_SECONDS)
        yield
    finally:
        ended.set()
        thread.join()


def queue_one(service: Service, url: str) -> CreatedWebhook:
    """A webhook to which the event of a queued job is to be delivered."""
    webhook = service.webhooks.create(NewWebhook(url=url, events=("job.queued",)))
    Submit(service)()
    return webhook


def is_over(delivery: Delivery) -> bool:
    return delivery.status != "pending"


def settled(service: Service, webhook: CreatedWebhook, when: Callable[[Delivery], object] = is_over) -> Delivery:
    """Its last delivery, as soon as `when` holds of it."""

    def last() -> Delivery:
        return service.webhooks.deliveries(webhook.id)[0]

    return until(lambda: found if when(found := last()) else None, last)


# The resource


def test_a_webhook_is_made_and_its_secret_is_shown_once(http: httpx.Client, service: Service) -> None:
    created = http.post("/v1/webhooks", json={"url": "http://1.1.1.1/hook", "events": ["job.failed"]})
    assert created.status_code == 201, created.text
    webhook = created.json()
    secret = webhook.pop("secret")
    assert secret.startswith("whsec_")
    assert created.headers["location"] == f"/v1/webhooks/{webhook['id']}"
    assert webhook["id"].startswith("wh_")
    assert (webhook["object"], webhook["owner"], webhook["status"]) == ("webhook", "local", "active")
    answers = [http.get(f"/v1/webhooks{path}") for path in ("", f"/{webhook['id']}", f"/{webhook['id']}/deliveries")]
    assert answers[1].json() == webhook
    assert answers[0].json()["data"] == [webhook]
    assert not [answer for answer in answers if secret in answer.text]
    assert http.delete(f"/v1/webhooks/{webhook['id']}").status_code == 204
    gone = http.get(f"/v1/webhooks/{webhook['id']}")
    assert (gone.status_code, gone.json()["code"]) == (404, "webhook_not_found")


def test_webhooks_come_in_pages_in_the_order_of_creation(http: httpx.Client) -> None:
    ids = [http.post("/v1/webhooks", json={"url": f"http://1.1.1.1/{n}"}).json()["id"] for n in range(3)]
    page = http.get("/v1/webhooks", params={"limit": 2, "order": "asc"}).json()
    assert ([webhook["id"] for webhook in page["data"]], page["has_more"]) == (ids[:2], True)
    rest = http.get("/v1/webhooks", params={"after": page["last_id"], "order": "asc"}).json()
    assert ([webhook["id"] for webhook in rest["data"]], rest["has_more"]) == (ids[2:], False)


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({"url": "http://127.0.0.1:9000/"}, "private_address", "url"),
        ({"url": "http://localhost/"}, "private_address", "url"),
        ({"url": "http://169.254.169.254/latest/meta-data"}, "private_address", "url"),
        ({"url": "http://nothing.invalid/"}, "unresolvable_host", "url"),
        ({"url": "ftp://1.1.1.1/"}, "invalid_url", "url"),
        ({"url": "http://a:b@1.1.1.1/"}, "invalid_url", "url"),
        ({"url": "http://1.1.1.1/" + "a" * 2_040}, "invalid_request", "url"),
        ({"url": "http://1.1.1.1/", "events": []}, "invalid_request", "events"),
        ({"url": "http://1.1.1.1/", "events": ["job.pausing"]}, "invalid_request", "events.0"),
        ({"url": "http://1.1.1.1/", "secret": "mine"}, "invalid_request", "secret"),
        ({}, "invalid_request", "url"),
    ],
)
def test_what_cannot_be_a_webhook_is_refused(http: httpx.Client, body: dict[str, Any], code: str, field: str) -> None:
    refused = http.post("/v1/webhooks", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, code)
    assert refused.json()["errors"][0]["path"] == field
    assert http.get("/v1/webhooks").json()["data"] == []


def test_the_same_request_again_makes_no_second_one(http: httpx.Client) -> None:
    body, key = {"url": "http://1.1.1.1/"}, {"Idempotency-Key": "hook"}
    first, again = (http.post("/v1/webhooks", json=body, headers=key) for _ in range(2))
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    other = http.post("/v1/webhooks", json={"url": "http://1.1.1.1/other"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len(http.get("/v1/webhooks").json()["data"]) == 1


def test_an_owner_may_have_so_many(http: httpx.Client) -> None:
    for _ in range(MAX_WEBHOOKS):
        assert http.post("/v1/webhooks", json={"url": "http://1.1.1.1/"}).status_code == 201
    refused = http.post("/v1/webhooks", json={"url": "http://1.1.1.1/"})
    assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")


def test_a_ping_arrives_and_is_shown(open_http: httpx.Client, receiver: Receiver) -> None:
    webhook = open_http.post("/v1/webhooks", json={"url": receiver.url()}).json()
    queued = open_http.post(f"/v1/webhooks/{webhook['id']}/ping")
    assert (queued.status_code, queued.json()["status"]) == (202, "pending")
    (received,) = receiver.wait(1)
    assert received.id == queued.json()["id"]
    said = received.verified(webhook["secret"])
    assert (said["type"], said["data"]) == ("ping", {"webhook": webhook["id"]})

    def deliveries() -> list[dict[str, Any]]:
        return open_http.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]

    until(lambda: deliveries()[0]["status"] != "pending", deliveries)
    (shown,) = deliveries()
    assert (shown["id"], shown["status"], shown["status_code"], shown["attempts"]) == (received.id, "delivered", 200, 1)


def test_what_is_sent_is_in_the_openapi_document(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operation = document["webhooks"]["job-event"]["post"]
    assert "signature" in operation["description"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert set(document["components"]["schemas"][schema]["properties"]) == {"type", "timestamp", "data"}
    assert {parameter["name"] for parameter in operation["parameters"]} == {
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
    }


# What arrives


def test_a_job_is_told_from_the_queue_to_its_end(service: Service, receiver: Receiver) -> None:
    webhook = service.webhooks.create(NewWebhook(url=receiver.url("/hook?token=a%2Fb&c=%C3%A9")))
    began = time.time()
    with sending(service):
        Submit(service)(metadata={"name": "Zoë"})
        (job,) = service.jobs.claim("training", "worker")
        service.jobs.end(job, "failed", error=JobError(code="nan_loss", message="it is not finite"))
        received = receiver.wait(3)
    said = {event["type"]: event for event in (each.verified(webhook.secret) for each in received)}
    assert said.keys() == {"job.queued", "job.running", "job.failed"}
    failed = said["job.failed"]["data"]
    assert (failed["id"], failed["status"], failed["metadata"]) == (job.id, "failed", {"name": "Zoë"})
    assert failed["error"] == {"code": "nan_loss", "message": "it is not finite"}
    for event in said.values():
        JobEventData.model_validate(event["data"], extra="forbid")
        JobEvent.model_validate(event, extra="forbid")
    headers = received[0].headers
    assert received[0].path == "/hook?token=a%2Fb&c=%C3%A9"
    assert (headers[":method"], headers["content-type"]) == ("POST", "application/json")
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert int(began) <= int(headers["webhook-timestamp"]) <= time.time()
    with pytest.raises(WebhookVerificationError):
        received[0].verified("whsec_c29tZWJvZHkgZWxzZSdz")


def test_a_failure_is_tried_again_with_the_same_id_and_body_and_a_new_signature(
    service: Service, receiver: Receiver
) -> None:
    receiver.answer(Answer(500), Answer(200))
    webhook = queue_one(service, receiver.url())
    began = time.time()
    with sending(service, retry_seconds=(1.1,)):
        first = settled(service, webhook, lambda delivery: delivery.attempts == 1 and delivery.error)
        assert (first.status, first.status_code, first.error) == ("pending", 500, "it answered 500")
        assert first.next_attempt_at is not None
        assert began + 0.98 < first.next_attempt_at < time.time() + 1.3
        last = settled(service, webhook)
    assert (last.status, last.status_code, last.attempts, last.error) == ("delivered", 200, 2, None)
    one, two = receiver.received
    assert (one.id, one.body, one.id) == (two.id, two.body, last.id)
    assert one.verified(webhook.secret) == two.verified(webhook.secret)
    assert one.headers["webhook-timestamp"] != two.headers["webhook-timestamp"]
    assert one.headers["webhook-signature"] != two.headers["webhook-signature"]


def test_after_the_last_attempt_a_delivery_is_dead(service: Service, receiver: Receiver) -> None:
    receiver.answer(*[Answer(404)] * 10)
    webhook = queue_one(service, receiver.url())
    with sending(service, retry_seconds=(0.1, 0.3)):
        last = settled(service, webhook)
        time.sleep(1)
    assert (last.status, last.attempts, last.error, last.next_attempt_at) == ("dead", 3, "it answered 404", None)
    assert len(receiver.received) == 3
    assert service.webhooks.get(webhook.id).status == "active"


def test_the_schedule_is_the_one_that_standard_webhooks_recommends() -> None:
    minute, hour = 60, 3_600
    waits = (5, 5 * minute, 30 * minute, 2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour)
    assert waits == webhooks.RETRY_SECONDS


@pytest.mark.parametrize(
    ("status", "said", "least", "most"),
    [
        (429, "200", 199, 201),
        (503, "in_200_seconds", 198, 201),
        (503, "99999999", 86_399, 86_401),
        (503, "soon", 8.9, 11),
        (500, "60", 8.9, 11),
    ],
)
def test_retry_after_is_heeded_up_to_a_day(
    service: Service, receiver: Receiver, status: int, said: str, least: float, most: float
) -> None:
    before = time.time()
    if said == "in_200_seconds":
        said = formatdate(before + 200, usegmt=True)
    receiver.answer(Answer(status, {"Retry-After": said}))
    webhook = queue_one(service, receiver.url())
    with sending(service, retry_seconds=(10,)):
        first = settled(service, webhook, lambda delivery: delivery.status_code)
    assert first.next_attempt_at is not None
    assert before + least <= first.next_attempt_at <= time.time() + most


def test_a_redirect_is_a_failure_and_is_not_followed(service: Service, receiver: Receiver) -> None:
    receiver.answer(Answer(307, {"Location": receiver.url("/elsewhere")}))
    webhook = queue_one(service, receiver.url())
    with sending(service, retry_seconds=()):
        last = settled(service, webhook)
    assert (last.status, last.status_code) == ("dead", 307)
    assert last.error is not None
    assert "redirects are not followed" in last.error
    assert [received.path for received in receiver.received] == ["/hook"]


def test_a_receiver_that_is_gone_disables_the_webhook_and_a_ping_enables_it(
    open_http: httpx.Client, service: Service, receiver: Receiver
) -> None:
    receiver.answer(Answer(410))
    webhook = queue_one(service, receiver.url())
    assert settled(service, webhook).status == "dead"
    shown = open_http.get(f"/v1/webhooks/{webhook.id}").json()
    assert (shown["status"], shown["disabled_reason"]) == ("disabled", "its endpoint answered 410 Gone")
    Submit(service)()
    assert open_http.post(f"/v1/webhooks/{webhook.id}/ping").status_code == 202
    receiver.wait(2)
    settled(service, webhook)
    assert open_http.get(f"/v1/webhooks/{webhook.id}").json()["status"] == "active"
    assert len(receiver.received) == 2


def test_a_receiver_that_hangs_holds_up_nobody(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ANSWER_SECONDS", "_LEASE_SECONDS"):
        monkeypatch.setattr(webhooks, name, 2 * PATIENCE_SECONDS)
    held = threading.Event()
    receiver.answer(*[Answer(held=held)] * 40, path="/slow")
    slow = [service.webhooks.create(NewWebhook(url=receiver.url("/slow"), events=("job.queued",))) for _ in range(5)]
    quick = service.webhooks.create(NewWebhook(url=receiver.url("/quick"), events=("job.queued",)))
    for _ in range(4):
        Submit(service)()
    try:
        with sending(service, retry_seconds=()):
            until(
                lambda: {delivery.status for delivery in service.webhooks.deliveries(quick.id)} == {"delivered"},
                "they wait for the slow ones",
            )
            assert len(service.webhooks.deliveries(quick.id)) == 4
            assert receiver.most_at_once <= 2 * 6
            last = [delivery for webhook in slow for delivery in service.webhooks.deliveries(webhook.id)]
            assert {delivery.status for delivery in last} == {"pending"}
            held.set()
            until(lambda: all(is_over(each) for hook in slow for each in service.webhooks.deliveries(hook.id)))
    finally:
        held.set()


def test_a_receiver_that_hangs_fails_in_time(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "ANSWER_SECONDS", 1)
    receiver.answer(Answer(after_seconds=3_600))
    webhook = queue_one(service, receiver.url())
    with sending(service, retry_seconds=()):
        last = settled(service, webhook)
    assert (last.status, last.error) == ("dead", "there was no answer within 1 s")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Answer(200, body=b"x" * 2**16, repeat=1_000_000), "delivered"),
        (Answer(200, {"Content-Encoding": "gzip"}, body=b"no gzip"), "delivered"),
        (Answer(204, body=b""), "delivered"),
        (Answer(199, body=b""), "dead"),
    ],
    ids=["endless", "badly encoded", "empty", "no final status"],
)
def test_the_status_alone_counts_and_little_of_an_answer_is_read(
    service: Service, receiver: Receiver, answer: Answer, status: str
) -> None:
    receiver.answer(answer)
    webhook = queue_one(service, receiver.url())
    with sending(service, retry_seconds=()):
        assert settled(service, webhook).status == status


def test_an_answer_that_comes_in_time_counts_however_long_its_content_takes(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "ANSWER_SECONDS", 8)
    receiver.answer(Answer(200, content_after_seconds=16))
    webhook = queue_one(service, receiver.url())
    with sending(service, retry_seconds=()):
        assert settled(service, webhook).status == "delivered"


def test_who_cannot_be_reached_is_said_in_words(service: Service) -> None:
    webhook = queue_one(service, f"http://127.0.0.1:{free_port()}/")
    with sending(service, retry_seconds=()):
        last = settled(service, webhook)
    assert (last.status, last.status_code) == ("dead", None)
    assert last.error is not None
    assert last.error.startswith("the connection failed: ")


# Where it is sent


def test_a_private_address_is_refused_when_it_is_sent_too(service: Service, receiver: Receiver) -> None:
    webhook = queue_one(service, receiver.url(host="localhost"))
    with sending(service, Addresses(), retry_seconds=()):
        last = settled(service, webhook)
    assert last.error is not None
    assert last.error.startswith("not sent: the host localhost is not at a public address")
    assert receiver.received == []


def test_the_connection_is_made_to_the_address_that_was_checked(service: Service, receiver: Receiver) -> None:
    """A name is resolved once an attempt: one that leads elsewhere the next time gains nothing by it."""
    answers = [["127.0.0.1"], ["127.0.0.1", "10.0.0.1"]]
    asked: list[str] = []

    def resolve(host: str) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    webhook = queue_one(service, receiver.url(host="rebinding.invalid"))
    with sending(service, Addresses([LOOPBACK], resolve), retry_seconds=()):
        assert settled(service, webhook).status == "delivered"
        Submit(service)()
        last = settled(service, webhook)
    assert last.error is not None
    assert "not at a public address" in last.error
    assert asked == ["rebinding.invalid"] * 2
    (received,) = receiver.received
    assert received.headers["host"] == f"rebinding.invalid:{receiver.port}"


def test_the_next_address_is_tried_where_one_does_not_answer(service: Service, receiver: Receiver) -> None:
    webhook = queue_one(service, receiver.url(host="two.invalid"))
    with sending(service, Addresses([LOOPBACK], lambda host: ["127.0.0.2", "127.0.0.1"]), retry_seconds=()):
        assert settled(service, webhook).status == "delivered"
    assert len(receiver.received) == 1


@pytest.mark.parametrize(("certified", "status"), [("receiver.example", "delivered"), ("other.example", "dead")])
def test_the_certificate_must_be_the_names(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certified: str, status: str
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    authority.issue_cert(certified).private_key_and_cert_chain_pem.write_to_path(tmp_path / "certificate.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    with receiving(tmp_path / "certificate.pem") as receiver:
        webhook = queue_one(service, receiver.url(host="receiver.example", scheme="https"))
        with sending(service, Addresses([LOOPBACK], lambda host: ["127.0.0.1"]), retry_seconds=()):
            last = settled(service, webhook)
    assert last.status == status
    assert len(receiver.received) == (status == "delivered")
    if status == "dead":
        assert last.error is not None
        assert "certificate" in last.error


def test_no_proxy_is_asked(service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        webhook = queue_one(service, receiver.url())
        with sending(service, retry_seconds=()):
            assert settled(service, webhook).status == "delivered"
        assert proxy.received == []


# Several processes, which may die


def wait_for(port: int) -> None:
    """Until somebody listens there."""

    def listens() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    until(listens, f"nobody listens on port {port}")


@contextmanager
def api_processes(settings: Settings, directory: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    environment = {
        **os.environ,
        "FLOWPP_REDIS_URL": settings.redis_url,
        "FLOWPP_DATA_DIRECTORY": str(settings.data_directory),
        "FLOWPP_AUTHENTICATION": "false",
        "FLOWPP_WEBHOOK_NETWORKS": "127.0.0.0/8",
    }
    processes = []
    ports = [free_port() for _ in range(count)]
    try:
        for port in ports:
            command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
            processes.append(child.start(command, directory / f"api-{port}.log", environment))
        for port in ports:
            wait_for(port)
        yield processes
    finally:
        for process in processes:
            child.stop(process, PATIENCE_SECONDS)


def test_what_a_killed_process_was_sending_is_sent_by_another(
    service: Service, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.answer(Answer(after_seconds=3_600))
    webhook = queue_one(service, receiver.url())
    with api_processes(service.settings, tmp_path, 1) as (first,):
        (interrupted,) = receiver.wait(1)
        first.kill()
        first.wait()
    assert service.webhooks.deliveries(webhook.id)[0].status == "pending"
    with api_processes(service.settings, tmp_path, 1):
        _, again = receiver.wait(2)
        last = settled(service, webhook)
    assert (again.id, again.body) == (interrupted.id, interrupted.body)
    assert again.verified(webhook.secret)["type"] == "job.queued"
    assert again.at - interrupted.at > webhooks.ANSWER_SECONDS, "it was sent twice at a time"
    assert (last.status, last.attempts) == ("delivered", 2)


def test_a_sender_outlives_its_redis_server(receiver: Receiver, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        settings = Settings(redis_url=server.url, data_directory=tmp_path / "data")
        with Service(settings) as service:
            webhook = service.webhooks.create(NewWebhook(url=receiver.url(), events=("job.queued",)))
            with sending(service):
                assert server.process is not None
                server.process.kill()
                server.process.wait()
                time.sleep(2)
                server.start()
                Submit(service)()
                assert settled(service, webhook).status == "delivered"
    assert len(receiver.received) == 1


def test_two_processes_deliver_each_event_once(service: Service, receiver: Receiver, tmp_path: Path) -> None:
    found = [service.webhooks.create(NewWebhook(url=receiver.url(f"/{n}"), events=("job.queued",))) for n in range(3)]
    receiver.answer(*[Answer(after_seconds=0.1)] * 1_000)
    jobs: list[str] = []
    with api_processes(service.settings, tmp_path, 2) as processes:
        ports: list[set[int]] = [set(), set()]

        def both_work() -> bool:
            return all(seen & {received.port for received in receiver.received} for seen in ports)

        def all_have_come() -> bool:
            if len(jobs) < 30 or not both_work():
                jobs.append(Submit(service)().id)
            for _ in range(5):
                for process, seen in zip(processes, ports, strict=True):
                    seen |= {each.laddr.port for each in psutil.Process(process.pid).net_connections("tcp")}
                time.sleep(0.03)
            return len(receiver.received) >= 3 * len(jobs) and both_work()

        until(all_have_come, "one of them does nothing")
        time.sleep(1)
    told = [(received.path, json.loads(received.body)["data"]["id"]) for received in receiver.received]
    assert sorted(told) == sorted((f"/{n}", job) for n in range(3) for job in jobs)
    assert len({received.id for received in receiver.received}) == 3 * len(jobs)
    assert all(len(service.webhooks.deliveries(webhook.id)) == min(100, len(jobs)) for webhook in found)


def test_no_secret_is_in_the_log(service: Service, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.answer(Answer(500))
    with caplog.at_level("DEBUG", logger="api"), caplog.at_level("INFO", logger="httpx"):
        webhook = queue_one(service, receiver.url("/hook?token=hidden"))
        with sending(service, retry_seconds=()):
            settled(service, webhook)
    assert "it answered 500" in caplog.text
    assert "hidden" not in caplog.text
    assert webhook.secret not in caplog.text
    assert webhook.secret not in repr(webhook)
