"""`Cancel-After`, and the creation of jobs: how long after it one is cancelled, if it has not finished."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.exceptions import RequestValidationError

from api.idempotency import Creation, IdempotencyKey
from api.observation import request_id_of, traceparent_of
from worker.submission import Terms

LEAST_SECONDS = 5
MOST_SECONDS = 30 * 86_400

_DURATION = re.compile(r"(?:(\d{1,7})d)?(?:(\d{1,7})h)?(?:(\d{1,7})m)?(?:(\d{1,7})s?)?", re.IGNORECASE | re.ASCII)
_FORMS = "a number of seconds, or with units as 90s, 5m, 2h, 1d or 1h30m; at least 5 seconds and at most 30 days"


def seconds_of(duration: str) -> int | None:
    """The seconds of `90`, `90s`, `5m`, `2h`, `1d` or `1h30m`; none where it is no such, or too long or short."""
    found = _DURATION.fullmatch(duration.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = 86_400 * days + 3_600 * hours + 60 * minutes + seconds
    return total if LEAST_SECONDS <= total <= MOST_SECONDS else None


async def _cancel_after(
    cancel_after: Annotated[
        str | None,
        Header(description=f"Cancel the job so long after now, if it has not finished: {_FORMS}."),
    ] = None,
) -> int | None:
    if cancel_after is None:
        return None
    seconds = seconds_of(cancel_after)
    if seconds is None:
        where = {"type": "value_error", "loc": ("header", "Cancel-After"), "msg": f"give {_FORMS}", "input": None}
        raise RequestValidationError([where])
    return seconds


class JobCreation(Creation):
    """A creation of a job."""

    cancel_after: int | None = None

    def terms(self, values: Any, files: Iterable[tuple[str, Path | bytes]] = ()) -> Terms:
        """On what the job is submitted, by the content of the request. Raises as `claim`."""
        claim, request = self.claim(values, files), self.request
        return Terms(self.caller, claim, self.cancel_after, request_id_of(request), traceparent_of(request))


async def _job_creation(
    request: Request,
    response: Response,
    cancel_after: Annotated[int | None, Depends(_cancel_after)],
    idempotency_key: IdempotencyKey = None,
) -> JobCreation:
    # Looked up here: as dependencies of this one they would take longer than it does.
    creation = JobCreation(request, response, request.app.state.service, request.state.caller, idempotency_key)
    creation.cancel_after = cancel_after
    return creation


JobCreationOf = Annotated[JobCreation, Depends(_job_creation)]
