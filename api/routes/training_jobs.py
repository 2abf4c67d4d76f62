"""Training jobs."""

from typing import Annotated

from fastapi import APIRouter, Body, Response

from api.dependencies import ServiceOf
from api.schemas import JobObject
from worker.requests import TrainingRequest

router = APIRouter(prefix="/training-jobs", tags=["jobs"])

EXAMPLE = {"dataset": "ds_0123456789abcdef01234567", "model": {"preset": "small"}, "training": {"steps": 700}}


@router.post("", status_code=202)
def train(
    request: Annotated[TrainingRequest, Body(examples=[EXAMPLE])], response: Response, service: ServiceOf
) -> JobObject:
    """Train a model on a dataset. Answers at once with the queued job; follow its events."""
    job = service.submit_training(request)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobObject(**dict(job), queue_position=service.jobs.queue_position(job))
