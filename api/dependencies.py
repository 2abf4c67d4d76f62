"""What endpoints depend on, as types."""

import re
from typing import Annotated

from fastapi import Depends, Header, Request

from worker.service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]

MAX_WAIT_SECONDS = 60

_WAIT = re.compile(r"(?:^|[,;\s])wait=([0-9]{1,6})(?:$|[,;\s])")


def _wait_seconds(
    prefer: Annotated[
        str | None, Header(description="`wait=N`: answer 200 with the result if it comes within N <= 60 seconds.")
    ] = None,
) -> int:
    found = _WAIT.search(prefer or "")
    return min(MAX_WAIT_SECONDS, int(found.group(1))) if found else 0


WaitSeconds = Annotated[int, Depends(_wait_seconds)]
