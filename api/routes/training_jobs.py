"""Training jobs."""

from typing import Annotated

from fastapi import APIRouter, Body
from fastapi.concurrency import run_in_threadpool

from api.answers import AnswerOf
from api.deadlines import JobCreation, JobCreationOf
from api.schemas import JobObject
from worker.jobs import Job
from worker.requests import TrainingRequest
from worker.submission import submit_training

router = APIRouter(prefix="/training-jobs", tags=["jobs"])

EXAMPLE = {"dataset": "ds_0123456789abcdef01234567", "model": {"preset": "small"}, "training": {"steps": 700}}


@router.post(
    "",
    status_code=202,
    responses={200: {"model": JobObject, "description": "Finished within `wait`."}},
)
async def train(
    wanted: Annotated[TrainingRequest, Body(examples=[EXAMPLE])], creation: JobCreationOf, answer: AnswerOf
) -> JobObject:
    """Train a model on a dataset. Answers at once with the queued job, unless told to wait; follow its events."""
    async with creation:
        job = await run_in_threadpool(_submit, creation, wanted)
    return await answer(job)


def _submit(creation: JobCreation, wanted: TrainingRequest) -> Job:
    terms = creation.terms(wanted.model_dump(mode="json"))
    if creation.existing:
        return creation.service.jobs.get(creation.existing)
    return submit_training(creation.service, wanted, terms)
