"""Errors of the worker.

Each has the `reason` that programs look at, a message that says what failed, on what, and what to
do, and the figures it names in `metadata`, as text.

    WorkerError                   INTERNAL
    ├── OptionInvalid             INVALID_ARGUMENT             an argument of the command line
    ├── InvalidState              INVALID_STATE                not in a model's present status
    ├── ModelUnknown              MODEL_NOT_FOUND              no engine of that model is here
    ├── ImageUnknown              IMAGE_UNKNOWN                the image was not attached
    ├── ImageInUse                IMAGE_IN_USE                 an engine on the device needs it
    ├── OperationInProgress       OPERATION_IN_PROGRESS        one exchange at a time
    ├── PartitionTaken            PARTITION_IN_USE             another worker listens there
    ├── StageTimedOut             TIMED_OUT                    a stage overran its deadline
    ├── CanaryFailed              CANARY_FAILED                other tokens than at first
    ├── Abandoned                 CANCELLED                    hotbayd asked for the rollback
    └── FailPointReached          EXCHANGE_FAILED              a test asked for this failure
"""

from __future__ import annotations

from typing import ClassVar


class WorkerError(Exception):
    """Anything the worker refuses or fails at."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.metadata: dict[str, str] = {name: str(value) for name, value in metadata.items()}


class OptionInvalid(WorkerError):
    """An argument is out of its range; the worker does not start."""

    reason = "INVALID_ARGUMENT"


class InvalidState(WorkerError):
    """The model's status does not allow what was asked."""

    reason = "INVALID_STATE"


class ModelUnknown(WorkerError):
    """No engine of that model is on this worker."""

    reason = "MODEL_NOT_FOUND"


class ImageUnknown(WorkerError):
    """The image was not attached. Send AttachImage with its descriptor first."""

    reason = "IMAGE_UNKNOWN"


class ImageInUse(WorkerError):
    """An engine on the device was made from the image."""

    reason = "IMAGE_IN_USE"


class OperationInProgress(WorkerError):
    """An exchange is under way, or another call works on the same model."""

    reason = "OPERATION_IN_PROGRESS"


class PartitionTaken(WorkerError):
    """Another worker listens for the partition; this one does not start."""

    reason = "PARTITION_IN_USE"


class StageTimedOut(WorkerError):
    """A stage of an exchange overran its deadline."""

    reason = "TIMED_OUT"


class CanaryFailed(WorkerError):
    """A canary's tokens were not those that were recorded."""

    reason = "CANARY_FAILED"


class Abandoned(WorkerError):
    """The exchange was rolled back on request."""

    reason = "CANCELLED"


class Displaced(WorkerError):
    """What was being staged gave way to a model that serves."""

    reason = "INSUFFICIENT_DEVICE_MEMORY"


class FailPointReached(WorkerError):
    """A fail point that was switched on to raise."""

    reason = "EXCHANGE_FAILED"


def reason_of(error: BaseException) -> str:
    """The reason an error carries, of whatever package; INTERNAL for bugs."""
    reason = getattr(error, "reason", None)
    return reason if isinstance(reason, str) else WorkerError.reason


def metadata_of(error: BaseException) -> dict[str, str]:
    """The figures an error carries, of whatever package."""
    metadata = getattr(error, "metadata", None)
    return dict(metadata) if isinstance(metadata, dict) else {}


def message_of(error: BaseException) -> str:
    """What to tell of an error: its message, and its type where it is a bug's."""
    if isinstance(getattr(error, "reason", None), str):
        return str(error)
    return f"{type(error).__name__}: {error}"
