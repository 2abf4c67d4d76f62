"""Refusals: what the service cannot do for a caller, each with a stable code and a sentence.

Refusal
├── NotFound      there is no such job, dataset, checkpoint or artifact
├── Conflict      the state of the thing forbids it
├── Invalid       the request does not fit, at `field`
├── OverQuota     its owner has as much as it may
└── QueueFull     try again after `retry_after` seconds
"""


class Refusal(Exception):
    """`code` is stable and snake_case; the message is a sentence for the caller."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NotFound(Refusal):
    """Codes: job_not_found, dataset_not_found, checkpoint_not_found, artifact_not_found."""


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
