"""What the service does at the moment."""

from fastapi import APIRouter

from api.dependencies import CallerOf, ServiceOf
from api.schemas import Status
from worker.overview import overview

router = APIRouter(prefix="/status", tags=["health"])


@router.get("")
def status(service: ServiceOf, caller: CallerOf) -> Status:
    """Workers and queues; how many jobs there are, and how far the training jobs are that run.

    Jobs are those of the key's owner; with the scope `admin`, or without authentication, everybody's.
    """
    found = overview(service.redis, caller.sees)
    return Status(**dict(found), owner=caller.owner, scopes=sorted(caller.scopes))
