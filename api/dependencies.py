"""What endpoints depend on, as types."""

from typing import Annotated

from fastapi import Depends, Path, Request

from worker.datasets import Dataset
from worker.jobs import Job
from worker.keys import Caller
from worker.models import Checkpoint
from worker.service import Service
from worker.webhooks import Webhook


# What needs no Redis is async: FastAPI would send it to a thread, which takes longer than it does.
async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


CallerOf = Annotated[Caller, Depends(_caller)]


def _job(job_id: Annotated[str, Path(description="A job's id: job_...")], service: ServiceOf, caller: CallerOf) -> Job:
    return service.jobs.get(job_id, caller.sees)


def _dataset(
    dataset_id: Annotated[str, Path(description="A dataset's id: ds_...")], service: ServiceOf, caller: CallerOf
) -> Dataset:
    return service.datasets.get(dataset_id, caller.sees)


def _checkpoint(
    checkpoint_id: Annotated[str, Path(description="A checkpoint's id: ckpt_...")], service: ServiceOf, caller: CallerOf
) -> Checkpoint:
    return service.checkpoints.get(checkpoint_id, caller.sees)


def _webhook(
    webhook_id: Annotated[str, Path(description="A webhook's id: wh_...")], service: ServiceOf, caller: CallerOf
) -> Webhook:
    return service.webhooks.get(webhook_id, caller.sees)


JobOf = Annotated[Job, Depends(_job)]
"""The job of the path, if the caller may see it; else 404. The others alike."""

DatasetOf = Annotated[Dataset, Depends(_dataset)]
CheckpointOf = Annotated[Checkpoint, Depends(_checkpoint)]
WebhookOf = Annotated[Webhook, Depends(_webhook)]
