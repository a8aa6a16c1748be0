"""Carrying a change of layout out, step by step, or taking it back.

It owns the loop: read, decide, look for holders, write the step down, act, read again. Journal and
GPUs are behind Protocols. It never touches what no step names, and ends no process; it resets a GPU
only where the change says so and nobody uses it.
The invariant: at every moment the journal holds enough to come from whatever the GPUs say to the
old layout or to the new one; a step that the driver reports as done and that cannot be seen is an
error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from partitioner.cutting import Action, Cut, GpuChange, LayoutChange, Step, next_step, steps_left
from partitioner.errors import (
    ChangeCancelledError,
    ChangeNotMadeError,
    InstanceHeldError,
    LayoutMovedError,
    NotRolledBackError,
    PartitionerError,
    ResetHeldError,
)
from partitioner.geometry import Instance
from partitioner.gpu import Gpu, Telemetry
from partitioner.layout import Share

MAX_STEPS_PER_GPU = 64
"""More than any board has instances to destroy and create; a change that takes more is stuck."""


DISTURBING_NOBODY = frozenset({Action.CREATE, Action.COMPLETE, Action.SHARE, Action.UNSHARE})
"""What takes nothing from processes that are not ours."""


class Driver(Protocol):
    """The bounded NVML; see `partitioner.bounded.BoundedNvml`."""

    async def reread(self, uuid: str) -> Gpu: ...
    async def telemetry(self, uuid: str, generation: int) -> Telemetry: ...
    async def set_mig_mode(
        self, uuid: str, generation: int, enabled: bool, *, may_wait: bool = False
    ) -> None: ...
    async def reset_gpu(self, uuid: str, generation: int) -> None: ...
    async def create_instance(self, uuid: str, generation: int, place: Instance) -> None: ...
    async def complete_instance(
        self, uuid: str, generation: int, number: int, place: Instance
    ) -> None: ...
    async def destroy_instance(
        self, uuid: str, generation: int, number: int, place: Instance
    ) -> None: ...


class Sharing(Protocol):
    """The places under MPS; see `partitioner.mps.places.MpsPlaces`."""

    async def shared(self, gpu: str) -> Mapping[Instance | None, tuple[Share, ...]]: ...
    async def share(self, gpu: Gpu, place: Instance | None, shares: tuple[Share, ...]) -> None: ...
    async def unshare(self, gpu: str, place: Instance | None) -> None: ...
    def pids(self) -> frozenset[int]: ...


Note = Callable[[LayoutChange], Awaitable[None]]
Begun = Callable[[Step, int, int], None]


class Executor:
    """Drives GPUs to one of two layouts. `note` makes a change durable, in place of the last."""

    def __init__(self, driver: Driver, sharing: Sharing, note: Note) -> None:
        self._driver = driver
        self._sharing = sharing
        self._note = note

    async def refuse_held(self, change: LayoutChange, own_pids: Iterable[int] = ()) -> None:
        """Raise `InstanceHeldError` when a process not ours uses what the change takes away."""
        own = frozenset(own_pids) | self._sharing.pids()
        for each in change.gpus:
            gpu = await self._driver.reread(each.gpu)
            for step in steps_left(gpu, each, await self._sharing.shared(each.gpu)):
                await self._refuse_held(step, each, own)
            for instance in gpu.instances or ():
                if instance.place in each.cleared:
                    step = Step(
                        Action.CLEAR, gpu.uuid, instance.place, instance.number, gpu.generation
                    )
                    await self._refuse_held(step, each, own)

    async def holders(self, change: LayoutChange, own_pids: Iterable[int] = ()) -> dict[int, str]:
        """The processes not ours on what the change takes away or clears, and where they are."""
        own, found = frozenset(own_pids) | self._sharing.pids(), {}
        for each in change.gpus:
            gpu = await self._driver.reread(each.gpu)
            steps = [step for step in steps_left(gpu, each) if step.action not in DISTURBING_NOBODY]
            whole = any(step.place is None for step in steps)
            gone = {step.number for step in steps if step.action is Action.DESTROY}
            places = {one.number: one.place for one in gpu.instances or ()}
            gone |= {number for number, place in places.items() if place in each.cleared}
            told = await self._driver.telemetry(gpu.uuid, gpu.generation)
            for process in told.processes:
                number = process.instance
                if process.pid not in own and (whole or number in gone):
                    inside = f"/{places[number]}" if number in places else ""
                    found[process.pid] = f"gpu{each.index}{inside}"
        return found

    async def apply(
        self,
        change: LayoutChange,
        *,
        own_pids: Iterable[int] = (),
        cancelled: Callable[[], bool] = lambda: False,
        begun: Begun = lambda step, number, total: None,
    ) -> tuple[Gpu, ...]:
        """Bring the new layout about, or the old one back and raise what came between.

        `begun` is told each step with its number and their count. Raises `NotRolledBackError` when
        the old layout cannot be brought back now: the journal then still holds the change.
        """
        try:
            return await self._drive(change, frozenset(own_pids), cancelled, begun, forward=True)
        except PartitionerError as error:
            try:
                await self.take_back(change)
            except PartitionerError as second:
                raise NotRolledBackError(
                    f"{error}; and the layout of before could not be brought back: {second}; it is "
                    "tried again with the next layout that is applied, and when hotbayd starts"
                ) from error
            raise

    async def settle(self, change: LayoutChange) -> bool:
        """After a crash: whether the new layout is there; where it is not, the old one is now."""
        try:
            if not [each for each in change.gpus if await self._next(each, forward=True)]:
                return True
        except LayoutMovedError:
            pass  # The new layout cannot be reached any more.
        await self.take_back(change)
        return False

    async def take_back(self, change: LayoutChange) -> tuple[Gpu, ...]:
        """Bring the old layout back. Nobody can cancel that."""
        return await self._drive(change, frozenset(), lambda: False, _unheard, forward=False)

    async def _drive(
        self,
        change: LayoutChange,
        own_pids: frozenset[int],
        cancelled: Callable[[], bool],
        begun: Begun,
        *,
        forward: bool,
    ) -> tuple[Gpu, ...]:
        gpus = [await self._driver.reread(each.gpu) for each in change.gpus]
        own_pids |= self._sharing.pids()
        total = 0
        if forward:
            for gpu, each in zip(gpus, change.gpus, strict=True):
                total += len(steps_left(gpu, each, await self._sharing.shared(each.gpu)))
        number = 0
        for position, each in enumerate(change.gpus):
            last: Step | None = None
            for _ in range(MAX_STEPS_PER_GPU):
                shared = await self._sharing.shared(each.gpu)
                step = next_step(gpus[position], each, forward=forward, shared=shared)
                if step is None:
                    break
                if step.same_as(last):
                    raise ChangeNotMadeError(
                        f"the driver said that it did {describe(step, each)}, but it is not so; "
                        "look at its kernel log (dmesg)"
                    )
                if cancelled():
                    raise ChangeCancelledError(f"cancelled before {describe(step, each)}")
                if forward:
                    await self._refuse_held(step, each, own_pids)
                number += 1
                begun(step, number, max(number, total))
                await self._note(replace(change, step=step))
                target = each.after if forward else each.before
                await self._act(step, each, gpus[position], target)
                last = step
                gpus[position] = await self._driver.reread(each.gpu)
            else:
                raise ChangeNotMadeError(
                    f"gpu{each.index} has not come to its layout in {MAX_STEPS_PER_GPU} steps"
                )
        return tuple(gpus)

    async def _next(self, change: GpuChange, *, forward: bool) -> Step | None:
        gpu = await self._driver.reread(change.gpu)
        shared = await self._sharing.shared(change.gpu)
        return next_step(gpu, change, forward=forward, shared=shared)

    async def _act(self, step: Step, change: GpuChange, found: Gpu, target: Cut) -> None:
        driver, gpu, generation = self._driver, step.gpu, step.generation
        if step.action is Action.RESET:
            await driver.reset_gpu(gpu, generation)
        elif step.action is Action.SHARE:
            await self._sharing.share(found, step.place, target.shares[step.place])
        elif step.action is Action.UNSHARE:
            await self._sharing.unshare(gpu, step.place)
        elif step.place is None:
            enabled = step.action is Action.ENABLE
            await driver.set_mig_mode(gpu, generation, enabled, may_wait=change.reset)
        elif step.action is Action.CREATE:
            await driver.create_instance(gpu, generation, step.place)
        elif step.action is Action.COMPLETE:
            await driver.complete_instance(gpu, generation, step.number, step.place)
        else:
            await driver.destroy_instance(gpu, generation, step.number, step.place)

    async def _refuse_held(self, step: Step, change: GpuChange, own: frozenset[int]) -> None:
        """Who holds it is asked and named here: the driver would refuse without a name."""
        if step.action in DISTURBING_NOBODY:
            return
        told = await self._driver.telemetry(step.gpu, step.generation)
        pids = sorted(
            each.pid
            for each in told.processes
            if each.pid not in own and (step.place is None or each.instance == step.number)
        )
        if pids:
            names = ", ".join(str(pid) for pid in pids)
            if step.place is None and change.reset:
                raise ResetHeldError(
                    f"gpu{change.index} changes its MIG mode only with a reset, and is used by "
                    f"processes that are not hotbayd's (pid {names}); end them, then plan and "
                    "apply again",
                    tuple(pids),
                )
            raise InstanceHeldError(
                f"cannot {describe(step, change)}: it is used by processes that are not hotbayd's "
                f"(pid {names}); end them, then plan and apply again",
                tuple(pids),
            )


def describe(step: Step, change: GpuChange) -> str:
    """A step in words: `create gpu0/3g.71gb@4`."""
    where = f"gpu{change.index}" if step.place is None else f"gpu{change.index}/{step.place}"
    return f"{step.action.value} {where}"


def _unheard(step: Step, number: int, total: int) -> None:
    pass
