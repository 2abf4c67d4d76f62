"""What the client raises.

    Exception
    ├── ClientError
    │   ├── ProblemError      the service refuses, or fails: status, code, detail, errors
    │   ├── Unreachable       the service cannot be reached, or breaks off, and retries did not help: url, reason
    │   └── DamagedDownload   what arrived is not what the service has
    ├── TimeoutError          a job has not finished in the time it was waited for
    └── ValueError            a url or key that cannot be one

None of them holds the key.
"""

from dataclasses import dataclass, field
from typing import Any

import httpx


class ClientError(Exception):
    """The service gave no result."""


@dataclass(eq=False)
class ProblemError(ClientError):
    """The service refused (RFC 9457): HTTP status, stable code, a sentence, and for each field its path and detail."""

    status: int
    code: str
    detail: str
    errors: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        said = [f"{error.get('path', '')}: {error.get('detail', '')}" for error in self.errors]
        further = [each for each in said if not any(part in self.detail for part in (each, each.partition(": ")[2]))]
        return "\n  ".join([f"{self.detail} ({self.code})", *further])


@dataclass(eq=False)
class Unreachable(ClientError):
    """No connection to the service came about, or it broke off; the httpx error is the cause."""

    url: str
    reason: str

    def __str__(self) -> str:
        return f"the service at {self.url} cannot be reached: {self.reason}; is the service running?"


class DamagedDownload(ClientError):
    """What arrived is not what the service has; it is not kept."""


def problem_of(response: httpx.Response) -> ProblemError:
    """The refusal in a response that has been read."""
    try:
        problem = response.json()
        code, detail = problem["code"], problem["detail"]
    except (ValueError, LookupError, TypeError):  # not our service, or a proxy before it
        return ProblemError(response.status_code, "http_error", response.text[:500] or response.reason_phrase)
    return ProblemError(response.status_code, code, detail or problem.get("title", ""), problem.get("errors") or [])
