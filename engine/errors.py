"""Errors of the engine.

    EngineError
    ├── CheckpointInvalid        a checkpoint's file is missing, unreadable or wrong
    ├── ArchitectureUnsupported  the checkpoint is sound, but asks for what is not implemented
    ├── BlockTooLarge            one token's KV of all layers does not fit a page
    ├── KvTooSmall               the KV space cannot hold one request of the promised length
    └── RequestRefused           one request cannot be run; all others go on

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


class KvTooSmall(EngineError):
    """The KV space cannot hold one request of the promised length. Give it more pages, or less
    context."""

    reason = "INSUFFICIENT_KV"


class RequestRefused(EngineError):
    """One request cannot be run: too long, a token outside the vocabulary, a full queue."""

    reason = "INVALID_REQUEST"
