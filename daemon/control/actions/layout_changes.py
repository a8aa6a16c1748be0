"""Applying a layout: workers that drain and end, GPUs that are cut anew, workers that start.

It owns the operation and what surrounds the partitioner's executor: which plan may be applied, the
journal, the fleet, the models that lose their partition. It decides no step. The invariants: what
is applied is the plan that was shown, or nothing; the intent is in the journal before a worker is
told to end, and leaves it together with the marks of what is ours now; until then every model
stays placed where it was, so that whoever takes the change back finds it brought back there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterable
from typing import Protocol

from daemon.control.actions.bring_back import BringBack
from daemon.control.actions.conductor import Conductor
from daemon.control.actions.forcing import Forcing
from daemon.control.actions.layout_errors import refusal
from daemon.control.actions.layout_marks import marks_after, owners_after, void_marks
from daemon.control.actions.layouts import Layouts
from daemon.control.actions.phases import Phases, timed
from daemon.control.actions.routing import Router
from daemon.control.errors import ControlError
from daemon.control.failpoints import FailPoint, FailPoints
from daemon.control.notify import boot_id
from daemon.control.processes.holders import Holder, Holders
from daemon.control.state.failures import Failed
from daemon.control.state.journal import Drop, Journal, Put
from daemon.control.state.operations import Operations
from daemon.control.state.records import (
    AppliedLayout,
    Cause,
    Failure,
    Intent,
    Kind,
    Operation,
    Plan,
    Result,
    Stage,
)
from daemon.control.state.running import NOTHING_CHANGED, Handle, Outcome, Request, foreseen
from daemon.control.state.world import World
from partitioner import layout
from partitioner.cutting import LayoutChange, Step, change_of
from partitioner.errors import NotRolledBackError, PartitionerError
from partitioner.executor import Driver, Executor, Sharing, describe
from partitioner.gpu import Gpu
from partitioner.mps.shared import SharedPlace
from partitioner.partition import partitions_of

CLAIM = "layout"

log = logging.getLogger(__name__)


class NodeDriver(Driver, Protocol):
    """What reads and changes the GPUs of the node."""

    async def discover(self) -> tuple[Gpu, ...]: ...


class Workers(Protocol):
    """The fleet, as far as partitions come and go."""

    def add(self, partition: str) -> None: ...
    async def settled(self, partition: str) -> None: ...
    async def remove(self, partition: str, drain_timeout_s: float) -> None: ...


class Shared(Sharing, Protocol):
    """The places under MPS, and the notes of them."""

    def noted(self) -> tuple[SharedPlace, ...]: ...
    async def refuse_missing(self, shares: Collection[layout.Share]) -> None: ...


class LayoutChanges:
    """Applies plans, one at a time; settles at start what a daemon that was killed left open."""

    def __init__(
        self,
        world: World,
        layouts: Layouts,
        driver: NodeDriver,
        workers: Workers,
        journal: Journal,
        operations: Operations,
        conductor: Conductor,
        router: Router,
        failpoints: FailPoints,
        holders: Holders,
        sharing: Shared,
        returning: BringBack,
    ) -> None:
        self._world = world
        self._layouts = layouts
        self._driver = driver
        self._sharing = sharing
        self._workers = workers
        self._journal = journal
        self._operations = operations
        self._conductor = conductor
        self._router = router
        self._failpoints = failpoints
        self._executor = Executor(driver, sharing, self._note)
        self._forcing = Forcing(self._executor, holders)
        self._open: LayoutChange | None = None
        """What the journal holds: under way, or neither done nor taken back."""
        self._done: dict[str, Outcome] = {}
        self._gone = ""
        """The warning of what a reboot took."""
        self._returning = returning

    # By call.

    async def apply(
        self,
        request: Request,
        plan_id: str,
        *,
        validate_only: bool,
        force: bool = False,
        end_pids: tuple[int, ...] = (),
        cause: Cause = Cause.API,
    ) -> Operation:
        """Begin to apply a plan that was shown. Raises Refused, having touched nothing.

        With `force` processes of others in its way are ended: `end_pids`, or whichever there are.
        """
        await self._conductor.admit()
        if not validate_only:
            existing = await self._operations.replay(request)
            if existing is not None:
                return existing
        intent = Intent(Kind.LAYOUT, cause, layout=plan_id, force=force, end_pids=end_pids)
        plan, change, holders = await self._prepare(intent, "")
        predicted = Plan(predicted_ms=plan.downtime_ms)
        names = sorted({*_names(change, before=True), *_names(change, before=False)})
        if validate_only:
            result = self._result(change, NOTHING_CHANGED, ended=holders)
            return foreseen(request, intent, predicted, result)
        claims = (CLAIM, *(f"partition:{name}" for name in names))
        return await self._operations.begin(request, intent, predicted, claims, self._run)

    async def _prepare(
        self, intent: Intent, operation: str
    ) -> tuple[layout.Plan, LayoutChange, tuple[Holder, ...]]:
        """Plan again what was shown, look for what forbids it, and for whom to end."""
        plan, states = await self._layouts.again(intent.layout)
        change = change_of(plan, states, operation, boot_id())
        try:
            divided = [each for gpu in change.gpus for each in gpu.after.divided]
            await self._sharing.refuse_missing([one for each in divided for one in each.shares])
            if intent.force:
                return plan, change, await self._look(change, intent, self._own_pids())
            await self._executor.refuse_held(change, self._own_pids())
        except PartitionerError as error:
            raise refusal(error) from error
        return plan, change, ()

    async def _look(
        self, change: LayoutChange, intent: Intent, own_pids: frozenset[int]
    ) -> tuple[Holder, ...]:
        return await self._forcing.look(change, own_pids, intent.end_pids)

    def _own_pids(self) -> frozenset[int]:
        return frozenset(client.pid for client in self._world.processes.workers.values())

    async def _run(self, handle: Handle) -> Outcome:
        await self._failpoints.reach(FailPoint.BEGUN)
        stop = asyncio.Event()

        async def abandon() -> None:
            stop.set()

        handle.cancel_by(abandon)
        handle.update(stage=Stage.PLANNING)
        phases = Phases()
        await self._settle_open()
        intent = handle.record.intent
        _, change, holders = await self._prepare(intent, handle.name)
        pids = self._own_pids()
        leaving = self._leaving(change)

        def begun(step: Step, number: int, total: int) -> None:
            gpu = next(each for each in change.gpus if each.gpu == step.gpu)
            message = f"step {number} of {total}: {describe(step, gpu)}"
            handle.update(stage=Stage.CUTTING, message=message)

        await self._note(change)
        phases.end("plan")
        try:
            handle.update(stage=Stage.DRAINING, message=f"ending {len(leaving)} workers")
            await self._take_down(leaving)
            await self._failpoints.reach(FailPoint.CLEARED)
            if intent.force:
                # The last thing before the GPUs are cut: it alone cannot be taken back.
                holders = await self._look(change, intent, pids)
                change = self._forcing.noted(change, holders)
                await self._note(change)
                handle.update(message=f"ending {len(holders)} processes of others")
                await self._forcing.end(holders)
            phases.end("drain")
            await self._executor.apply(change, own_pids=pids, cancelled=stop.is_set, begun=begun)
            phases.end("cut")
            await self._failpoints.reach(FailPoint.CUT)
        except (PartitionerError, ControlError) as error:
            handle.update(stage=Stage.ROLLING_BACK, message=str(error))
            raise await self._given_up(change, error) from error
        handle.cancel_by(None)
        handle.update(stage=Stage.COMMITTED, message="")
        outcome = await self._committed(change, holders)
        phases.end("commit")
        assert outcome.result.layout is not None
        await asyncio.gather(*map(self._workers.settled, outcome.result.layout.created))
        phases.end("start")
        return timed(outcome, phases)

    # What surrounds the cutting.

    def _leaving(self, change: LayoutChange) -> tuple[str, ...]:
        """The partitions that the change takes away, as far as there are any."""
        return tuple(name for name in self._world.partitions if name in _gone(change))

    async def _take_down(self, partitions: Iterable[str]) -> None:
        """Hold new requests for what serves there, let the running ones end, end the workers."""
        world, names = self._world, tuple(partitions)
        for key in [key for key, where in world.serving.items() if where in names]:
            world.withhold(key)
        await self._router.publish()
        drain_s = world.config.scheduling.drain_timeout_s
        await asyncio.gather(*(self._workers.remove(each, drain_s) for each in names))

    async def _given_up(self, change: LayoutChange, error: Exception) -> ControlError:
        """Bring the old layout and its workers back; returns what to raise."""
        if not isinstance(error, NotRolledBackError):
            try:
                await self._executor.take_back(change)
            except PartitionerError as second:
                error = NotRolledBackError(f"{error}; and it could not be taken back: {second}")
        if not isinstance(error, NotRolledBackError):
            await self._taken_back(change)
        else:
            self._repartition(await self._driver.discover(), change)
        return error if isinstance(error, ControlError) else refusal(error)

    async def _taken_back(self, change: LayoutChange) -> None:
        """The old layout is there: the marks of instances that had to be made again are new."""
        gpus = await self._driver.discover()
        changes = marks_after(self._world, change, {gpu.uuid: gpu for gpu in gpus}, forward=False)
        await self._journal.commit([Drop(change), *changes])
        self._open = None
        self._repartition(gpus, change)

    async def _committed(self, change: LayoutChange, ended: tuple[Holder, ...] = ()) -> Outcome:
        """The new layout is there: say so everywhere but in the journal, which the end does."""
        world = self._world
        gone = _gone(change)
        gpus = await self._driver.discover()
        changes = marks_after(self._world, change, {gpu.uuid: gpu for gpu in gpus}, forward=True)
        moved = [each for each in world.placements.values() if each.partition in gone]
        for placement in moved:
            world.displaced(placement.model)
        result = self._result(change, "", tuple(each.model for each in moved), ended)
        self._repartition(gpus, change)
        self._router.publish_soon()
        self._open = None
        lost = tuple(each.model for each in moved)
        self._returning.later(lost, "lost its partition to a new layout", after=change.operation)
        world.owners = owners_after(world, change)
        kept = await self._layouts.kept()
        return Outcome(result, (Drop(change), *changes, *kept, *(Drop(each) for each in moved)))

    def _repartition(self, gpus: tuple[Gpu, ...], change: LayoutChange) -> None:
        """Let the partitions of the changed GPUs be those that are there, each with a worker."""
        world = self._world
        world.gpus = gpus
        changed = {each.gpu for each in change.gpus}
        found = partitions_of(gpus, world.owned, boot_id(), self._sharing.noted())
        kept = [each for each in world.partitions.values() if each.gpu_uuid not in changed]
        fresh = [each for each in found if each.gpu_uuid in changed]
        world.repartition(sorted([*kept, *fresh], key=lambda each: each.gpu_index))
        for each in fresh:
            self._workers.add(each.id)

    def _result(
        self,
        change: LayoutChange,
        message: str,
        moved: tuple[str, ...] | None = None,
        ended: tuple[Holder, ...] = (),
    ) -> Result:
        # What was there and is taken over now has come, too.
        new = _names(change, before=False) - frozenset(self._world.partitions)
        gone, came = sorted(_gone(change)), sorted(_gone(change, forward=False) | new)
        if moved is None:
            moved = tuple(key for name in gone for key in self._world.residents(name))
        applied = AppliedLayout(
            created=tuple(came), destroyed=tuple(gone), moved=moved, ended=ended
        )
        nothing = not (applied.created or applied.destroyed)
        text = message or ("the layout was there already" if nothing else "")
        return Result("", "ACTIVE", message=text, layout=applied)

    async def _note(self, change: LayoutChange) -> None:
        await self._journal.commit([Put(change)])
        self._open = change

    # What an earlier change left open.

    async def _settle_open(self) -> None:
        """Before anything new: a change that could neither be made nor taken back."""
        change = self._open
        if change is None:
            return
        try:
            await self._executor.take_back(change)
        except PartitionerError as error:
            raise refusal(
                NotRolledBackError(f"the change of {change.plan_id} is still half done: {error}")
            ) from error
        await self._taken_back(change)

    async def settle(self, change: LayoutChange | None, operations: Iterable[Operation]) -> None:
        """At start, before any worker is: bring an open change to one of its two ends."""
        world, boot = self._world, boot_id()
        void = void_marks(world, boot)
        if void:
            await self._journal.commit([Drop(each) for each in void])
            names = ", ".join(sorted({str(each.place) for each in void}))
            self._gone = f"GPU instances are gone since the host was started: {names}"
            world.warnings.append(self._gone)
        if change is None:
            return
        if change.boot_id != boot:
            await self._journal.commit([Drop(change)])
            world.warnings.append(f"the host was started during the change {change.plan_id}")
            return
        self._open = change
        try:
            new = await self._executor.settle(change)
            if new:
                gone = _gone(change) & frozenset(self._world.partitions)
                outcome = await self._committed(change)
                if any(each.name == change.operation for each in operations):
                    self._done[change.operation] = outcome
                else:
                    await self._journal.commit(outcome.changes)
            else:
                gone = _gone(change, forward=False) & frozenset(self._world.partitions)
                await self._taken_back(change)
        except PartitionerError as error:
            log.error("the change %s cannot be settled: %s", change.plan_id, error)
            world.warnings.append(f"the change of layout {change.plan_id} is half done: {error}")
            return
        for name in gone - frozenset(world.partitions):
            await self._workers.remove(name, 0.0)

    def forget_gone(self) -> None:
        """What a reboot took is there again."""
        with contextlib.suppress(ValueError):
            self._world.warnings.remove(self._gone)

    async def after_restart(self, handle: Handle) -> Outcome:
        """How an operation that an earlier daemon began has ended."""
        outcome = self._done.pop(handle.name, None)
        if outcome is not None:
            return outcome
        raise Failed(
            Failure(
                "LAYOUT_UNSETTLED" if self._open is not None else "CANCELLED",
                "hotbayd ended while the layout was changed; "
                + (
                    "the change is half done, see the node's warnings"
                    if self._open is not None
                    else "the layout is the one of before: plan and apply again"
                ),
                {"operation": handle.name},
            )
        )


def _names(change: LayoutChange, *, before: bool) -> frozenset[str]:
    """The partitions of the changed GPUs in one of the two layouts."""
    cuts = ((each.index, each.before if before else each.after) for each in change.gpus)
    return frozenset(name for index, cut in cuts for name in cut.partitions(index))


def _gone(change: LayoutChange, *, forward: bool = True) -> frozenset[str]:
    """The partitions that the change takes away; a share with other limits is another one."""
    gone: set[str] = set()
    for each in change.gpus:
        cuts = (each.before, each.after) if forward else (each.after, each.before)
        before, after = (cut.partitions(each.index) for cut in cuts)
        gone |= {name for name in before if name not in after or before[name] != after[name]}
    return frozenset(gone)
