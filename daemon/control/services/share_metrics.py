"""Metrics of places under MPS: their servers, and each client with its memory and limits.

It owns the names. Rows have the labels of `gpu_metrics`; a process's also its `pid` and its `role`.
It asks neither a control daemon nor a driver: the watch over shares has looked at the one, the
monitor has read the other. The invariant: what nobody told has no sample, such as the limits of a
stranger, or the memory of a process that the driver does not list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daemon.control.actions.gpu_readings import GpuMonitor
from daemon.control.services.gpu_metrics import GPU_LABELS, device_labels, ours
from daemon.control.state.world import World
from partitioner.mps.control import Limits, ServerStatus
from partitioner.mps.sightings import SeenPlace

GONE = "gone"
"""The state of a server whose control daemon does not answer."""
PROCESS_LABELS = (*GPU_LABELS, "pid", "role")


class ShareMetrics(Collector):
    """What was seen of each place when it was last looked after, as metrics."""

    def __init__(
        self, world: World, monitor: GpuMonitor, seen: Callable[[], Iterable[SeenPlace]]
    ) -> None:
        self._world = world
        self._monitor = monitor
        self._seen = seen

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        places = [
            (each, labels) for each in self._seen() if (labels := self._labels(each)) is not None
        ]
        yield from self._servers(places)
        yield from self._processes(places)

    def _servers(self, places: Iterable[tuple[SeenPlace, list[str]]]) -> Iterator[Metric]:
        states = GaugeMetricFamily(
            "hotbay_mps_server_state",
            "1 for the state that a place's MPS server is in.",
            labels=(*GPU_LABELS, "state"),
        )
        faults = CounterMetricFamily(
            "hotbay_mps_server_faults",
            "How often it was found in fault, or without a daemon.",
            labels=GPU_LABELS,
        )
        for each, labels in places:
            now = each.server.value if each.server is not None else GONE
            for state in (*(one.value for one in ServerStatus), GONE):
                states.add_metric([*labels, "", "", state], float(state == now))
            faults.add_metric([*labels, "", ""], each.faults)
        yield from (states, faults)

    def _processes(self, places: Iterable[tuple[SeenPlace, list[str]]]) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "hotbay_mps_client_info",
            "A place's processes: its workers, workers that are no clients, clients of others.",
            labels=PROCESS_LABELS,
        )
        memory = GaugeMetricFamily(
            "hotbay_mps_client_memory_bytes",
            "Device memory that a client uses, and its limit.",
            labels=(*PROCESS_LABELS, "kind"),
        )
        threads = GaugeMetricFamily(
            "hotbay_mps_client_thread_limit_ratio",
            "The most of its place's threads that a client may use.",
            labels=PROCESS_LABELS,
        )
        used = self._used()
        for each, device in places:
            for process in each.processes:
                labels = [*device, *ours(self._world, process.partition)]
                labels += [str(process.pid), process.role.value]
                info.add_metric(labels, 1)
                used_bytes = used.get((each.shared.gpu, process.pid))
                if used_bytes is not None:
                    memory.add_metric([*labels, "used"], used_bytes)
                if process.limits is not None:
                    memory.add_metric([*labels, "limit"], process.limits.memory_bytes)
                    threads.add_metric(labels, _part(each, process.limits))
        yield from (info, memory, threads)

    def _used(self) -> dict[tuple[str, int], int | None]:
        """Device memory by GPU and process; the driver's list of MPS clients counts first."""
        return {
            (each.gpu.uuid, process.pid): process.used_bytes
            for each in self._monitor.latest()
            for process in (*each.processes, *each.clients)
        }

    def _labels(self, seen: SeenPlace) -> list[str] | None:
        """DCGM's labels of a place; none where its GPU is not known any more."""
        gpu = next((one for one in self._world.gpus if one.uuid == seen.shared.gpu), None)
        if gpu is None:
            return None
        place = seen.shared.place
        found = (one.number for one in gpu.instances or () if one.place == place)
        return device_labels(gpu, next(found, None), place)


def _part(seen: SeenPlace, limits: Limits) -> float:
    """The part of its place's threads that a client may use."""
    if limits.sm_count is not None and seen.shared.sm_count:
        return limits.sm_count / seen.shared.sm_count
    return limits.thread_percent / 100
