"""The HTTP application. `uvicorn api.app:create_app --factory` runs it; it never imports torch."""

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline
from redis.asyncio import ConnectionPool

from api import openapi, problems, redaction
from api.addresses import Addresses
from api.answers import Looks
from api.auth import Identification
from api.bodies import check_body
from api.head import answer_head
from api.intake import Intake
from api.observation import Observation
from api.queries import PREFIX, check_parameters
from api.routes import (
    artifacts,
    checkpoints,
    dashboard,
    datasets,
    errors,
    health,
    jobs,
    likelihood_jobs,
    metrics,
    presets,
    sampling_jobs,
    status,
    training_jobs,
    webhooks,
)
from api.submissions import Submissions
from api.webhooks import Sender
from flowpp import logs, tracing
from flowpp.environment import BrokenVariable
from flowpp.garbage_collection import settle
from worker.connection import options_in_a_loop
from worker.finished import Finished
from worker.metrics import ServiceMetrics, serving, together
from worker.reaper import Reaper
from worker.recorder import LEAVE_SECONDS, Recorder
from worker.service import Service
from worker.settings import Settings, from_environment

DESCRIPTION = """
Train Flow++ models on your images, ask for the bits/dim of images, draw samples.

Upload a dataset, start a training job on it, follow its events, then name the job (meaning its best checkpoint) or a
checkpoint as `model` of likelihood and sampling jobs. Lists come in pages: `after` the `last_id` while `has_more`.
Errors are `application/problem+json` (RFC 9457) with a stable `code`: [all of them](/docs/errors).

Every GET also answers HEAD. Send bodies without compression, and each field, parameter and name in JSON once. Files are
recognized by their content, whatever they are called. Their names are shown as they were sent; in place of control
characters, `\\` and bytes that are not UTF-8, an escape such as `\\n` is shown.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application over `settings`, by default the environment's."""
    alone = settings is None  # in a process of its own
    settings = settings or _settings()
    if settings.log_format == "json":
        _log_as_json()
    service = Service(settings)
    finished = Finished(service.settings.redis_url)
    sender = Sender(service.webhooks, Addresses(service.settings.webhook_networks))

    connections: ConnectionPool = ConnectionPool.from_url(service.settings.redis_url, **options_in_a_loop())

    registry = together(ServiceMetrics(service.redis))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        port = service.settings.metrics_port
        traced = tracing.sending("flowpp-api")
        with traced, service, Reaper(service), Recorder(service, LEAVE_SECONDS), serving(port, registry):
            async with finished.listening(), sender.sending(), aclosing(connections):
                if alone:
                    settle()
                yield

    app = FastAPIOffline(  # /docs without a CDN
        title="flowpp",
        version="0.1.0",
        summary="Flow++ as a service: train, score, sample.",
        description=DESCRIPTION,
        lifespan=lifespan,
        # Our spans are `Observation`'s: FastAPI's hold queries, where keys are sent by mistake.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        webhooks=webhooks.sent,
        responses={"4XX": {"model": problems.Problem, "description": "Refused; `code` and `detail` say why."}},
    )
    app.state.service = service
    app.state.finished = finished
    app.state.looks = Looks(service.jobs)
    app.state.submissions = Submissions(service)
    app.state.metrics = registry
    problems.install(app)
    redaction.install()
    app.add_middleware(Identification, settings=service.settings, connections=connections)
    app.add_middleware(Intake, max_large=service.settings.max_large_uploads)
    app.add_middleware(Observation)
    resources = (datasets, training_jobs, likelihood_jobs, sampling_jobs, jobs, artifacts, checkpoints, presets)
    of_all = [Depends(check_parameters), Depends(check_body)]
    for module in (*resources, webhooks, status):
        answer_head(module.router)
        app.include_router(module.router, prefix=PREFIX, dependencies=of_all)
    for plain in (dashboard, health, metrics, errors):
        answer_head(plain.router)
        app.include_router(plain.router)
    answer_head(app.router)  # the pages of documentation
    openapi.install(app)
    logging.getLogger("api").setLevel(logging.INFO)
    return app


def _settings() -> Settings:
    """The environment's; a variable that cannot be used ends the process with a sentence."""
    try:
        return from_environment()
    except BrokenVariable as error:
        raise SystemExit(f"flowpp: {error}") from None


def _log_as_json() -> None:
    logs.install(clean=redaction.redacted)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # which has given them handlers of their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
