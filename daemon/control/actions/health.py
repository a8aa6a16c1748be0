"""GPUs in trouble: their partitions are drained, mended where that is allowed, proven, and opened.

It owns one task for each unit that is not healthy, and carries out what `partitioner.health`
decides. What is done to workers is in `health_steps`. The invariants: from the moment something is
reported no request is sent to the unit's partitions until its workers have shown that they serve;
every state is in the journal, and a restarted daemon goes on where it was; a GPU is never reset.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from daemon.control.actions.health_steps import Readings, Steps, ask
from daemon.control.actions.routing import Router
from daemon.control.errors import ControlError
from daemon.control.notify import boot_id
from daemon.control.state.health_book import HealthBook
from daemon.control.state.journal import Drop, Journal, Put
from daemon.control.state.records import UnitRecord
from daemon.control.state.world import World
from partitioner.gpu import Gpu, GpuHealth
from partitioner.health import (
    Happening,
    HealthState,
    Report,
    Unit,
    absorb,
    after,
    cleared,
    driver_action,
    join,
    verdict,
)
from partitioner.nvml_events import XidEvent
from partitioner.recovery_action import RecoveryAction
from partitioner.xid_table import Action, Scope, XidTable

XID_RECOVERY_ACTION_CHANGED = 154
# Those of a driver's actions during which what runs may go on to its end.
PATIENT = frozenset({RecoveryAction.DRAIN_AND_RESET, RecoveryAction.DRAIN_P2P})

log = logging.getLogger(__name__)


class Health:
    """See the module's text. `changed` is told whenever something to be shown has."""

    def __init__(
        self,
        world: World,
        readings: Readings,
        journal: Journal,
        router: Router,
        steps: Steps,
        table: XidTable,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._world = world
        self._readings = readings
        self._journal = journal
        self._router = router
        self._steps = steps
        self._table = table
        self._changed = changed
        self._clock = clock
        self._limits = world.config.health
        self._tasks: dict[Unit, asyncio.Task[None]] = {}
        self._wakes: dict[Unit, asyncio.Event] = {}
        self._acknowledged: set[Unit] = set()
        self._unproven: dict[Unit, tuple[str, ...]] = {}
        self._written: dict[Unit, UnitRecord] = {}
        self._gone: list[UnitRecord] = []
        """Part of another incident by now, and still in the journal."""
        self._look = asyncio.Event()

    @property
    def book(self) -> HealthBook:
        """What is known."""
        return self._world.health

    # Running.

    async def run(self) -> None:
        """Go on with what an earlier daemon began, and look at every GPU now and then, for ever."""
        try:
            for unit in self.book.records:
                self._attend(unit)
            while True:
                await self._poll()
                try:
                    async with asyncio.timeout(self._limits.poll_interval_s):
                        await self._look.wait()
                except TimeoutError:
                    pass  # a look that was due
                self._look.clear()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def look_soon(self) -> None:
        """Something about a GPU may have changed: look now."""
        self._look.set()
        for wake in self._wakes.values():
            wake.set()

    def uncordoned(self, gpu: str) -> None:
        """An operator says that he has acted."""
        self._acknowledged |= {
            unit
            for unit, record in self.book.records.items()
            if unit.gpu == gpu and record.state is HealthState.NEEDS_OPERATOR
        }
        self.look_soon()

    # What is told.

    async def heard(self, event: XidEvent) -> None:
        """The driver reported an XID."""
        gpu = next((each for each in self._world.gpus if each.uuid == event.gpu), None)
        if gpu is None:
            log.warning("XID %d of %s, which is no GPU of this node", event.xid, event.gpu)
            return
        rule = self._table.rule(event.xid)
        unit = _unit(gpu, event.instance if rule.scope is Scope.INSTANCE else None)
        self.book.xids[unit.name, event.xid] += 1
        log.warning("XID %d on %s: %s (%s)", event.xid, unit.name, rule.meaning, rule.action)
        reason = f"XID {event.xid}: {rule.meaning}"
        if event.xid == XID_RECOVERY_ACTION_CHANGED:
            told = await ask(self._readings, gpu.uuid)
            action = told.recovery_action if told is not None else None
            if action is not None:
                self._report_driver(unit, action, event.xid)
                return
        if rule.action is Action.IGNORE:
            self._changed()
            return
        self.report(Report(unit, self._clock(), rule.action, reason, event.xid))

    def _report_driver(self, unit: Unit, told: RecoveryAction, xid: int = 0) -> None:
        """The driver's own word; that it asks for nothing only matters before a proof."""
        state = self.book.state(unit)
        if not told and state in (HealthState.HEALTHY, HealthState.PROVING):
            return
        words = told.name.lower().replace("_", " ")
        reason = f"the driver asks for {words}" if told else "the driver asks for no reset any more"
        self.report(
            Report(
                unit, self._clock(), driver_action(told), reason, xid,
                by_driver=True, patient=told in PATIENT,
            )
        )  # fmt: skip

    def report(self, report: Report) -> None:
        """Taint the unit at once, and see to it in a task."""
        unit, before = report.unit, self.book.records.get(report.unit)
        incident = join(
            before.incident if before is not None else None, report, self._limits.correlation_s
        )
        state = before.state if before is not None else HealthState.HEALTHY
        moved = before.moved if before is not None else ()
        for record in self._instances(unit):
            joined = absorb(incident, record.incident, self._limits.correlation_s)
            if joined is not None:
                incident = joined
                moved = tuple(dict.fromkeys((*moved, *record.moved)))
                self._gone.append(self.book.records.pop(record.unit))
        following = after(state, Happening.REPORTED)
        kept = before or UnitRecord(unit, following, incident, self._clock(), boot_id())
        since_s = kept.since_s if following is state else self._clock()
        self._put(
            msgspec.structs.replace(
                kept, state=following, incident=incident, since_s=since_s, moved=moved
            )
        )
        self._attend(unit)

    def _instances(self, unit: Unit) -> list[UnitRecord]:
        """What is wrong with instances of a GPU; of an instance there are none."""
        return [
            record
            for other, record in self.book.records.items()
            if not unit.place and other.place and other.gpu == unit.gpu
        ]

    async def _poll(self) -> None:
        """Read every GPU; report what drivers do not report by themselves."""
        if self.book.records:
            self._retaint()  # Partitions may have been cut anew.
        if any(gpu.health is not GpuHealth.OK for gpu in self._world.gpus):
            self._world.gpus = await self._steps.discover()
        for gpu in self._world.gpus:
            unit = Unit(gpu.uuid, gpu.index)
            told = await ask(self._readings, gpu.uuid)
            if told is None:
                self.book.readings.pop(gpu.uuid, None)
                self._world.gpus = await self._steps.discover()
                lost = any(
                    each.uuid == gpu.uuid and each.health is GpuHealth.LOST
                    for each in self._world.gpus
                )
                if lost and unit not in self.book.records:
                    reason = "the GPU does not answer: it is lost"
                    at_s = self._clock()
                    self.report(Report(unit, at_s, Action.REBOOT, reason, by_driver=True))
                continue
            before = self.book.readings.get(gpu.uuid)
            self.book.readings[gpu.uuid] = told
            action = told.recovery_action
            known = before.recovery_action if before is not None else RecoveryAction.NONE
            new = action is not known or (bool(action) and unit not in self.book.records)
            if action is not None and new:
                self._report_driver(unit, action)
            if told.rows_failed and not (before is not None and before.rows_failed):
                reason = "no spare row of its memory is left"
                self.report(Report(unit, self._clock(), Action.OPERATOR, reason))
            if told != before:
                self._changed()

    # Mending.

    def _attend(self, unit: Unit) -> None:
        self._wakes.setdefault(unit, asyncio.Event()).set()
        task = self._tasks.get(unit)
        if task is None or task.done():
            self._tasks[unit] = asyncio.create_task(self._mend(unit), name=f"mend {unit.name}")

    async def _mend(self, unit: Unit) -> None:
        """Take a unit from state to state until it is healthy."""
        try:
            while (record := self.book.records.get(unit)) is not None:
                self._wakes[unit].clear()
                await self._write(record)
                happening = await self._step(record)
                now = self.book.records.get(unit)
                if now is None or now.state is not record.state:
                    continue  # Something was reported meanwhile: what was found is old.
                if happening is None:
                    await self._pause(unit)
                    continue
                if happening is Happening.PROVEN:
                    await self._opened(now)
                    continue
                await self._advance(now, happening)
        except asyncio.CancelledError:
            raise
        except Exception:  # The unit stays tainted, which is safe; the log says why.
            log.exception("mending %s ended by a bug", unit.name)
            self._world.warnings.append(f"mending {unit.name} ended by a bug: see hotbayd's log")

    async def _step(self, record: UnitRecord) -> Happening | None:
        """Do what the state asks for; None: nothing can happen before something is told."""
        unit, limits = record.unit, self._limits
        partitions = self._partitions(unit)
        if record.state is HealthState.TAINTED:
            await self._router.publish()
            return Happening.DRAIN_BEGUN
        if record.state is HealthState.DRAINING:
            patient = record.incident.patient
            drain_s = limits.patient_drain_s if patient else limits.drain_timeout_s
            await self._steps.drain(partitions, drain_s)
            log.info("%s is drained", unit.name)
            return Happening.DRAINED
        told = await ask(self._readings, unit.gpu)
        lost = told is None
        action = told.recovery_action if told is not None else None
        if record.state is HealthState.RECOVERING:
            return verdict(
                record.incident, action, lost=lost, attempts=record.attempts,
                now_s=self._clock(), window_s=limits.correlation_s,
            )  # fmt: skip
        if record.state is HealthState.PROVING:
            failing = await self._steps.prove(partitions, limits.prove_timeout_s)
            self._unproven[unit] = failing
            return Happening.DISPROVEN if lost or failing else Happening.PROVEN
        said = unit in self._acknowledged
        self._acknowledged.discard(unit)
        told_so = cleared(record.incident, action, lost=lost, attempts=record.attempts)
        asks = bool(action)
        if said and (lost or asks):
            log.warning("%s is not proven: its driver still asks for %s", unit.name, told)
        if (said and not lost and not asks) or told_so:
            return Happening.CLEARED
        return None

    async def _advance(self, record: UnitRecord, happening: Happening) -> None:
        state = after(record.state, happening)
        attempts = record.attempts + (happening is Happening.DISPROVEN)
        if happening is Happening.CLEARED:
            attempts = 0
        moved = record.moved
        if happening is Happening.BLOCKED:
            # Said first, so that nothing is brought back here meanwhile.
            leaving = self._steps.placed_on(self._partitions(record.unit))
            moved = tuple(dict.fromkeys((*moved, *leaving)))
        following = msgspec.structs.replace(
            record, state=state, since_s=self._clock(), attempts=attempts, moved=moved
        )
        self._put(following)
        await self._write(following)
        if happening is Happening.BLOCKED:
            await self._steps.move_away(self._partitions(record.unit))
        elif happening is Happening.DISPROVEN:
            await self._steps.restart(self._unproven.pop(record.unit, ()))

    async def _opened(self, record: UnitRecord) -> None:
        """The unit is proven: requests may come again, and what was taken off returns."""
        unit = record.unit
        after(record.state, Happening.PROVEN)
        del self.book.records[unit]
        self._retaint()
        self._written.pop(unit, None)
        await self._commit(Drop(record))
        await self._router.publish()
        log.info("%s is healthy again", unit.name)
        self._steps.bring_back(record.moved)

    async def _pause(self, unit: Unit) -> None:
        try:
            async with asyncio.timeout(self._limits.poll_interval_s):
                await self._wakes[unit].wait()
        except TimeoutError:
            pass  # time for another look

    # Inside.

    def _partitions(self, unit: Unit) -> tuple[str, ...]:
        partitions = self._world.partitions.values()
        return tuple(each.id for each in partitions if unit.covers(each))

    def _put(self, record: UnitRecord) -> None:
        self.book.records[record.unit] = record
        self.book.known.add(record.unit)
        self._retaint()

    def _retaint(self) -> None:
        world = self._world
        world.closures.taints = self.book.taints(world.partitions.values())
        self._changed()

    async def _write(self, record: UnitRecord) -> None:
        """Journal a record that is not there as it is."""
        if self._written.get(record.unit) is not record:
            self._written[record.unit] = record
            await self._commit(Put(record))

    async def _commit(self, change: Put | Drop) -> None:
        """A journal that cannot be written must not keep requests on a GPU in trouble."""
        gone, self._gone = self._gone, []
        try:
            await self._journal.commit([change, *(Drop(each) for each in gone)])
        except ControlError as error:
            log.error("the health of a GPU could not be written: %s", error)


def _unit(gpu: Gpu, instance: int | None) -> Unit:
    """The instance with NVML's number, or the GPU where that is not known."""
    for each in gpu.instances or ():
        if instance is not None and each.number == instance:
            return Unit(gpu.uuid, gpu.index, str(each.place))
    return Unit(gpu.uuid, gpu.index)
