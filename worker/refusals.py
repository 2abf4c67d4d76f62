"""Refusals: what the service cannot do for a caller, each with a stable code and a sentence.

Refusal
├── NotFound      there is no such job, dataset, checkpoint or artifact
├── Conflict      the state of the thing forbids it
├── Invalid       the request does not fit, at `field`
├── OverQuota     its owner has as much as it may
└── QueueFull     try again after `retry_after` seconds
"""

from typing import Literal

Kind = Literal["job", "dataset", "checkpoint", "webhook"]

PREFIXES: dict[Kind, str] = {"job": "job_", "dataset": "ds_", "checkpoint": "ckpt_", "webhook": "wh_"}
"""The beginning of the ids of each kind."""


class Refusal(Exception):
    """`code` is stable and snake_case; the message is a sentence for the caller."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NotFound(Refusal):
    """Codes: job_not_found, dataset_not_found, checkpoint_not_found, artifact_not_found."""


def not_found(wanted: Kind, given: str, *also: Kind) -> NotFound:
    """The error for an id that nothing of the kind `wanted` has; the request also takes ids of the kinds `also`.

    If the id is of another kind, the message names it. The kind comes from the id alone: the message does not reveal
    whether another owner has such an object.
    """
    code = (
        "job_not_found"
        if wanted == "job"
        else "dataset_not_found"
        if wanted == "dataset"
        else "checkpoint_not_found"
        if wanted == "checkpoint"
        else "webhook_not_found"
    )
    shown = given[:64]
    for kind, prefix in PREFIXES.items():
        if given.startswith(prefix) and kind not in (wanted, *also):
            takes = " or ".join(f"a {each} ({PREFIXES[each]}...)" for each in (wanted, *also))
            return NotFound(code, f"{shown} is a {kind}; give the id of {takes}")
    return NotFound(code, f"there is no {wanted} {shown}")


def check_kind(wanted: Kind, given: str) -> None:
    """Raises `NotFound` if the id is of another kind than `wanted`."""
    if not given.startswith(PREFIXES[wanted]) and given.startswith(tuple(PREFIXES.values())):
        raise not_found(wanted, given)


class Conflict(Refusal):
    """Codes: job_finished, job_not_paused, not_pausable, no_checkpoint, in_use."""


class Invalid(Refusal):
    """Codes: unknown_preset, invalid_configuration, wrong_image_shape, too_many_images, too_many_samples, ..."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(code, message)
        self.field = field


class OverQuota(Refusal):
    """Code quota_exceeded."""

    def __init__(self, message: str) -> None:
        super().__init__("quota_exceeded", message)


class QueueFull(Refusal):
    """Code queue_full."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__("queue_full", message)
        self.retry_after = retry_after
