"""Options that many commands take, as types, and what they mean."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Annotated

import typer

from api.client import Client, ClientError
from flowpp.presets import PRESETS, PUBLISHED

COMPLETION_SECONDS = 2.0
"""Nobody waits longer for suggestions."""

Url = Annotated[str, typer.Option("--url", envvar="FLOWPP_URL", help="Where the service is.")]
Key = Annotated[
    str, typer.Option("--key", envvar="FLOWPP_API_KEY", help="The key that opens it, where it asks for one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Limit = Annotated[int, typer.Option(min=1, help="List so many, newest first.")]
Metadata = Annotated[
    list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Of your own, to find it by. Repeat.")
]
CancelAfter = Annotated[
    str | None,
    typer.Option(metavar="DURATION", help="Cancel it where it has not finished by then: seconds, or 90s, 5m, 2h."),
]
TestAsValidation = Annotated[
    bool,
    typer.Option("--test-as-validation", help="Images named as test images choose the best checkpoint."),
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Print the job's id, and do not wait for its end.")]


def _suggestions(ids: Callable[[Client], list[str]]) -> Callable[[typer.Context, str], list[str]]:
    """Ids of the service that --url names; none where it cannot be reached."""

    def suggest(context: typer.Context, incomplete: str) -> list[str]:
        url, key = (context.params.get(name) or "" for name in ("url", "key"))
        with (
            suppress(ClientError, ValueError),
            Client(url, key=key, timeout=COMPLETION_SECONDS, max_retries=0) as client,
        ):
            return [each for each in ids(client) if each.startswith(incomplete)]
        return []

    return suggest


def _jobs(client: Client) -> list[str]:
    return [job.id for job in islice(client.jobs.list(), 20)]


def _models(client: Client) -> list[str]:
    jobs = [job.id for job in islice(client.jobs.list(type="training"), 20)]
    return jobs + _checkpoints(client)


def _datasets(client: Client) -> list[str]:
    return [dataset.id for dataset in islice(client.datasets.list(), 20)]


def _checkpoints(client: Client) -> list[str]:
    return [checkpoint.id for checkpoint in islice(client.checkpoints.list(), 20)]


def _webhooks(client: Client) -> list[str]:
    return [webhook.id for webhook in islice(client.webhooks.list(), 20)]


TYPES = ("training", "likelihood", "sampling")
STATUSES = ("queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled")

suggested_datasets, suggested_models = _suggestions(_datasets), _suggestions(_models)

JobId = Annotated[str, typer.Argument(metavar="JOB", autocompletion=_suggestions(_jobs))]
DatasetId = Annotated[str, typer.Argument(metavar="DATASET", autocompletion=suggested_datasets)]
CheckpointId = Annotated[str, typer.Argument(metavar="CHECKPOINT", autocompletion=_suggestions(_checkpoints))]
WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", autocompletion=_suggestions(_webhooks))]
Model = Annotated[
    str,
    typer.Argument(
        autocompletion=suggested_models, help="A checkpoint's id, or a training job's: its best checkpoint."
    ),
]
Preset = Annotated[str, typer.Option(autocompletion=lambda: list(PRESETS), help="One of `flowpp presets list`.")]
Published = Annotated[
    str, typer.Option(autocompletion=lambda: list(PUBLISHED), help=f"The model it is of: {', '.join(PUBLISHED)}.")
]


def pairs(metadata: Sequence[str] | None) -> dict[str, str]:
    """Of NAME=VALUE. Raises `typer.BadParameter`."""
    found = {}
    for text in metadata or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"--metadata {text}: write NAME=VALUE")
        found[name] = value
    return found
