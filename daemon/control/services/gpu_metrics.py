"""Metrics of GPUs, their instances and the processes on them, under DCGM's label names.

It owns the names. A row has `gpu`, `UUID` and `modelName`; that of an instance `GPU_I_ID` and
`GPU_I_PROFILE` too, and what is a partition of ours its name and the tenant it is for. The
invariant: what a GPU does not tell has no sample, so that nobody takes an absence for a 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daemon.control.actions.gpu_readings import GpuMonitor
from daemon.control.state.world import World
from partitioner.geometry import Instance
from partitioner.gpu import Gpu, GpuProcess
from partitioner.readings import GpuReadings

OURS = ("partition", "tenant")
GPU_LABELS = ("gpu", "UUID", "modelName", "GPU_I_ID", "GPU_I_PROFILE", *OURS)
# Name, help, attribute of the readings, factor to the unit in the name.
GAUGES = (
    ("hotbay_gpu_utilization_ratio", "Time with a kernel; none in MIG mode.",
     "utilization_percent", 0.01),
    ("hotbay_gpu_memory_utilization_ratio", "Time with memory traffic; none in MIG mode.",
     "memory_utilization_percent", 0.01),
    ("hotbay_gpu_temperature_celsius", "Temperature.", "temperature_c", 1),
    ("hotbay_gpu_power_watts", "Power drawn.", "power_w", 1),
    ("hotbay_gpu_sm_clock_hertz", "Clock of the multiprocessors.",
     "multiprocessor_clock_mhz", 1e6),
    ("hotbay_gpu_memory_clock_hertz", "Clock of the memory.", "memory_clock_mhz", 1e6),
    ("hotbay_gpu_pcie_transmit_bytes_per_second", "Sent over PCIe.",
     "pcie_sent_bytes_per_s", 1),
    ("hotbay_gpu_pcie_receive_bytes_per_second", "Received over PCIe.",
     "pcie_received_bytes_per_s", 1),
)  # fmt: skip
COUNTERS = (
    ("hotbay_gpu_energy_joules", "Energy since the driver was loaded.", "energy_j", 1),
    ("hotbay_gpu_ecc_corrected_errors", "Memory errors that were corrected.", "ecc_corrected", 1),
    ("hotbay_gpu_ecc_uncorrected_errors", "Memory errors that were not.", "ecc_uncorrected", 1),
    ("hotbay_gpu_pcie_replays", "PCIe packets that had to be sent again.", "pcie_replays", 1),
)


class GpuMetrics(Collector):
    """What the monitor read last, as metrics."""

    def __init__(self, world: World, monitor: GpuMonitor) -> None:
        self._world = world
        self._monitor = monitor

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        readings = self._monitor.latest()
        for name, text, attribute, factor in GAUGES:
            yield self._family(GaugeMetricFamily, name, text, attribute, factor, readings)
        for name, text, attribute, factor in COUNTERS:
            yield self._family(CounterMetricFamily, name, text, attribute, factor, readings)
        yield self._memory(readings)
        yield self._processes(readings)

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        attribute: str,
        factor: float,
        readings: Iterable[GpuReadings],
    ) -> Metric:
        family = kind(name, text, labels=GPU_LABELS)
        for each in readings:
            value = getattr(each, attribute)
            if value is not None:
                family.add_metric(self._labels(each.gpu), value * factor)
        return family

    def _memory(self, readings: Iterable[GpuReadings]) -> Metric:
        family = GaugeMetricFamily(
            "hotbay_gpu_memory_bytes",
            "Memory of GPUs and of their instances.",
            labels=(*GPU_LABELS, "kind"),
        )
        for each in readings:
            labels = self._labels(each.gpu)
            family.add_metric([*labels, "total"], each.memory_total_bytes)
            family.add_metric([*labels, "reserved"], each.memory_reserved_bytes)
            family.add_metric([*labels, "used"], each.memory_used_bytes)
            for instance in each.instances:
                labels = self._labels(each.gpu, instance.number)
                family.add_metric([*labels, "total"], instance.memory_total_bytes)
                family.add_metric([*labels, "used"], instance.memory_used_bytes)
        return family

    def _processes(self, readings: Iterable[GpuReadings]) -> Metric:
        """MPS clients are processes like others, and are told apart by a label."""
        family = GaugeMetricFamily(
            "hotbay_gpu_process_memory_bytes",
            "Device memory of each process that computes; `mps` says whether through MPS.",
            labels=(*GPU_LABELS, "pid", "mps"),
        )
        names = {client.pid: name for name, client in self._world.processes.workers.items()}
        for each in readings:
            clients = {process.pid for process in each.clients}
            for process in _once(each):
                if process.used_bytes is not None:
                    labels = self._labels(each.gpu, process.instance)[: -len(OURS)]
                    mps = "yes" if process.pid in clients else "no"
                    labels += ours(self._world, names.get(process.pid, ""))
                    family.add_metric([*labels, str(process.pid), mps], process.used_bytes)
        return family

    def _labels(self, gpu: Gpu, number: int | None = None) -> list[str]:
        found = (one.place for one in gpu.instances or () if one.number == number)
        place = next(found, None)
        name = f"gpu{gpu.index}" if place is None else f"gpu{gpu.index}/{place}"
        return [*device_labels(gpu, number, place), *ours(self._world, name)]


def device_labels(gpu: Gpu, number: int | None, place: Instance | None) -> list[str]:
    """Those of GPU_LABELS that DCGM has. A label that is empty is, to Prometheus, not there."""
    shown = "" if number is None else str(number)
    return [str(gpu.index), gpu.uuid, gpu.name, shown, "" if place is None else place.profile]


def ours(world: World, name: str) -> list[str]:
    """What is said of a partition of ours, under OURS."""
    if name not in world.partitions:
        return ["", ""]
    return [name, world.owners.get(name, "")]


def _once(readings: GpuReadings) -> list[GpuProcess]:
    """Each process once on each instance: drivers differ in whether they list MPS clients twice."""
    found = {(each.pid, each.instance): each for each in (*readings.processes, *readings.clients)}
    return list(found.values())
