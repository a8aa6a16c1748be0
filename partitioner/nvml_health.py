"""Reading what a driver tells of a GPU's health. Read only.

It owns the calls and the value. It judges nothing. The invariant: what a board or driver does not
tell is None, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pynvml

from partitioner.nvml_facts import call_optional
from partitioner.recovery_action import RecoveryAction

_THERMAL = (
    pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonSwThermalSlowdown
)
_POWER = pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown


@dataclass(frozen=True)
class HealthReadings:
    """One GPU's health as its driver tells it now; None: it does not tell."""

    recovery_action: RecoveryAction | None = None
    uncorrected_errors: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    thermal_slowdown: bool | None = None
    power_slowdown: bool | None = None


def read_health(handle: Any) -> HealthReadings:
    """Read one GPU; raises `NvmlCallError` for one that is lost or failing."""
    # Of a GPU that is lost the first call says so; fields would each say it for themselves.
    reasons = call_optional("nvmlDeviceGetCurrentClocksEventReasons", handle)
    rows = call_optional("nvmlDeviceGetRemappedRows", handle)
    uncorrected = call_optional(
        "nvmlDeviceGetTotalEccErrors",
        handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
    )
    return HealthReadings(
        recovery_action=_recovery_action(handle),
        uncorrected_errors=None if uncorrected is None else int(uncorrected),
        rows_pending=None if rows is None else bool(rows[2]),
        rows_failed=None if rows is None else bool(rows[3]),
        thermal_slowdown=None if reasons is None else bool(reasons & _THERMAL),
        power_slowdown=None if reasons is None else bool(reasons & _POWER),
    )


def _recovery_action(handle: Any) -> RecoveryAction | None:
    field = pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
    values = call_optional("nvmlDeviceGetFieldValues", handle, [field])
    if values is None or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return RecoveryAction.of(int(values[0].value.uiVal))
