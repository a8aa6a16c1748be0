"""What the simulated NVML functions about health and events answer.

It owns one small function per symbol, and their table. It changes nothing but event sets. The
invariant: a field that the node does not tell is refused as a driver that is too old refuses it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import MappingProxyType

import pynvml

from partitioner.simulated.abi import Status, Symbol, put_uint
from partitioner.simulated.calls import NOT_IN_A_MIG_INSTANCE
from partitioner.simulated.events import SimulatedEvent
from partitioner.simulated.node import SimulatedGpu, SimulatedHealth, SimulatedNode

EVENT_KINDS = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeGpuRecoveryAction
FIELDS_MAX = 64


def _create_set(node: SimulatedNode, out: int) -> None:
    handle = node.events.create()
    if handle is None:
        raise Status(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
    ctypes.c_void_p.from_address(out).value = handle


def _supported_kinds(node: SimulatedNode, gpu: SimulatedGpu, out: int) -> None:
    ctypes.c_ulonglong.from_address(out).value = EVENT_KINDS


def _register(node: SimulatedNode, gpu: SimulatedGpu, kinds: int, event_set: int) -> None:
    if kinds & ~EVENT_KINDS:
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    if not node.events.register(event_set, gpu.handle, kinds):
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)


def _wait(node: SimulatedNode, event_set: int, out: int, timeout_ms: int) -> None:
    found = node.events.wait(event_set, timeout_ms / 1000)
    if found is False:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    if found is None:
        raise Status(pynvml.NVML_ERROR_TIMEOUT)
    if not isinstance(found, SimulatedEvent):
        raise Status(pynvml.NVML_ERROR_GPU_IS_LOST)
    data = pynvml.c_nvmlEventData_t.from_address(out)
    ctypes.c_void_p.from_address(out).value = found.gpu  # The first field: the device.
    data.eventType, data.eventData = found.kind, found.data
    whole = found.instance is None
    data.gpuInstanceId = NOT_IN_A_MIG_INSTANCE if found.instance is None else found.instance
    data.computeInstanceId = NOT_IN_A_MIG_INSTANCE if whole else 0


def _free(node: SimulatedNode, event_set: int) -> None:
    if not node.events.free(event_set):
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)


def _fields(node: SimulatedNode, gpu: SimulatedGpu, count: int, out: int) -> None:
    """Each field has a code of its own; the call succeeds whatever they are."""
    if not 0 < count <= FIELDS_MAX:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    for row in (pynvml.c_nvmlFieldValue_t * count).from_address(out):
        value = _field(gpu.health, int(row.fieldId))
        row.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED if value is None else pynvml.NVML_SUCCESS
        row.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
        row.value.uiVal = value or 0


def _field(health: SimulatedHealth, number: int) -> int | None:
    if number == pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION:
        return health.recovery_action
    return None


def _uncorrected(node: SimulatedNode, gpu: SimulatedGpu, kind: int, counter: int, out: int) -> None:
    told = kind == pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    ctypes.c_ulonglong.from_address(out).value = gpu.health.uncorrected_errors if told else 0


def _rows(
    node: SimulatedNode,
    gpu: SimulatedGpu,
    corrected: int,
    uncorrected: int,
    pending: int,
    failed: int,
) -> None:
    health = gpu.health
    put_uint(corrected, 0)
    put_uint(uncorrected, int(health.rows_pending or health.rows_failed))
    put_uint(pending, int(health.rows_pending))
    put_uint(failed, int(health.rows_failed))


def _clock_reasons(node: SimulatedNode, gpu: SimulatedGpu, out: int) -> None:
    reasons = pynvml.nvmlClocksEventReasonNone
    if gpu.health.thermal_slowdown:
        reasons |= pynvml.nvmlClocksEventReasonHwThermalSlowdown
    if gpu.health.power_slowdown:
        reasons |= pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
    ctypes.c_ulonglong.from_address(out).value = reasons


HEALTH_CALLS: Mapping[str, Symbol] = MappingProxyType(
    {
        "nvmlEventSetCreate": ("p", _create_set),
        "nvmlDeviceGetSupportedEventTypes": ("hp", _supported_kinds),
        "nvmlDeviceRegisterEvents": ("hle", _register),
        "nvmlEventSetWait_v2": ("epu", _wait),
        "nvmlEventSetFree": ("e", _free),
        "nvmlDeviceGetFieldValues": ("hip", _fields),
        "nvmlDeviceGetTotalEccErrors": ("huup", _uncorrected),
        "nvmlDeviceGetRemappedRows": ("hpppp", _rows),
        "nvmlDeviceGetCurrentClocksEventReasons": ("hp", _clock_reasons),
    }
)
