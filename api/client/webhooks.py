"""Webhooks: where the caller is told of its jobs' events, and what became of the deliveries there."""

from collections.abc import AsyncIterator, Sequence

from api.client.calls import W, call, each
from api.client.objects import CreatedWebhook, Delivery, Webhook
from api.client.transport import Part, path_of


class Webhooks(Part[W]):
    @call
    async def create(self, url: str, events: Sequence[str] | None = None) -> CreatedWebhook:
        """Has the events of your jobs sent to `url`: these, or all. The secret is shown this once."""
        body = {"url": url} if events is None else {"url": url, "events": list(events)}
        return await self._transport.create(CreatedWebhook, "/v1/webhooks", json=body)

    @call
    async def get(self, webhook_id: str) -> Webhook:
        return await self._transport.get(Webhook, path_of("webhooks", webhook_id))

    @each
    def list(self) -> AsyncIterator[Webhook]:
        """Newest first."""
        return self._transport.pages(Webhook, "/v1/webhooks", {})

    @call
    async def delete(self, webhook_id: str) -> None:
        """With what was still to be sent to it."""
        await self._transport.request("DELETE", path_of("webhooks", webhook_id))

    @call
    async def ping(self, webhook_id: str) -> Delivery:
        """Sends a `ping`, which is tried once; one that arrives makes a disabled webhook active again."""
        return await self._transport.post(Delivery, path_of("webhooks", webhook_id, "ping"))

    @call
    async def deliveries(self, webhook_id: str) -> tuple[Delivery, ...]:
        """The last 100 that are over, and up to 100 that wait, newest first."""
        return await self._transport.all(Delivery, path_of("webhooks", webhook_id, "deliveries"))
