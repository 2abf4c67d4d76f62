"""Training jobs."""

from typing import Annotated

from fastapi import APIRouter, Body
from fastapi.concurrency import run_in_threadpool

from api.answers import AnswerOf
from api.deadlines import CancelAfter
from api.idempotency import Creation, CreationOf
from api.schemas import JobObject
from worker.jobs import Job
from worker.requests import TrainingRequest

router = APIRouter(prefix="/training-jobs", tags=["jobs"])

EXAMPLE = {"dataset": "ds_0123456789abcdef01234567", "model": {"preset": "small"}, "training": {"steps": 700}}


@router.post(
    "",
    status_code=202,
    responses={200: {"model": JobObject, "description": "Finished within `wait`."}},
)
async def train(
    wanted: Annotated[TrainingRequest, Body(examples=[EXAMPLE])],
    creation: CreationOf,
    answer: AnswerOf,
    cancel_after: CancelAfter,
) -> JobObject:
    """Train a model on a dataset. Answers at once with the queued job, unless told to wait; follow its events."""
    async with creation:
        job = await run_in_threadpool(_submit, creation, wanted, cancel_after)
    return await answer(job)


def _submit(creation: Creation, wanted: TrainingRequest, cancel_after: int | None) -> Job:
    claim = creation.claim(wanted.model_dump(mode="json"))
    if creation.existing:
        return creation.service.jobs.get(creation.existing)
    return creation.service.submit_training(wanted, creation.caller, claim, cancel_after)
