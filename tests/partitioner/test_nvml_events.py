"""The thread that hears XIDs, and the reading of health, over the real pynvml."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator

import pynvml
import pytest

from partitioner.bounded import BoundedNvml
from partitioner.errors import GpuLostError
from partitioner.nvml_events import EventThread, XidEvent
from partitioner.nvml_gate import NvmlGate
from partitioner.nvml_health import HealthReadings
from partitioner.recovery_action import RecoveryAction
from partitioner.simulated import trouble
from partitioner.simulated.node import Fault, SimulatedNode

TIMEOUT_S = 120.0


class Ear:
    """What was heard, as it comes; None: that some GPU is lost."""

    def __init__(self) -> None:
        self.heard: queue.Queue[XidEvent | None] = queue.Queue()
        self.thread = EventThread(self.heard.put, lambda: self.heard.put(None), retry_s=0.01)

    def next(self) -> XidEvent | None:
        return self.heard.get(timeout=TIMEOUT_S)


@pytest.fixture
def ear(node: SimulatedNode) -> Iterator[Ear]:
    listening = Ear()
    yield listening
    node.clear_injections()
    listening.thread.close()
    assert not listening.thread._thread.is_alive()
    assert pynvml._nvmlLib_refcount == 0


def test_xids_are_heard_in_order_with_their_gpu(node: SimulatedNode, ear: Ear) -> None:
    ear.thread.start()
    assert ear.thread.hearing.wait(TIMEOUT_S)
    for gpu, xid in (("gpu1", 94), ("gpu0", 31)):
        trouble.report_xid(node, gpu, xid)
    assert ear.next() == XidEvent(node.gpus[1].uuid, 94, None)
    assert ear.next() == XidEvent(node.gpus[0].uuid, 31, None)


def test_nvml_is_let_go_of_while_a_gpu_is_reset(node: SimulatedNode) -> None:
    gate, heard = NvmlGate(), queue.Queue[XidEvent | None]()
    thread = EventThread(heard.put, lambda: heard.put(None), retry_s=0.01, gate=gate)
    thread.start()
    try:
        assert thread.hearing.wait(TIMEOUT_S)
        assert not node.reset(node.gpus[0]), "it is open in this thread"
        thread.hearing.clear()
        with gate.alone():
            assert node.reset(node.gpus[0])
        assert thread.hearing.wait(TIMEOUT_S)
        trouble.report_xid(node, "gpu1", 94)
        assert heard.get(timeout=TIMEOUT_S) == XidEvent(node.gpus[1].uuid, 94, None)
    finally:
        thread.close()


def test_a_lost_gpu_does_not_deafen(node: SimulatedNode, ear: Ear) -> None:
    ear.thread.start()
    assert ear.thread.hearing.wait(TIMEOUT_S)
    trouble.vanish(node, "gpu0")
    assert ear.next() is None
    # While it is registering anew an event may fall between: that is the driver's way, too.
    for _ in range(200):
        trouble.report_xid(node, "gpu1", 94)
        try:
            assert ear.heard.get(timeout=0.1) == XidEvent(node.gpus[1].uuid, 94, None)
            break
        except queue.Empty:
            continue
    else:
        pytest.fail("the other GPU is not heard any more")
    node.clear_injections()
    for _ in range(200):
        trouble.report_xid(node, "gpu0", 79)
        try:
            while (event := ear.heard.get(timeout=0.1)) is None or event.xid != 79:
                pass
            return
        except queue.Empty:
            continue
    pytest.fail("the GPU that came back is not heard")


def test_a_driver_without_events_is_asked_again(node: SimulatedNode, ear: Ear) -> None:
    node.inject(Fault(pynvml.NVML_ERROR_UNKNOWN, "nvmlEventSetCreate", times=2))
    ear.thread.start()
    assert ear.thread.hearing.wait(TIMEOUT_S)
    assert node.calls_of("nvmlEventSetCreate") == 3


def test_one_that_is_closed_before_it_began_never_hears(node: SimulatedNode, ear: Ear) -> None:
    ear.thread.close()
    ear.thread.start()
    ear.thread._thread.join(TIMEOUT_S)
    assert not ear.thread.hearing.is_set()
    assert node.calls_of("nvmlEventSetCreate") == 0


def test_health_is_read_and_what_is_not_told_is_none(node: SimulatedNode) -> None:
    async def scenario() -> None:
        nvml = BoundedNvml()
        try:
            first, second = await nvml.discover()
            sound = HealthReadings(RecoveryAction.NONE, 0, False, False, False, False)
            assert await nvml.health(first.uuid) == sound
            changes = {"uncorrected_errors": 4, "rows_failed": True, "power_slowdown": True}
            trouble.set_health(node, "gpu1", "node-reboot", changes)
            read = await nvml.health(second.uuid)
            reboot = RecoveryAction.NODE_REBOOT
            assert read == HealthReadings(reboot, 4, False, True, False, True)
            trouble.set_health(node, "gpu1", "untold", {})
            refused = pynvml.NVML_ERROR_NOT_SUPPORTED
            node.inject(Fault(refused, "nvmlDeviceGetRemappedRows", second.uuid))
            node.inject(Fault(refused, "nvmlDeviceGetTotalEccErrors", second.uuid))
            read = await nvml.health(second.uuid)
            assert read == HealthReadings(thermal_slowdown=False, power_slowdown=True)
            trouble.vanish(node, "gpu0")
            with pytest.raises(GpuLostError, match=first.uuid):
                await nvml.health(first.uuid)
        finally:
            await nvml.close()

    asyncio.run(scenario())
