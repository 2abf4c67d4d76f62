"""Settings of the service: environment variables FLOWPP_..."""

import os
import ssl
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
from pydantic import Field, IPvAnyNetwork, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from redis.connection import parse_url

from flowpp import levels, tracing
from flowpp.data import Limits
from flowpp.environment import BrokenVariable

MiB = 2**20

MAX_ZIP_ENTRIES = 80_000
"""Of an uploaded zip, whose directory is held in memory: an API process stays below 200 MB. A tar may have more."""


class Settings(BaseSettings):
    """Where things are kept, and what the service admits."""

    model_config = SettingsConfigDict(env_prefix="FLOWPP_", frozen=True, extra="ignore")

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", repr=False, description="Redis or Valkey server; may hold a password."
    )
    data_directory: Path = Field(Path("data"), description="Local disk: run directories, staged models and datasets.")
    store: str = Field("", description="Artifact store: a directory or an fsspec URL; empty is <data_directory>/store.")

    authentication: bool = Field(
        True,
        description="Whether requests need a key (`flowpp keys create`). Off, only connections over loopback are "
        "answered.",
    )
    requests_per_minute: int = Field(6_000, ge=1, description="Of a key that has no limit of its own.")
    max_jobs_per_owner: int = Field(1_000, ge=1, description="Jobs of one owner that have not finished.")
    max_bytes_per_owner: int = Field(1024 * 1024 * MiB, ge=1, description="Bytes of an owner's datasets, checkpoints.")

    lease_seconds: float = Field(15, gt=0, le=3600, description="A worker silent for so long has lost its job.")
    max_attempts: int = Field(
        3,
        ge=1,
        le=100,
        description="Attempts that may fail before the job does; counted anew where one stores a later checkpoint.",
    )
    grace_seconds: float = Field(15, ge=0, le=3600, description="From SIGTERM to SIGKILL of a training process.")

    max_processes: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Processes that a training worker offers a job; by default as many as it has GPUs, or without GPUs "
        "as many as it has cores.",
    )

    max_queued_training: int = Field(1_000, ge=1, description="Training jobs that may wait.")
    max_queued_inference: int = Field(1_000, ge=1, description="Likelihood and sampling jobs that may wait.")
    max_upload_bytes: int = Field(2048 * MiB, ge=1, description="Bytes of an uploaded dataset.")
    max_request_bytes: int = Field(64 * MiB, ge=1, description="Bytes of any other request, images to score included.")
    max_large_uploads: int = Field(16, ge=1, description="Requests of more than 1 MiB that are received at once.")
    max_dataset_images: int = Field(2_000_000, ge=1, description="Images of a dataset.")
    max_request_images: int = Field(4_096, ge=1, description="Images that one request may send to be scored.")
    max_samples: int = Field(10_000, ge=1, description="Samples that one request may ask for.")
    max_importance_samples: int = Field(4_096, ge=1, description="Importance samples an image.")

    result_ttl_seconds: int = Field(
        7 * 86_400, ge=60, description="So long after its end a likelihood or sampling job is deleted with its results."
    )

    webhook_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = Field(
        (),
        description="Private networks that webhooks may point into, as 10.0.0.0/8, with commas between.",
    )

    model_cache_bytes: int = Field(
        2048 * MiB, ge=0, description="Warm models in an inference worker: their parameters and recorded passes."
    )
    batch_size: int = Field(
        64,
        ge=1,
        le=65_536,
        description="Images of large jobs that the inference worker computes at once; on a CPU of small ones, 8.",
    )

    log_format: Literal["text", "json"] = Field(
        "text", description="Log lines for people, or as JSON objects, one a line, for programs that collect them."
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65_535,
        description="Where this process answers GET /metrics, on all addresses and without a key; 0: nowhere. "
        "`flowpp serve` gives it to its training worker, and the next one to its inference worker.",
    )

    @field_validator("webhook_networks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str) -> str:
        try:
            parse_url(value)
        except ValueError:  # its message may hold a part of a password
            raise ValueError("this is no URL of a Redis server, as redis://127.0.0.1:6379/0 is one") from None
        return value

    @field_validator("store")
    @classmethod
    def _check_store(cls, value: str) -> str:
        if value:
            try:
                fsspec.get_filesystem_class(fsspec.utils.get_protocol(value))
            except (ValueError, ImportError) as error:
                raise ValueError(f"this is no directory and no URL of a store: {error}") from error
        return value

    @property
    def store_url(self) -> str:
        """`store`, or the directory that it defaults to."""
        return self.store or str(self.data_directory / "store")

    @property
    def dataset_limits(self) -> Limits:
        """Bounds on an uploaded dataset."""
        return Limits(
            max_bytes=self.max_upload_bytes,
            max_uncompressed_bytes=8 * self.max_upload_bytes,
            max_images=self.max_dataset_images,
            max_zip_entries=MAX_ZIP_ENTRIES,
        )

    @property
    def request_limits(self) -> Limits:
        """Bounds on the images of one request."""
        return Limits(max_bytes=self.max_request_bytes, max_images=self.max_request_images)


def from_environment(**values: Any) -> Settings:
    """The settings of this process's environment, with `values` instead of its own.

    Raises `BrokenVariable` also for variables of the libraries that processes of the service need.
    """
    try:
        found = Settings(**values)
    except ValidationError as error:
        raise BrokenVariable(_sentence(error)) from None
    try:
        tracing.check()
        levels.of_environment()
    except (tracing.TracingError, levels.UnsupportedLevel) as error:
        raise BrokenVariable(str(error)) from error
    for name in _certificates(found):
        _check_certificates(name)
    return found


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process's environment, read once. Raises `BrokenVariable`."""
    return from_environment()


def _sentence(error: ValidationError) -> str:
    """The first fault: variable, what would be right, and the value unless it may hold a password."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    message = first["msg"].removeprefix("Value error, ")
    secret = not Settings.model_fields[name].repr
    value = "" if secret else f", not {first['input']!r:.100}"
    return f"FLOWPP_{name.upper()} cannot be used: {message[0].lower()}{message[1:]}{value}"


def _certificates(found: Settings) -> list[str]:
    """Variables of certificates that a library of this process reads."""
    names = [next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "")]
    if tracing.configured():
        names += ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "OTEL_EXPORTER_OTLP_CERTIFICATE"]
    if found.store.startswith(("s3:", "s3a:")):
        names.append("AWS_CA_BUNDLE")
    return [name for name in names if os.environ.get(name)]


def _check_certificates(name: str) -> None:
    place = Path(os.environ[name])
    if name == "SSL_CERT_DIR" and not place.is_dir():
        raise BrokenVariable(f"{name} is {place}, which is no directory of certificates; correct it, or unset it")
    if place.is_dir() and name != "SSL_CERT_FILE":
        return
    try:
        ssl.create_default_context(cafile=place)
    except OSError as error:  # an `SSLError` is one
        why = "holds no certificates" if isinstance(error, ssl.SSLError) else f"cannot be read: {error.strerror}"
        raise BrokenVariable(f"{name} is {place}, which {why}; correct it, or unset it") from None
