"""From the partitioner's errors to reasons of the catalogue.

It owns the table and nothing else. The invariant: every error of a change of layout leaves here as
a refusal with a reason, and with the figures that a program needs.
"""

from __future__ import annotations

from daemon.control.errors import Refused
from partitioner.errors import (
    ChangeCancelledError,
    GpuInUseError,
    GpuLostError,
    InstanceHeldError,
    LayoutMovedError,
    MpsUnavailableError,
    NotRolledBackError,
    NvmlBusyError,
    NvmlTimeoutError,
    PermissionMissingError,
    ResetHeldError,
    ResetNeededError,
    StaleGenerationError,
)

# In this order: the first that fits.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (NotRolledBackError, "LAYOUT_UNSETTLED"),
    (ResetHeldError, "RESET_NEEDED"),
    (InstanceHeldError, "PARTITION_IN_USE"),
    (GpuInUseError, "PARTITION_IN_USE"),
    (LayoutMovedError, "PLAN_STALE"),
    (StaleGenerationError, "PLAN_STALE"),
    (ChangeCancelledError, "CANCELLED"),
    (PermissionMissingError, "DRIVER_PERMISSION"),
    (ResetNeededError, "RESET_NEEDED"),
    (MpsUnavailableError, "MPS_UNAVAILABLE"),
    (GpuLostError, "GPU_LOST"),
    (NvmlTimeoutError, "GPU_LOST"),
    (NvmlBusyError, "GPU_LOST"),
)


def refusal(error: Exception) -> Refused:
    """The refusal that tells of `error`; LAYOUT_FAILED where nothing more exact is known."""
    reason = next((word for kind, word in _REASONS if isinstance(error, kind)), "LAYOUT_FAILED")
    metadata = {}
    if isinstance(error, InstanceHeldError):
        metadata["pids"] = ",".join(str(pid) for pid in error.pids)
    return Refused(str(error), reason=reason, metadata=metadata)
