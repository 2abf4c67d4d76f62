"""Options that many commands take, as types."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import islice
from typing import Annotated

import typer

from api.client import Client, ClientError
from api.commands.ids import id_of
from api.durations import FORMS, seconds_of
from flowpp.names import meant
from flowpp.presets import PRESETS, PUBLISHED

COMPLETION_SECONDS = 2.0
"""A completion that takes longer is given up."""

Url = Annotated[str, typer.Option("--url", envvar="FLOWPP_URL", help="Address of the service.")]
Key = Annotated[str, typer.Option("--key", envvar="FLOWPP_API_KEY", help="API key, if the service needs one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Limit = Annotated[int, typer.Option(min=1, help="Number of objects to list, newest first.")]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=VALUE", help="Your own label, to find the job by. Repeat for several."),
]


def _duration(text: str | None) -> str | None:
    if text is not None and seconds_of(text) is None:
        raise typer.BadParameter(f"{text!r} is no duration; give {FORMS}")
    return text


CancelAfter = Annotated[
    str | None,
    typer.Option(
        metavar="DURATION",
        callback=_duration,
        help="Cancel the job if it has not finished after this time: seconds, or 90s, 5m, 2h, 1d.",
    ),
]
TestAsValidation = Annotated[
    bool,
    typer.Option("--test-as-validation", help="Images named as test images choose the best checkpoint."),
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Print the job's id, and do not wait for its end.")]


def _suggestions(ids: Callable[[Client], list[str]]) -> Callable[[typer.Context, str], list[str]]:
    """Returns a completion with the ids of the service at --url. It is empty if the service cannot be reached."""

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


def one_of(known: Collection[str]) -> Callable[[str | None], str | None]:
    """Returns the callback of an option that takes one of these names."""

    def check(name: str | None) -> str | None:
        if name is not None and name not in known:
            raise typer.BadParameter(f"{name!r} is unknown; {meant(name, known)}")
        return name

    return check


TYPES = ("training", "likelihood", "sampling")
STATUSES = ("queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled")
EVENTS = (
    "job.queued",
    "job.running",
    "job.paused",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "job.checkpoint",
)

suggested_datasets, suggested_models = _suggestions(_datasets), _suggestions(_models)

JobId = Annotated[
    str, typer.Argument(metavar="JOB", autocompletion=_suggestions(_jobs), callback=id_of("job"), help="The job's id.")
]
DatasetId = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", autocompletion=suggested_datasets, callback=id_of("dataset"), help="The dataset's id."
    ),
]
CheckpointId = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        autocompletion=_suggestions(_checkpoints),
        callback=id_of("checkpoint"),
        help="The checkpoint's id.",
    ),
]
WebhookId = Annotated[
    str,
    typer.Argument(
        metavar="WEBHOOK", autocompletion=_suggestions(_webhooks), callback=id_of("webhook"), help="The webhook's id."
    ),
]
is_model = id_of("checkpoint", "job")
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=suggested_models,
        callback=is_model,
        help="A checkpoint's id, or a training job's id, which means its best checkpoint.",
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        autocompletion=lambda: list(PRESETS),
        callback=one_of(PRESETS),
        help="Model and recipe: `flowpp presets list` lists them, `flowpp presets NAME` prints every field.",
    ),
]
Published = Annotated[
    str,
    typer.Option(
        autocompletion=lambda: list(PUBLISHED),
        callback=one_of(PUBLISHED),
        help=f"The model that the weights belong to: {', '.join(PUBLISHED)}.",
    ),
]


def pairs(metadata: Sequence[str] | None) -> dict[str, str]:
    """Returns the names and values of `NAME=VALUE`. Raises `typer.BadParameter`."""
    found = {}
    for text in metadata or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"--metadata {text}: write NAME=VALUE")
        found[name] = value
    return found
