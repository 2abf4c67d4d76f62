"""`flowpp webhooks`."""

from itertools import islice
from typing import Annotated

import typer

from api.client import Delivery
from api.client.transport import LOCAL
from api.commands.options import EVENTS, AsJson, Key, Limit, Url, WebhookId, one_of
from api.commands.output import note, print_json, print_list, print_object, service_at, when

app = typer.Typer(no_args_is_help=True, help="Addresses that receive your jobs' events.")
check_event = one_of(EVENTS)


@app.command()
def create(
    address: Annotated[str, typer.Argument(metavar="URL", help="http or https address that receives the events.")],
    event: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EVENT",
            autocompletion=lambda: list(EVENTS),
            help=f"One of {', '.join(EVENTS)}; all by default. Repeat for several.",
        ),
    ] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Create a webhook. Prints it with the secret that verifies its events.

    The secret cannot be printed again.
    """
    for name in event or ():
        check_event(name)
    with service_at(url, key) as client:
        print_object(client.webhooks.create(address, event or None), as_json)
    note("The secret is shown this once.")


@app.command("list")
def list_(limit: Limit = 20, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """List webhooks. Prints id, status, creation time, address and events."""
    with service_at(url, key) as client:
        print_list(
            ("webhook", "status", "created", "url", "events"),
            islice(client.webhooks.list(), limit),
            as_json,
            lambda w: (w.id, w.status, when(w.created_at), w.url, " ".join(w.events)),
        )


@app.command()
def show(webhook: WebhookId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Print the record of a webhook, without its secret."""
    with service_at(url, key) as client:
        print_object(client.webhooks.get(webhook), as_json)


@app.command()
def delete(webhook: WebhookId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Delete a webhook and its pending deliveries."""
    with service_at(url, key) as client:
        client.webhooks.delete(webhook)
    if as_json:
        print_json({"id": webhook, "deleted": True})


@app.command()
def ping(webhook: WebhookId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Send a ping. Prints the id of its delivery.

    It is tried once, and `deliveries` lists its result.
    """
    with service_at(url, key) as client:
        delivery = client.webhooks.ping(webhook)
    if as_json:
        print_json(delivery)
    else:
        typer.echo(delivery.id)


@app.command()
def deliveries(webhook: WebhookId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """List the last deliveries.

    Prints id, event, status, attempts, last and next attempt, HTTP status and error.
    """
    head = ("delivery", "event", "status", "attempts", "last attempt", "next attempt", "answer", "why")
    with service_at(url, key) as client:
        print_list(head, client.webhooks.deliveries(webhook), as_json, _row)


def _row(delivery: Delivery) -> tuple[str, ...]:
    return (
        delivery.id,
        delivery.type,
        delivery.status,
        str(delivery.attempts),
        when(delivery.last_attempt_at),
        when(delivery.next_attempt_at),
        "" if delivery.status_code is None else str(delivery.status_code),
        delivery.error or "",
    )
