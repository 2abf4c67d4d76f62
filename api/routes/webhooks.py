"""Webhooks: where the caller is told of its jobs' events."""

from typing import Annotated

from fastapi import APIRouter, Body, Header
from fastapi.concurrency import run_in_threadpool

from api.addresses import Addresses, parse
from api.dependencies import CallerOf, ServiceOf, WebhookOf
from api.idempotency import Creation, CreationOf
from api.schemas import After, JobEvent, Limit, ListOf, Order, as_list
from worker.paging import Page
from worker.webhooks import CreatedWebhook, Delivery, NewWebhook, Webhook

router = APIRouter(prefix="/webhooks", tags=["webhooks"])

sent = APIRouter()
"""What webhooks are sent, for the OpenAPI document: nothing is served here."""

EXAMPLE = {"url": "https://example.com/flowpp", "events": ["job.succeeded", "job.failed"]}


@router.post("", status_code=201)
async def create_webhook(
    wanted: Annotated[NewWebhook, Body(examples=[EXAMPLE])], creation: CreationOf
) -> CreatedWebhook:
    """Be told of your jobs' events by signed requests (Standard Webhooks). The secret is shown this once."""
    async with creation:
        webhook = await run_in_threadpool(_create, creation, wanted)
    creation.response.headers["Location"] = f"/v1/webhooks/{webhook.id}"
    return webhook


def _create(creation: Creation, wanted: NewWebhook) -> CreatedWebhook:
    service = creation.service
    claim = creation.claim(wanted.model_dump(mode="json"))
    if creation.existing:
        return service.webhooks.created(creation.existing)
    Addresses(service.settings.webhook_networks).of(parse(wanted.url))
    return service.webhooks.create(wanted, creation.caller.owner, claim)


@router.get("")
def list_webhooks(
    service: ServiceOf, caller: CallerOf, after: After = None, limit: Limit = 20, order: Order = "desc"
) -> ListOf[Webhook]:
    """List webhooks."""
    page = service.webhooks.page(after=after, limit=limit, order=order, owner=caller.sees)
    return ListOf[Webhook](**as_list(page))


@router.get("/{webhook_id}")
def get_webhook(webhook: WebhookOf) -> Webhook:
    """Get a webhook, without its secret."""
    return webhook


@router.delete("/{webhook_id}", status_code=204)
def delete_webhook(webhook: WebhookOf, service: ServiceOf) -> None:
    """Delete a webhook, and what was still to be sent to it."""
    service.webhooks.delete(webhook.id)


@router.post("/{webhook_id}/ping", status_code=202)
def ping(webhook: WebhookOf, service: ServiceOf) -> Delivery:
    """Send a `ping`, which is tried once; what came of it is in the deliveries. One that arrives enables a disabled
    webhook."""
    return service.webhooks.ping(webhook.id)


@router.get("/{webhook_id}/deliveries")
def list_deliveries(webhook: WebhookOf, service: ServiceOf) -> ListOf[Delivery]:
    """The last 100 deliveries that are over, and up to 100 that wait, newest first: why something did not arrive."""
    return ListOf[Delivery](**as_list(Page(service.webhooks.deliveries(webhook.id), has_more=False)))


@sent.post("job-event", status_code=204)
def job_event(
    event: JobEvent,
    webhook_id: Annotated[str, Header(description="The same whenever the event is sent again.")],
    webhook_timestamp: Annotated[int, Header(description="Unix seconds, when it was sent.")],
    webhook_signature: Annotated[str, Header(description="As Standard Webhooks has it; made with the secret.")],
) -> None:
    """A job's event, sent to your webhook. Answer 2xx within 10 seconds, else it is sent again later; check the
    signature with a library of standardwebhooks.com. A `ping` has the id of the webhook as its `data`."""
