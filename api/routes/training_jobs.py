"""Training jobs."""

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.answers import answer
from api.dependencies import CallerOf, FinishedOf, ServiceOf, WaitSeconds
from api.idempotency import Creation, IdempotencyKey, creation
from api.schemas import JobObject
from worker.jobs import Job
from worker.keys import Caller
from worker.requests import TrainingRequest
from worker.service import Service

router = APIRouter(prefix="/training-jobs", tags=["jobs"])

EXAMPLE = {"dataset": "ds_0123456789abcdef01234567", "model": {"preset": "small"}, "training": {"steps": 700}}


@router.post(
    "",
    status_code=202,
    responses={200: {"model": JobObject, "description": "Finished within `wait`."}},
)
async def train(
    wanted: Annotated[TrainingRequest, Body(examples=[EXAMPLE])],
    request: Request,
    response: Response,
    service: ServiceOf,
    caller: CallerOf,
    finished: FinishedOf,
    wait_seconds: WaitSeconds,
    idempotency_key: IdempotencyKey = None,
) -> JobObject:
    """Train a model on a dataset. Answers at once with the queued job, unless told to wait; follow its events."""
    async with creation(request, response, service, caller, idempotency_key) as once:
        job = await run_in_threadpool(_submit, service, wanted, caller, once)
    return await answer(service, finished, job, response, wait_seconds)


def _submit(service: Service, wanted: TrainingRequest, caller: Caller, once: Creation) -> Job:
    claim = once.claim(wanted.model_dump(mode="json"))
    return service.jobs.get(once.existing) if once.existing else service.submit_training(wanted, caller, claim)
