"""What the service does at the moment."""

from fastapi import APIRouter

from api.dependencies import CallerOf, ServiceOf
from api.schemas import Status
from worker.overview import overview

router = APIRouter(prefix="/status", tags=["health"])


@router.get("")
def status(service: ServiceOf, caller: CallerOf) -> Status:
    """Workers, queues and how many jobs there are, everybody's; and how far the training jobs are that run."""
    found = overview(service.redis)
    mine = [job for job in found.training if caller.sees in (None, job.owner)]
    return Status(**dict(found) | {"training": mine})
