"""Whether the process lives, and whether the service can work."""

from fastapi import APIRouter, Response

from api.dependencies import ServiceOf
from api.schemas import Health, Readiness
from worker.queue import QUEUES
from worker.readiness import faults

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Something is missing."}})
def readyz(response: Response, service: ServiceOf) -> Readiness:
    """200 where Redis and the store take what is written and a worker of each kind is there.

    Else 503 and what is missing.
    """
    missing = faults(service)
    checks = dict.fromkeys(("redis", "store", *QUEUES), "ok")
    if "redis" in missing:
        checks |= dict.fromkeys(QUEUES, "unknown")
    if missing:
        response.status_code = 503
    status = "unready" if missing else "ok"
    return Readiness.model_validate({"status": status, "missing": list(missing.values()), "checks": checks | missing})
