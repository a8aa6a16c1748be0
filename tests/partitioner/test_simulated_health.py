"""Trouble put upon the simulated library, seen through the real pynvml."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pynvml
import pytest

from partitioner.catalogue import load_catalogue
from partitioner.errors import SimulationError
from partitioner.simulated import trouble
from partitioner.simulated.install import installed
from partitioner.simulated.node import SimulatedNode
from partitioner.simulation import parse_node

CUT = """
version: 1
gpus:
- {board: h200, mig_enabled: true, instances: [{profile: 3g.71gb, start: 4}]}
- {board: h200}
"""
XID = pynvml.nvmlEventTypeXidCriticalError
WHOLE_GPU = 0xFFFFFFFF


@pytest.fixture
def cut() -> Iterator[SimulatedNode]:
    """Two GPUs, the first of them with one instance; NVML is open."""
    node = SimulatedNode(parse_node(CUT, "cut.yaml", load_catalogue()))
    with installed(node):
        pynvml.nvmlInit()
        yield node
        node.clear_injections()
        pynvml.nvmlShutdown()


def registered(*indices: int) -> Any:
    events = pynvml.nvmlEventSetCreate()
    for index in indices:
        pynvml.nvmlDeviceRegisterEvents(pynvml.nvmlDeviceGetHandleByIndex(index), XID, events)
    return events


def code_of(call: Any, *arguments: Any) -> int:
    with pytest.raises(pynvml.NVMLError) as refused:
        call(*arguments)
    return int(refused.value.value)


def test_an_xid_names_its_gpu_and_instance(cut: SimulatedNode) -> None:
    events = registered(0, 1)
    trouble.report_xid(cut, "gpu0/3g.71gb@4", 94)
    trouble.report_xid(cut, "1", 79)
    first = pynvml.nvmlEventSetWait_v2(events, 0)
    assert (first.eventType, first.eventData, first.gpuInstanceId) == (XID, 94, 1)
    assert pynvml.nvmlDeviceGetUUID(first.device) == cut.gpus[0].uuid
    second = pynvml.nvmlEventSetWait_v2(events, 0)
    assert (second.eventData, second.gpuInstanceId) == (79, WHOLE_GPU)
    assert pynvml.nvmlDeviceGetIndex(second.device) == 1
    assert code_of(pynvml.nvmlEventSetWait_v2, events, 0) == pynvml.NVML_ERROR_TIMEOUT
    pynvml.nvmlEventSetFree(events)
    assert code_of(pynvml.nvmlEventSetWait_v2, events, 0) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_an_event_reaches_only_those_who_registered(cut: SimulatedNode) -> None:
    one, other = registered(0), registered(1)
    trouble.report_xid(cut, "gpu0", 94)
    assert code_of(pynvml.nvmlEventSetWait_v2, other, 0) == pynvml.NVML_ERROR_TIMEOUT
    assert pynvml.nvmlEventSetWait_v2(one, 0).eventData == 94
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    unknown = pynvml.nvmlEventTypeClock
    code = code_of(pynvml.nvmlDeviceRegisterEvents, handle, unknown, one)
    assert code == pynvml.NVML_ERROR_NOT_SUPPORTED


def test_a_wait_ends_when_an_event_comes_and_when_a_gpu_is_lost(cut: SimulatedNode) -> None:
    events = registered(0, 1)
    found: list[int] = []

    def wait() -> None:
        found.append(pynvml.nvmlEventSetWait_v2(events, 60_000).eventData)
        found.append(code_of(pynvml.nvmlEventSetWait_v2, events, 60_000))

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    trouble.report_xid(cut, "gpu1", 31)
    trouble.vanish(cut, "gpu0")
    waiter.join(30)
    assert found == [31, pynvml.NVML_ERROR_GPU_IS_LOST]
    cut.clear_injections()
    assert code_of(pynvml.nvmlEventSetWait_v2, events, 0) == pynvml.NVML_ERROR_TIMEOUT


def test_fields_are_told_as_they_were_set(cut: SimulatedNode) -> None:
    events, handle = registered(1), pynvml.nvmlDeviceGetHandleByIndex(1)
    field = pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION

    def action() -> tuple[int, int]:
        (row,) = pynvml.nvmlDeviceGetFieldValues(handle, [field])
        return row.nvmlReturn, row.value.uiVal

    assert action() == (pynvml.NVML_SUCCESS, pynvml.NVML_GPU_RECOVERY_ACTION_NONE)
    changes = {"uncorrected_errors": 3, "rows_pending": True, "thermal_slowdown": True}
    trouble.set_health(cut, "gpu1", "drain-and-reset", changes)
    assert action() == (pynvml.NVML_SUCCESS, pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET)
    assert pynvml.nvmlEventSetWait_v2(events, 0).eventData == 154
    uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    assert pynvml.nvmlDeviceGetTotalEccErrors(handle, *uncorrected) == 3
    assert pynvml.nvmlDeviceGetRemappedRows(handle) == (0, 1, 1, 0)
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    assert reasons == pynvml.nvmlClocksEventReasonHwThermalSlowdown
    other = pynvml.nvmlDeviceGetHandleByIndex(0)
    assert pynvml.nvmlDeviceGetRemappedRows(other) == (0, 0, 0, 0)
    trouble.set_health(cut, "gpu1", "untold", {"power_slowdown": True})
    assert action()[0] == pynvml.NVML_ERROR_NOT_SUPPORTED
    cut.clear_injections()
    assert action() == (pynvml.NVML_SUCCESS, 0)
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) == 0


def test_a_named_call_fails_after_so_many(cut: SimulatedNode) -> None:
    trouble.fail_calls(cut, "gpu1", "nvmlDeviceGetName", "no-permission", 1, 1)
    handle = pynvml.nvmlDeviceGetHandleByIndex(1)
    assert pynvml.nvmlDeviceGetName(handle)
    assert code_of(pynvml.nvmlDeviceGetName, handle) == pynvml.NVML_ERROR_NO_PERMISSION
    assert pynvml.nvmlDeviceGetName(handle)


def test_a_gpu_that_wants_a_reset_is_not_cut(cut: SimulatedNode) -> None:
    trouble.want_reset(cut, "gpu1")
    handle = pynvml.nvmlDeviceGetHandleByIndex(1)
    assert code_of(pynvml.nvmlDeviceSetMigMode, handle, 1) == pynvml.NVML_ERROR_RESET_REQUIRED
    assert cut.gpus[1].health.recovery_action == pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET


def test_delays_are_put_upon_named_calls(cut: SimulatedNode) -> None:
    slept: list[float] = []
    cut._sleep = slept.append
    trouble.delay_calls(cut, "nvmlGpuInstanceDestroy", 1.0)
    trouble.delay_calls(cut, "nvmlDeviceGetHandleByUUID", 10.0)
    pynvml.nvmlDeviceGetHandleByUUID(cut.gpus[0].uuid)
    assert slept == [10.0]


@pytest.mark.parametrize(
    ("ask", "hint"),
    [
        (lambda node: trouble.report_xid(node, "gpu7", 94), "it has gpu0, gpu1"),
        (lambda node: trouble.report_xid(node, "gpu0/1g.18gb@0", 94), "it has 3g.71gb@4"),
        (lambda node: trouble.report_xid(node, "gpu0", 0), "1 to 999"),
        (lambda node: trouble.fail_calls(node, "", "", "NO_PERMISION", 0, 0), "no_permission"),
        (lambda node: trouble.fail_calls(node, "", "nvmlFoo", "UNKNOWN", 0, 0), "nvmlFoo"),
        (lambda node: trouble.fail_calls(node, "", "", "SUCCESS", 0, 0), "no error"),
        (lambda node: trouble.delay_calls(node, "", 1.0), "which NVML function"),
        (lambda node: trouble.delay_calls(node, "nvmlDeviceGetName", -1.0), "not within"),
        (lambda node: trouble.set_health(node, "gpu0", "rset", {}), "gpu_reset"),
        (lambda node: trouble.set_health(node, "gpu0", None, {}), "which field"),
    ],
)
def test_what_makes_no_sense_is_refused(cut: SimulatedNode, ask: Any, hint: str) -> None:
    with pytest.raises(SimulationError, match=hint):
        ask(cut)
    assert pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
