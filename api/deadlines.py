"""`Cancel-After`, and the creation of jobs: how long after it one is cancelled, if it has not finished."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.exceptions import RequestValidationError

from api.durations import FORMS, seconds_of
from api.idempotency import Creation, IdempotencyKey
from api.observation import request_id_of, traceparent_of
from worker.submission import Terms


async def _cancel_after(
    cancel_after: Annotated[
        str | None,
        Header(description=f"Cancel the job so long after now, if it has not finished: {FORMS}."),
    ] = None,
) -> int | None:
    if cancel_after is None:
        return None
    seconds = seconds_of(cancel_after)
    if seconds is None:
        where = {"type": "value_error", "loc": ("header", "Cancel-After"), "msg": f"give {FORMS}", "input": None}
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
