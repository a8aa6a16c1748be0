"""GPUs as metrics: what is told has DCGM's labels; what is not told, or stale, is absent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from daemon.control.actions.gpu_readings import POLL_S, STALE_S, GpuMonitor
from daemon.control.services.gpu_metrics import GpuMetrics
from partitioner.bounded import BoundedNvml
from partitioner.catalogue import load_catalogue
from partitioner.errors import NvmlTimeoutError
from partitioner.gpu import Gpu, GpuProcess
from partitioner.nvml import PynvmlReader
from partitioner.readings import PROCESSES_MAX, GpuReadings, processes_of
from partitioner.simulated.install import installed
from partitioner.simulated.node import Fault, SimulatedNode
from partitioner.simulation import parse_node
from tests.support.control_api import Api, play

NODE = """
version: 1
gpus:
- board: h200
  mig_enabled: true
  processes: [{pid: 77, memory_mib: 1024, on: 3g.71gb@4}]
  instances: [{profile: 3g.71gb, start: 4}]
- {board: a30, processes: [{pid: 78, memory_mib: 2048}]}
"""
Samples = dict[tuple[str, str, str, str], float]


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    simulated = SimulatedNode(parse_node(NODE, "node.yaml", load_catalogue()))
    with installed(simulated):
        yield simulated


def parsed(text: str) -> tuple[Samples, set[str]]:
    """By name, GPU, instance and kind; and every name. Prometheus' own parser reads it."""
    samples, names = {}, set()
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            labels = each.labels
            names.add(each.name)
            if "gpu" in labels:
                number = labels.get("GPU_I_ID", "")
                kind = labels.get("kind") or labels.get("pid", "")
                samples[each.name, labels["gpu"], number, kind] = each.value
    return samples, names


def exposition(readings: tuple[GpuReadings, ...], workers: dict[str, int] | None = None) -> str:
    clients = {name: SimpleNamespace(pid=pid) for name, pid in (workers or {}).items()}
    processes = SimpleNamespace(workers=clients)
    world: Any = SimpleNamespace(
        processes=processes,
        partitions={"gpu1": 1, "gpu0/3g.71gb@4": 1},
        owners={"gpu0/3g.71gb@4": "team-a"},
    )
    monitor: Any = SimpleNamespace(latest=lambda: readings)
    registry = CollectorRegistry()
    registry.register(GpuMetrics(world, monitor))
    return generate_latest(registry).decode()


def test_a_gpu_and_its_instance_are_rows_with_dcgms_labels(node: SimulatedNode) -> None:
    node.gpus[1].utilization_percent = 50
    reader = PynvmlReader()
    text = exposition(reader.readings(), {"gpu1": 78})
    reader.close()
    samples, names = parsed(text)
    memory = "hotbay_gpu_memory_bytes"
    assert samples[memory, "0", "1", "used"] == 1 << 30
    assert samples[memory, "0", "1", "total"] == node.gpus[0].board.profiles[4].memory_mib << 20
    assert samples[memory, "0", "", "used"] == 1 << 30
    assert samples[memory, "1", "", "total"] == node.gpus[1].board.memory_mib << 20
    assert samples["hotbay_gpu_temperature_celsius", "1", "", ""] == 33
    assert samples["hotbay_gpu_utilization_ratio", "1", "", ""] == 0.5
    assert samples["hotbay_gpu_sm_clock_hertz", "1", "", ""] == 1145e6
    assert samples["hotbay_gpu_ecc_uncorrected_errors_total", "0", "", ""] == 0
    assert samples["hotbay_gpu_process_memory_bytes", "0", "1", "77"] == 1 << 30
    # Not told: by any board here, and by one in MIG mode.
    assert not any(name.startswith("hotbay_gpu_energy") for name in names)
    assert ("hotbay_gpu_utilization_ratio", "0", "", "") not in samples
    uuid = node.gpus[0].instances[0].uuid
    assert f'UUID="{node.gpus[0].uuid}"' in text
    assert uuid not in text
    row = next(line for line in text.splitlines() if 'pid="78"' in line)
    assert 'partition="gpu1"' in row
    row = next(line for line in text.splitlines() if 'GPU_I_PROFILE="3g.71gb"' in line)
    assert 'partition="gpu0/3g.71gb@4",tenant="team-a"' in row


