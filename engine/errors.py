"""Errors of the engine.

    EngineError
    ├── CheckpointInvalid        a checkpoint's file is missing, unreadable or wrong
    ├── ArchitectureUnsupported  the checkpoint is sound, but asks for what is not implemented
    ├── BlockTooLarge            one token's KV of all layers does not fit a page
    ├── KvTooSmall               the KV space cannot hold one request of the promised length
    ├── RequestRefused           one request cannot be run; all others go on
    ├── KvNotParked              KV that is wanted back never came to host memory
    ├── GraphChanged             a captured step would read or write something else by now
    └── PullError                a checkpoint cannot be fetched from its hub
        ├── HubNotFound          the hub has no such repository, revision or file
        ├── HubRefused           the hub, or the token, does not allow it
        ├── HubUnavailable       the hub or the way to it fails now; the same may succeed later
        ├── ChecksumMismatch     what arrived is not what the hub announced
        ├── InsufficientDisk     the disk has no room for it
        └── PullGivenUp          whoever asked for it does no longer

`reason` is of the project's catalogue of reasons and is what programs look at; the message says
what failed, on what, and what to change; `metadata` holds the figures it names.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """Anything an engine refuses or fails at."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: str | int) -> None:
        super().__init__(message)
        self.metadata = {name: str(value) for name, value in metadata.items()}


class CheckpointInvalid(EngineError):
    """A checkpoint's file is missing, unreadable or wrong; the message names file and field."""

    reason = "CHECKPOINT_INVALID"


class ArchitectureUnsupported(EngineError):
    """A checkpoint needs a feature that is not implemented; the message lists what is."""

    reason = "ARCH_UNSUPPORTED"


class BlockTooLarge(EngineError):
    """One token's keys and values of all layers exceed a page. Raise the device's page size."""

    reason = "KV_BLOCK_TOO_LARGE"


class DeviceUnsuitable(EngineError):
    """The device cannot do what an option asks for; the message names the option."""

    reason = "DEVICE_UNSUITABLE"


class GraphChanged(EngineError):
    """Captured work is not what it was: an address moved, or it does something else. A bug."""


class KvNotParked(EngineError):
    """KV that is wanted back never came to host memory. It is computed again."""


class KvTooSmall(EngineError):
    """The KV space cannot hold one request of the promised length. Give it more pages, or less
    context."""

    reason = "INSUFFICIENT_KV"


class RequestRefused(EngineError):
    """One request cannot be run: too long, a token outside the vocabulary, a full queue."""

    reason = "INVALID_REQUEST"


class PullError(EngineError):
    """A checkpoint cannot be fetched; the message names repository or file."""

    reason = "PULL_FAILED"


class HubNotFound(PullError):
    """The hub has no such repository, revision or file, or does not show it to this token."""

    reason = "HUB_NOT_FOUND"


class HubRefused(PullError):
    """The hub refuses the token or its absence, or the configuration forbids asking it."""

    reason = "HUB_REFUSED"


class HubUnavailable(PullError):
    """The hub or the way to it fails now. Trying again may help, after `retry_after_s`."""

    reason = "HUB_UNAVAILABLE"
    retry_after_s = 0.0


class ChecksumMismatch(PullError):
    """What arrived is not what the hub announced; it was not kept."""

    reason = "CHECKSUM_MISMATCH"


class InsufficientDisk(PullError):
    """The disk has no room for the checkpoint. Make room, or name another directory."""

    reason = "INSUFFICIENT_DISK"


class PullGivenUp(PullError):
    """Whoever asked for the checkpoint does no longer; what was fetched stays."""

    reason = "CANCELLED"
