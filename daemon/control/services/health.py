"""Health as the API's messages and as metrics: functions from what the book holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hotbay.v1 import health_pb2
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daemon.control.services.answers import timestamp
from daemon.control.state.health_book import HealthBook, sentence
from daemon.control.state.world import World
from partitioner.health import HealthState, Unit
from partitioner.nvml_health import HealthReadings


def unit(book: HealthBook, which: Unit) -> health_pb2.UnitHealth:
    """One unit, healthy or not."""
    state = book.state(which)
    message = health_pb2.UnitHealth(
        unit=which.name,
        state=health_pb2.HealthState.Value(f"HEALTH_STATE_{state.name}"),
    )
    record = book.records.get(which)
    if record is not None:
        message.reason = sentence(record)
        message.action = record.incident.action.value
        message.xids.extend(record.incident.xids)
        message.since.CopyFrom(timestamp(record.since_s))
    return message


def readings(told: HealthReadings | None) -> health_pb2.HealthReadings:
    """What a driver told; a field that it did not tell is absent."""
    if told is None:
        return health_pb2.HealthReadings()
    action = told.recovery_action
    return health_pb2.HealthReadings(
        recovery_action=action.name.lower() if action is not None else None,
        uncorrected_errors=told.uncorrected_errors,
        rows_pending=told.rows_pending,
        rows_failed=told.rows_failed,
        thermal_slowdown=told.thermal_slowdown,
        power_slowdown=told.power_slowdown,
    )


class HealthMetrics(Collector):
    """The state of every unit, XIDs by number, and which GPUs are cordoned."""

    def __init__(self, world: World) -> None:
        self._world = world

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        world = self._world
        states = GaugeMetricFamily(
            "hotbay_gpu_health_state",
            "1 for the state that a GPU or GPU instance is in.",
            labels=["unit", "state"],
        )
        cordoned = GaugeMetricFamily(
            "hotbay_gpu_cordoned", "Whether it takes no new models.", labels=["unit"]
        )
        for gpu in world.gpus:
            cordoned.add_metric([f"gpu{gpu.index}"], gpu.uuid in world.closures.cordons)
            for which in world.health.units(gpu):
                now = world.health.state(which)
                for state in HealthState:
                    states.add_metric([which.name, state.value], float(state is now))
        xids = CounterMetricFamily("hotbay_gpu_xids", "XIDs reported.", labels=["unit", "xid"])
        for (name, xid), count in sorted(world.health.xids.items()):
            xids.add_metric([name, str(xid)], count)
        yield from (states, cordoned, xids)
