"""Whether the process lives, and whether the service can work."""

from fastapi import APIRouter, Response
from redis import RedisError

from api.dependencies import ServiceOf
from api.schemas import Health
from worker import presence
from worker.queue import QUEUES

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Health, "description": "Something is missing."}})
def readyz(response: Response, service: ServiceOf) -> Health:
    """200 where Redis, store and a worker of each kind are there; else 503 and what is missing."""
    missing = []
    try:
        service.check()
        missing += [f"no {queue} worker" for queue in QUEUES if not presence.count(service.redis, queue)]
    except RedisError as error:
        missing.append(f"Redis does not answer: {type(error).__name__}")
    except OSError as error:
        missing.append(f"the store cannot be written: {error.strerror}")
    if missing:
        response.status_code = 503
        return Health(status="unready", missing=missing)
    return Health(status="ok")
