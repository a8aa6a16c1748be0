"""The reader and its deadlines when GPUs vanish, answers fail, drivers hang or are not there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pynvml
import pytest

from partitioner.bounded import BoundedNvml, CallThread
from partitioner.errors import (
    GpuLostError,
    NvmlBusyError,
    NvmlCallError,
    NvmlClosedError,
    NvmlTimeoutError,
    NvmlUnavailableError,
)
from partitioner.gpu import GpuHealth
from partitioner.nvml import PynvmlReader
from partitioner.partition import whole_partitions
from partitioner.simulated.install import installed
from partitioner.simulated.node import MIB, Fault, SimulatedNode
from partitioner.simulation import NodeSpec, parse_simulate

SHORT_DEADLINE_S = 0.05
LONG_DEADLINE_S = 30.0


@pytest.fixture
def reader(node: SimulatedNode) -> Iterator[PynvmlReader]:
    reader = PynvmlReader()
    yield reader
    node.clear_injections()
    reader.close()


def test_the_facts_of_a_simulated_gpu_are_the_boards(reader: PynvmlReader) -> None:
    gpu = reader.discover()[1]
    assert (gpu.name, gpu.sm_count, gpu.compute_capability) == ("NVIDIA H200", 132, (9, 0))
    assert gpu.memory_bytes == 143771 * MIB
    assert gpu.usable_bytes == 143104 * MIB
    assert (gpu.mig_capable, gpu.mig_enabled, gpu.mig_pending) == (True, False, False)
    assert (gpu.pci_id, gpu.pci_device_id) == ("00000000:18:00.0", 0x2335)
    assert gpu.numa_node is None
    assert gpu.driver_version == "580.95.05"


def test_a_vanished_gpu_is_reported_with_what_was_known_of_it(
    node: SimulatedNode, reader: PynvmlReader
) -> None:
    before = reader.discover()
    node.vanish(before[0].uuid)
    lost, well = reader.discover()
    assert (lost.uuid, lost.health) == (before[0].uuid, GpuHealth.LOST)
    assert "GPU is lost" in lost.health_reason
    assert lost.memory_bytes == before[0].memory_bytes
    assert lost.generation == before[0].generation + 1
    assert well == before[1]  # Its neighbour, generation included, is untouched.
    assert [partition.id for partition in whole_partitions([lost, well])] == ["gpu1"]
    with pytest.raises(GpuLostError, match="is lost"):
        reader.telemetry(lost.uuid, lost.generation)
    node.clear_injections()
    back = reader.discover()[0]
    assert (back.health, back.generation) == (GpuHealth.OK, lost.generation + 1)
    assert reader.telemetry(back.uuid, back.generation).pcie_lanes == 16


def test_a_gpu_lost_before_it_was_seen_has_no_name_but_a_place(
    node: SimulatedNode, reader: PynvmlReader
) -> None:
    node.vanish(node.gpus[0].uuid)
    lost, well = reader.discover()
    assert (lost.uuid, lost.index, lost.health) == ("", 0, GpuHealth.LOST)
    assert (well.index, well.health) == (1, GpuHealth.OK)


def test_a_gpu_that_is_no_longer_listed_is_lost_and_indices_move(
    node: SimulatedNode, reader: PynvmlReader
) -> None:
    first, second = reader.discover()
    remaining = node.gpus[1]
    remaining.index = 0
    node.gpus = (remaining,)
    gpus = {gpu.uuid: gpu for gpu in reader.discover()}
    assert gpus[first.uuid].health is GpuHealth.LOST
    assert gpus[first.uuid].health_reason == "the driver no longer lists it"
    assert gpus[second.uuid].index == 0
    assert gpus[second.uuid].generation == second.generation + 1


def test_a_gpu_that_vanishes_between_two_calls_is_lost(
    node: SimulatedNode, reader: PynvmlReader
) -> None:
    gpu = reader.discover()[0]
    node.vanish(gpu.uuid)
    with pytest.raises(GpuLostError, match="fell off the bus"):
        reader.telemetry(gpu.uuid, gpu.generation)


def test_a_failing_gpu_fails_neither_the_list_nor_its_generation(
    node: SimulatedNode, reader: PynvmlReader
) -> None:
    before = reader.discover()
    unknown = pynvml.NVML_ERROR_UNKNOWN
    node.inject(Fault(unknown, "nvmlDeviceGetPciInfo_v3", before[0].uuid, times=1))
    failing, well = reader.discover()
    assert (failing.health, failing.generation) == (GpuHealth.FAILING, before[0].generation)
    assert "nvmlDeviceGetPciInfo failed: Unknown Error (code 999)" in failing.health_reason
    assert well == before[1]
    assert reader.discover() == before


def test_an_error_of_the_whole_library_is_raised(node: SimulatedNode, reader: PynvmlReader) -> None:
    node.inject(Fault(pynvml.NVML_ERROR_UNINITIALIZED, "nvmlDeviceGetHandleByIndex_v2"))
    with pytest.raises(NvmlCallError) as refused:
        reader.discover()
    assert refused.value.code == pynvml.NVML_ERROR_UNINITIALIZED


def test_an_older_driver_tells_less_but_nothing_wrong(
    node: SimulatedNode, reader: PynvmlReader
) -> None:
    node.hidden_symbols = frozenset(
        {"nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetNumGpuCores", "nvmlDeviceGetMigMode"}
    )
    gpu = reader.discover()[0]
    assert (gpu.memory_reserved_bytes, gpu.memory_used_bytes) == (0, 667 * MIB)
    assert gpu.sm_count == 0
    assert not gpu.mig_capable
    node.inject(Fault(pynvml.NVML_ERROR_NOT_SUPPORTED, "nvmlDeviceGetPowerUsage"))
    assert reader.telemetry(gpu.uuid, gpu.generation).power_w is None


def test_telemetry_reports_units(node: SimulatedNode, reader: PynvmlReader) -> None:
    gpu = reader.discover()[0]
    node.gpus[0].utilization_percent = 100
    reading = reader.telemetry(gpu.uuid, gpu.generation)
    assert (reading.power_w, reading.utilization_percent, reading.temperature_c) == (700.0, 100, 33)
    assert (reading.pcie_generation, reading.pcie_lanes) == (5, 16)


def test_turning_mig_on_moves_the_generation(node: SimulatedNode, reader: PynvmlReader) -> None:
    before = reader.discover()
    node.gpus[1].mig_current = node.gpus[1].mig_pending = True
    after = reader.discover()
    assert after[0] == before[0]
    assert after[1].mig_enabled
    assert after[1].generation == before[1].generation + 1


def test_handles_are_looked_up_once(node: SimulatedNode, reader: PynvmlReader) -> None:
    gpu = reader.discover()[0]
    for _ in range(3):
        reader.telemetry(gpu.uuid, gpu.generation)
    assert node.calls_of("nvmlDeviceGetHandleByUUID") == 0
    generation = reader.invalidate(gpu.uuid)
    for _ in range(3):
        reader.telemetry(gpu.uuid, generation)
    assert node.calls_of("nvmlDeviceGetHandleByUUID") == 1


def test_numa_is_told_where_it_is_one_node() -> None:
    spec = parse_simulate("h200x1")
    gpu = spec.gpus[0]
    with installed(
        SimulatedNode(NodeSpec((gpu.__class__(gpu.board_key, gpu.board, numa_node=1),)))
    ):
        reader = PynvmlReader()
        assert reader.discover()[0].numa_node == 1
        reader.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "kernel driver is not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version mismatch"),
    ],
)
def test_an_unusable_library_names_the_way_out(node: SimulatedNode, code: int, words: str) -> None:
    node.inject(Fault(code, "nvmlInitWithFlags"))
    with pytest.raises(NvmlUnavailableError, match=f"{words}.*--simulate h200x1"):
        PynvmlReader()


def test_no_library_at_all_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "CDLL", no_library)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    with pytest.raises(NvmlUnavailableError, match=r"libnvidia-ml\.so\.1.*--simulate h200x1"):
        PynvmlReader()


def test_a_stuck_driver_costs_the_deadline_once_and_then_nothing(node: SimulatedNode) -> None:
    async def scenario() -> None:
        nvml = BoundedNvml(deadline_s=SHORT_DEADLINE_S)
        stall = node.stall("nvmlDeviceGetCount_v2")
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        with pytest.raises(NvmlTimeoutError, match="discover has not returned"):
            await nvml.discover()
        assert stall.entered.is_set()
        assert ticks > 1  # The event loop ran on meanwhile.
        calls_before = node.calls_of("nvmlDeviceGetCount_v2")
        with pytest.raises(NvmlTimeoutError):
            await nvml.telemetry(node.gpus[0].uuid, 1)
        assert node.calls_of("nvmlDeviceGetCount_v2") == calls_before
        ticker.cancel()
        node.clear_injections()
        assert len(await _retry(nvml)) == 2  # The late answer is dropped, service goes on.
        await nvml.close()

    asyncio.run(scenario())


async def _retry(nvml: BoundedNvml) -> tuple[object, ...]:
    for _ in range(1000):
        try:
            return await nvml.discover()
        except NvmlTimeoutError:
            await asyncio.sleep(0.001)
    raise AssertionError("the reader did not come back")


def test_closing_while_stuck_returns_and_leaves_the_thread_to_itself(node: SimulatedNode) -> None:
    async def scenario() -> None:
        nvml = BoundedNvml(deadline_s=SHORT_DEADLINE_S)
        node.stall("nvmlDeviceGetCount_v2")
        with pytest.raises(NvmlTimeoutError):
            await nvml.discover()
        await nvml.close()
        with pytest.raises(NvmlClosedError):
            await nvml.discover()
        node.clear_injections()

    asyncio.run(scenario())


def test_opening_is_tried_again_after_it_failed(node: SimulatedNode) -> None:
    async def scenario() -> None:
        nvml = BoundedNvml()
        node.inject(Fault(pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "nvmlInitWithFlags", times=1))
        with pytest.raises(NvmlUnavailableError):
            await nvml.discover()
        assert len(await nvml.discover()) == 2
        await nvml.close()

    asyncio.run(scenario())


class _Gate:
    """A call that waits to be let through, and tells when it has begun."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.released = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.released.wait(LONG_DEADLINE_S)
        return "through"


