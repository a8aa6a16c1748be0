"""Errors of hotbayd. Each has a reason of the catalogue in `hotbay.reasons` and its figures.

    ControlError
    ├── AlreadyRunning        another daemon holds the directory's lock
    ├── ProcessFailed         a child could not be started, or ended before it was ready
    ├── CallRefused           a worker, the gateway or a builder refused; carries its reason
    ├── ConfigInvalid         the configuration file or a flag is refused
    ├── JournalFailed         the journal cannot be written
    └── Refused               a request that cannot be carried out; carries its own reason

The services turn every ControlError into a google.rpc.Status in one place.
"""

from __future__ import annotations

from collections.abc import Mapping


class ControlError(Exception):
    """Anything that stops a request to hotbayd; `metadata` holds the figures of the message."""

    reason = "INTERNAL"

    def __init__(
        self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})


class AlreadyRunning(ControlError):
    """Another hotbayd uses the directory. Stop it, or give this one directories of its own."""

    reason = "ALREADY_RUNNING"


class ProcessFailed(ControlError):
    """A child process could not be started or ended too early. Its log says why."""

    reason = "WORKER_UNAVAILABLE"


class CallRefused(ControlError):
    """The other end of a link refused a call; nothing changed there."""


class ConfigInvalid(ControlError):
    """The configuration is refused; one line for each mistake. Correct it and start again."""

    reason = "INVALID_ARGUMENT"


class JournalFailed(ControlError):
    """The journal cannot be written, so nothing may be begun. Look at the disk of the state."""

    reason = "JOURNAL_FAILED"


class Refused(ControlError):
    """A request that cannot be carried out as things stand; nothing was changed by it."""
