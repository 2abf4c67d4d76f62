"""Metrics for Prometheus."""

from fastapi import APIRouter, Request, Response
from prometheus_client import generate_latest

from api.dependencies import CallerOf

router = APIRouter(include_in_schema=False)

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics")
def metrics(request: Request, caller: CallerOf) -> Response:
    """Those of this process, and of the whole service: who asks sees everybody's jobs (`Identification`)."""
    return Response(generate_latest(request.app.state.metrics), media_type=MEDIA_TYPE)