def test_more_calls_than_may_wait_are_refused_and_the_given_up_take_no_room() -> None:
    async def scenario() -> None:
        calls = CallThread("test", LONG_DEADLINE_S, max_waiting=1)
        gate = _Gate()
        running = asyncio.create_task(calls.call("first", gate))
        await asyncio.to_thread(gate.entered.wait, LONG_DEADLINE_S)
        waiting = asyncio.create_task(calls.call("second", lambda: "never run"))
        await asyncio.sleep(0)
        with pytest.raises(NvmlBusyError, match="third refused, 1 calls wait"):
            await calls.call("third", lambda: "refused")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        fourth = asyncio.create_task(calls.call("fourth", lambda: "fourth"))
        await asyncio.sleep(0)
        gate.released.set()
        assert await running == "through"
        assert await fourth == "fourth"
        calls.stop()

    asyncio.run(scenario())


def test_stopping_refuses_those_who_wait() -> None:
    async def scenario() -> None:
        calls = CallThread("test", LONG_DEADLINE_S, max_waiting=4)
        gate = _Gate()
        running = asyncio.create_task(calls.call("first", gate))
        await asyncio.to_thread(gate.entered.wait, LONG_DEADLINE_S)
        waiting = asyncio.create_task(calls.call("second", lambda: "never run"))
        await asyncio.sleep(0)
        calls.stop()
        with pytest.raises(NvmlClosedError, match="while a call waited"):
            await waiting
        gate.released.set()
        assert await running == "through"

    asyncio.run(scenario())


def test_an_error_in_the_thread_is_raised_to_the_caller() -> None:
    async def scenario() -> None:
        calls = CallThread("test")
        with pytest.raises(ZeroDivisionError):
            await calls.call("divide", lambda: 1 // 0)
        assert await calls.call("add", lambda: 1 + 1) == 2
        calls.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(("deadline_s", "max_waiting"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_limits_are_checked_at_the_start(deadline_s: float, max_waiting: int) -> None:
    with pytest.raises(ValueError, match="deadline_s"):
        CallThread("test", deadline_s, max_waiting)
