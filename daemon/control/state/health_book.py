"""What is known of the health of the node's GPUs and GPU instances.

It owns the records of units that are not healthy, what drivers last told, and the counts. It never
asks a driver or a worker, and brings nothing about; `actions/health` does. The invariant: which
partitions are tainted follows from the records alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from daemon.control.state.records import UnitRecord
from partitioner.gpu import Gpu, GpuHealth
from partitioner.health import HealthState, Unit
from partitioner.nvml_health import HealthReadings
from partitioner.partition import Partition


class HealthBook:
    """See the module's text."""

    def __init__(self, records: Iterable[UnitRecord] = ()) -> None:
        self.records = {each.unit: each for each in records}
        self.known: set[Unit] = set(self.records)
        """Units that were ever in trouble: shown, healthy again or not."""
        self.readings: dict[str, HealthReadings] = {}
        """By GPU; none of one that does not answer."""
        self.xids: Counter[tuple[str, int]] = Counter()
        """By unit and XID, also of those that are ignored."""

    def state(self, unit: Unit) -> HealthState:
        """Where a unit stands."""
        record = self.records.get(unit)
        return record.state if record is not None else HealthState.HEALTHY

    def taints(self, partitions: Iterable[Partition]) -> dict[str, str]:
        """Why each tainted partition is."""
        return {
            partition.id: sentence(record)
            for partition in partitions
            for record in self.records.values()
            if record.unit.covers(partition)
        }

    def units(self, gpu: Gpu) -> list[Unit]:
        """The GPU itself, and its instances that were ever in trouble."""
        instances = {each for each in self.known if each.gpu == gpu.uuid and each.place}
        return [Unit(gpu.uuid, gpu.index), *sorted(instances)]

    def warnings(self, gpus: Iterable[Gpu]) -> Iterator[str]:
        """What an operator should know, each a sentence."""
        for record in self.records.values():
            yield f"{record.unit.name} {_phrase(record.state)}: {sentence(record)}"
        for gpu in gpus:
            if gpu.health is not GpuHealth.OK:
                continue
            told = self.readings.get(gpu.uuid, HealthReadings())
            name = f"gpu{gpu.index}"
            if told.rows_pending:
                yield f"{name}: rows of its memory are remapped with the next reset: plan for one"
            if told.rows_failed:
                yield f"{name}: no spare row of its memory is left: have it replaced"
            if told.thermal_slowdown:
                yield f"{name} is slowed down by heat: look at its cooling"
            if told.power_slowdown:
                yield f"{name} is slowed down by its power supply: look at its cables"


def sentence(record: UnitRecord) -> str:
    """What was reported, and what an operator is waited for to do."""
    text = record.incident.reason
    if record.state is not HealthState.NEEDS_OPERATOR:
        return text
    todo = {
        "reset": "reset the GPU",
        "reboot": "restart the host",
        "operator": "look at the GPU's cables and slot",
    }.get(record.incident.action.value, "look at the workers' logs")
    return f"{text}; {todo}, then `gpuctl gpu uncordon {record.unit.index}`"


def _phrase(state: HealthState) -> str:
    if state is HealthState.NEEDS_OPERATOR:
        return "needs an operator"
    return f"is in trouble ({state.value})"
