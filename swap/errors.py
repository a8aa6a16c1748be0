"""Every error that this package raises, in one tree.

It owns the names callers catch and the reasons the control API shows; it never decides what to do
about a failure. Each message says what failed, on what, and what the reader can do; the figures it
names are in `metadata` too, as text, for programs.

    SwapError
    ├── CheckpointInvalid         CHECKPOINT_INVALID          a checkpoint's files are refused
    ├── CorruptWeights            CORRUPT_WEIGHTS             an image is not what it says it is
    ├── InsufficientHostMemory    INSUFFICIENT_HOST_MEMORY    the host store's budget is too small
    ├── InsufficientDeviceMemory  INSUFFICIENT_DEVICE_MEMORY  the partition has too few pages
    ├── ImageUnknown              IMAGE_UNKNOWN               the store has no image of that digest
    ├── ImageInUse                IMAGE_IN_USE                somebody holds or pinned the image
    ├── CacheFailed               IMAGE_CACHE_FAILED          an image cannot be kept on disk
    ├── BuildCancelled            BUILD_CANCELLED             an image build was given up
    ├── TransferCancelled         TRANSFER_CANCELLED          a copy to the device was given up
    ├── TransferFailed            TRANSFER_FAILED             a copy to the device broke off
    └── DeviceError               DEVICE_ERROR                the system or device refused a call
        └── DeviceMisuse          DEVICE_MISUSE               the call broke the device's rules
"""

from __future__ import annotations

from typing import ClassVar


class SwapError(Exception):
    """Base of everything this package raises on purpose."""

    reason: ClassVar[str] = "SWAP_ERROR"

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.metadata: dict[str, str] = {name: str(value) for name, value in metadata.items()}


class CheckpointInvalid(SwapError):
    """A checkpoint's files are missing, damaged, contradictory or not what a recipe expects."""

    reason = "CHECKPOINT_INVALID"


class CorruptWeights(SwapError):
    """An image is truncated, altered or does not describe itself. Build it again."""

    reason = "CORRUPT_WEIGHTS"


class InsufficientHostMemory(SwapError):
    """The host store cannot make room: what it holds is pinned or in use, or it is too small."""

    reason = "INSUFFICIENT_HOST_MEMORY"


class InsufficientDeviceMemory(SwapError):
    """The partition has fewer free pages than were asked for."""

    reason = "INSUFFICIENT_DEVICE_MEMORY"


class ImageUnknown(SwapError):
    """The host store has no image of that digest."""

    reason = "IMAGE_UNKNOWN"


class ImageInUse(SwapError):
    """An image cannot be dropped while somebody holds it or it is pinned."""

    reason = "IMAGE_IN_USE"


class CacheFailed(SwapError):
    """An image could not be written to, or read from, the disk; whoever needs it builds it."""

    reason = "IMAGE_CACHE_FAILED"


class BuildCancelled(SwapError):
    """An image build was given up before its end; the segment's contents mean nothing."""

    reason = "BUILD_CANCELLED"


class TransferCancelled(SwapError):
    """A copy to the device was given up; the layers that had landed are complete."""

    reason = "TRANSFER_CANCELLED"


class TransferFailed(SwapError):
    """A copy to the device broke off; `__cause__` says why."""

    reason = "TRANSFER_FAILED"


class DeviceError(SwapError):
    """The system or the device refused a call that was allowed by the rules."""

    reason = "DEVICE_ERROR"


class DeviceMisuse(DeviceError):
    """A call broke the rules of device memory (a bug of the caller); nothing was changed."""

    reason = "DEVICE_MISUSE"
