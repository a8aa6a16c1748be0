"""A change of layout as a value, and the one step that comes next: assert, then act.

It owns what is journalled of a change and the decision what to do, from what a GPU says of itself.
It is pure. The invariants: a step follows from what is there now, never from what was done before,
so that going on after a crash, going back, and doing it a second time are the same; an instance
that is in both layouts is in no step, and neither is one that is not ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from partitioner.errors import LayoutMovedError
from partitioner.geometry import Instance
from partitioner.gpu import Gpu, MigInstance
from partitioner.layout import GpuPlan, GpuState, MigChange, Plan, Share, share_identities

Shares = Mapping[Instance | None, tuple[Share, ...]]
_NOTHING: Shares = MappingProxyType({})


class Action(StrEnum):
    """What a step does."""

    DESTROY = "destroy"
    DISABLE = "disable MIG mode of"
    ENABLE = "enable MIG mode of"
    RESET = "reset"
    CLEAR = "take over"
    COMPLETE = "complete"
    CREATE = "create"
    SHARE = "share"
    UNSHARE = "stop sharing"


@dataclass(frozen=True)
class Step:
    """One change of one GPU, with the identity of what it changes.

    `number` is NVML's of the instance, `generation` that in which it was decided. What shares are
    made in a place is not in the step, but in the cut.
    """

    action: Action
    gpu: str
    place: Instance | None = None
    number: int = 0
    generation: int = 0

    def same_as(self, other: Step | None) -> bool:
        """Whether the other one does the same to the same thing."""
        return other is not None and (self.action, self.gpu, self.place) == (
            other.action, other.gpu, other.place,
        )  # fmt: skip


@dataclass(frozen=True)
class Owned:
    """The mark that an instance is ours: made by us, or taken over. Void after a reboot."""

    gpu: str
    place: Instance
    number: int
    uuid: str
    boot_id: str

    def marks(self, gpu: str, instance: MigInstance, boot_id: str) -> bool:
        """Whether it is this instance that the mark was made for."""
        return (
            (self.gpu, self.place, self.number, self.boot_id)
            == (gpu, instance.place, instance.number, boot_id)
        ) and instance.uuid in ("", self.uuid)


@dataclass(frozen=True)
class Divided:
    """A place, the whole GPU (None) or an instance, and the MPS shares in it."""

    place: Instance | None
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Cut:
    """How one GPU is cut, instances that are not ours left out."""

    mig_enabled: bool
    instances: tuple[Instance, ...] = ()
    divided: tuple[Divided, ...] = ()

    @property
    def shares(self) -> dict[Instance | None, tuple[Share, ...]]:
        """The shares of each place that has any."""
        return {each.place: each.shares for each in self.divided}

    def partitions(self, index: int) -> dict[str, tuple[Share | None, ...]]:
        """The partitions of GPU `index`, each with what it is."""
        places: tuple[Instance | None, ...] = self.instances if self.mig_enabled else (None,)
        named: dict[str, tuple[Share | None, ...]] = {}
        for place in places:
            parent = f"gpu{index}" if place is None else f"gpu{index}/{place}"
            named |= share_identities(parent, self.shares.get(place, ()))
        return named


@dataclass(frozen=True)
class GpuChange:
    """From one cut to another. `foreign` are the instances that were there and stay untouched."""

    gpu: str
    index: int
    before: Cut
    after: Cut
    foreign: tuple[Instance, ...] = ()
    reset: bool = False
    """Whether changing MIG mode takes a reset of the GPU."""
    cleared: tuple[Instance, ...] = ()
    """Instances of others that nobody may use when they become ours or go."""

    @property
    def kept(self) -> frozenset[Instance]:
        """The instances that are in both."""
        return frozenset(self.before.instances) & frozenset(self.after.instances)


@dataclass(frozen=True)
class LayoutChange:
    """What is meant to happen to a node, as journalled before anything does.

    `step` is the one that is under way, or was the last.
    """

    plan_id: str
    operation: str
    boot_id: str
    gpus: tuple[GpuChange, ...]
    step: Step | None = None
    ending: tuple[str, ...] = ()
    """Processes of others that are ended for it, in words."""
    owners: tuple[tuple[str, str], ...] = ()
    """Whom its partitions are for then, as far as that was said."""


def change_of(plan: Plan, states: Iterable[GpuState], operation: str, boot_id: str) -> LayoutChange:
    """The change that a plan describes, from the states that it was made of."""
    found = {state.uuid: state for state in states}
    gpus = tuple(_gpu_change(each, found[each.uuid]) for each in plan.gpus)
    owners = tuple(sorted(pair for each in plan.gpus for pair in each.owners.items()))
    return LayoutChange(plan.id, operation, boot_id, gpus, owners=owners)


def _gpu_change(plan: GpuPlan, state: GpuState) -> GpuChange:
    foreign = tuple(sorted(plan.foreign_instances))
    own = tuple(sorted(set(state.instances) - set(foreign)))
    mig = state.mig_enabled if plan.mig_change is MigChange.NONE else not state.mig_enabled
    after = Cut(mig, tuple(sorted(plan.chosen)), _divided(plan.shares))
    # Instances that are not ours are not shared by us, whatever is left under their name.
    shares = {place: each for place, each in state.shares.items() if place not in foreign}
    before = Cut(state.mig_enabled, own, _divided(shares))
    return GpuChange(plan.uuid, plan.index, before, after, foreign, plan.reset, plan.cleared)


def _divided(shares: Shares) -> tuple[Divided, ...]:
    places = sorted(shares, key=str)
    return tuple(Divided(place, shares[place]) for place in places if shares[place])


def next_step(
    gpu: Gpu, change: GpuChange, *, forward: bool, shared: Shares = _NOTHING
) -> Step | None:
    """What is to be done now to come to the new cut, or back to the old one; None: it is there.

    `shared` is what places are divided into now, nothing where that is only half done. Raises
    `LayoutMovedError` where somebody else has changed what was to be kept.
    """
    return next(_steps(gpu, change, forward, shared), None)


def steps_left(gpu: Gpu, change: GpuChange, shared: Shares = _NOTHING) -> tuple[Step, ...]:
    """Every step to the new cut, if nothing comes between."""
    return tuple(_steps(gpu, change, True, shared))


def _steps(gpu: Gpu, change: GpuChange, forward: bool, shared: Shares) -> Iterator[Step]:
    if gpu.instances is None:
        raise LayoutMovedError(f"gpu{change.index}: its instances cannot be seen any more")
    if not gpu.mig_capable and (change.before.mig_enabled or change.after.mig_enabled):
        # An answer that failed to come must not be taken for "off, without instances".
        raise LayoutMovedError(f"gpu{change.index} does not tell its MIG mode any more")
    target = change.after if forward else change.before
    ours = [
        each
        for each in gpu.instances
        if each.place in (*change.before.instances, *change.after.instances)
        and each.place not in change.foreign
    ]
    here = {each.place for each in ours}
    missing = sorted(set(target.instances) - here)
    if forward and gpu.mig_enabled and (lost := sorted(change.kept & set(missing))):
        raise LayoutMovedError(
            f"gpu{change.index}/{lost[0]} was to be kept and is gone: somebody else changed it; "
            "plan again"
        )

    def step(action: Action, place: Instance | None = None, number: int = 0) -> Step:
        return Step(action, change.gpu, place, number, gpu.generation)

    # A server holds its instance, so it goes before that does, and comes after it.
    for divided in sorted(set(shared) - set(target.shares), key=str):
        yield step(Action.UNSHARE, divided)
    for each in ours:
        if each.place not in target.instances:
            yield step(Action.DESTROY, each.place, each.number)
    yield from (step(action) for action in _mode_steps(gpu, change, target.mig_enabled))
    for each in ours:
        half = not each.uuid and each.place not in change.kept
        if half and each.place in target.instances:
            yield step(Action.COMPLETE, each.place, each.number)
    for place in missing:
        yield step(Action.CREATE, place)
    for wanted in target.divided:
        if shared.get(wanted.place) != wanted.shares:
            yield step(Action.SHARE, wanted.place)


def _mode_steps(gpu: Gpu, change: GpuChange, wanted: bool) -> Iterator[Action]:
    """A change that waits for a reset is made by one, or taken back by meaning the old mode."""
    switch = Action.ENABLE if wanted else Action.DISABLE
    if gpu.mig_enabled != wanted:
        if gpu.mig_pending != wanted:
            yield switch
        if change.reset:
            yield Action.RESET
    elif change.reset and gpu.mig_pending != wanted:
        yield switch


def owned_after(gpu: Gpu, change: GpuChange, boot_id: str, *, forward: bool) -> tuple[Owned, ...]:
    """The marks of what is ours on a GPU once the change is through, or taken back."""
    cut = change.after if forward else change.before
    return tuple(
        Owned(gpu.uuid, each.place, each.number, each.uuid, boot_id)
        for each in gpu.instances or ()
        if each.place in cut.instances
    )