def test_one_figure_or_gpu_that_fails_does_not_take_the_others_along(node: SimulatedNode) -> None:
    reader = PynvmlReader()
    node.inject(Fault(pynvml.NVML_ERROR_NO_PERMISSION, "nvmlDeviceGetPowerUsage"))
    node.inject(
        Fault(pynvml.NVML_ERROR_UNKNOWN, "nvmlDeviceGetClockInfo", gpu_uuid=node.gpus[0].uuid)
    )
    (only,) = reader.readings()
    assert (only.gpu.index, only.power_w, only.temperature_c) == (1, None, 33)
    node.clear_injections()
    node.vanish(node.gpus[1].uuid)
    assert [each.gpu.index for each in reader.readings()] == [0]
    reader.close()


def test_mps_clients_are_told_apart_and_counted_once() -> None:
    gpu = Gpu("GPU-0", 0, "x")
    server, client = GpuProcess(5, 100), GpuProcess(6, 200)
    readings = GpuReadings(gpu, 10, 1, 2, processes=(server, client), clients=(client,))
    text = exposition((readings,))
    rows = [line for line in text.splitlines() if line.startswith("hotbay_gpu_process")]
    assert ['mps="no"' in rows[0], 'mps="yes"' in rows[1], len(rows)] == [True, True, 2]
    assert "hotbay_gpu_power_watts{" not in text


def test_a_list_of_processes_has_a_bound() -> None:
    many = [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in range(PROCESSES_MAX + 9)]
    assert len(processes_of(many)) == PROCESSES_MAX
    assert processes_of(None) == ()


def test_readings_are_kept_until_they_are_stale() -> None:
    class Driver:
        def __init__(self) -> None:
            self.fails = False
            self.reads = 0

        async def __call__(self) -> tuple[GpuReadings, ...]:
            self.reads += 1
            if self.fails:
                raise NvmlTimeoutError("stuck")
            return (GpuReadings(Gpu("GPU-0", 0), 10, 1, 2),)

    driver, now = Driver(), [0.0]
    seen: list[int] = []

    async def sleep(seconds: float) -> None:
        seen.append(len(monitor.latest()))
        driver.fails = True
        now[0] += seconds
        if now[0] > STALE_S + 2 * POLL_S:
            raise asyncio.CancelledError

    monitor = GpuMonitor(driver, clock=lambda: now[0], sleep=sleep)
    assert monitor.latest() == ()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(monitor.run())
    kept = int(STALE_S / POLL_S) + 1
    assert seen == [1] * kept + [0] * (len(seen) - kept)
    assert driver.reads == len(seen)
    assert 0 in seen


def test_the_deadline_holds_for_readings_too(node: SimulatedNode) -> None:
    stall = node.stall("nvmlDeviceGetTotalEccErrors")

    async def read() -> None:
        nvml = BoundedNvml(deadline_s=0.05)
        try:
            with pytest.raises(NvmlTimeoutError):
                await nvml.readings()
        finally:
            stall.released.set()
            await nvml.close()

    asyncio.run(read())


def test_the_daemon_shows_them_beside_its_own(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        text = ""
        while "hotbay_gpu_memory_bytes{" not in text:
            await asyncio.sleep(0)
            text = await api.stage.node.metrics()
        samples, names = parsed(text)
        assert samples["hotbay_gpu_memory_bytes", "0", "", "used"] == 0
        assert "hotbay_worker_up" in names
        assert 'modelName="NVIDIA H200"' in text

    play(tmp_path, scenario)
