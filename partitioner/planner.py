"""From the layout that is to the layout that is wanted, with as little change as possible.

It owns what a plan says: what is kept, created, destroyed and moved, for how long, under which id.
Placements are chosen by `partitioner.placing`. It is pure: values in, a plan out, no GPU asked. The
invariants: an instance that is in both layouts is never touched, foreign instances neither; the
same input gives the same plan and the same id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from partitioner.errors import LayoutDoesNotFitError
from partitioner.geometry import Instance, fragmentation
from partitioner.layout import (
    Costs,
    GpuPlan,
    GpuState,
    GpuWanted,
    MigChange,
    Plan,
    Share,
    share_identities,
    share_ids,
)
from partitioner.placing import choose

PLAN_ID_HEX_DIGITS = 16


def plan(current: Iterable[GpuState], wanted: Iterable[GpuWanted], costs: Costs) -> Plan:
    """Plan every GPU that `wanted` names; others are left as they are.

    Raises `LayoutDoesNotFitError` with the nearest layout that would fit.
    """
    states = {state.uuid: state for state in current}
    wishes = tuple(sorted(wanted, key=lambda each: states[each.uuid].index))
    gpus = tuple(_plan_gpu(states[each.uuid], each, costs) for each in wishes)
    return Plan(plan_id(states.values(), wishes), gpus)


def plan_id(current: Iterable[GpuState], wanted: Iterable[GpuWanted]) -> str:
    """A name for this current and this wanted layout: another of either has another name."""
    have = [
        [
            state.uuid,
            state.mig_enabled,
            sorted(str(each) for each in state.instances),
            sorted(str(each) for each in state.foreign),
            *([sorted(str(each) for each in state.cleared)] if state.cleared else []),
            sorted([str(place), _share_values(shares)] for place, shares in state.shares.items()),
        ]
        for state in sorted(current, key=lambda each: each.uuid)
    ]
    want = [
        [
            gpu.uuid,
            gpu.owner,
            _share_values(gpu.shares),
            None
            if gpu.instances is None
            else [
                [sorted(str(option) for option in each.options), each.owner,
                 _share_values(each.shares)]
                for each in gpu.instances
            ],
        ]
        for gpu in sorted(wanted, key=lambda each: each.uuid)
    ]  # fmt: skip
    text = json.dumps([have, want], separators=(",", ":"))
    return f"plan-{hashlib.sha256(text.encode()).hexdigest()[:PLAN_ID_HEX_DIGITS]}"


def _share_values(shares: Iterable[Share]) -> list[list[object]]:
    return [[each.memory_bytes, each.thread_percent, each.owner, each.sm_count] for each in shares]


def _plan_gpu(state: GpuState, wish: GpuWanted, costs: Costs) -> GpuPlan:
    foreign = tuple(sorted(state.foreign))
    own = tuple(sorted(set(state.instances) - state.foreign))
    if wish.instances is None and foreign:
        names = ", ".join(state.partition_id(each) for each in foreign)
        raise LayoutDoesNotFitError(
            wish.line,
            f"gpu{state.index} cannot be used whole: {names} on it are not ours; leave this GPU "
            "out of the file, or say `found: adopt` to take them over",
        )
    chosen: tuple[Instance, ...] = ()
    if wish.instances is not None:
        chosen = choose(state, wish, costs)
    kept = tuple(each for each in own if each in chosen)
    created = tuple(each for each in sorted(chosen) if each not in own)
    destroyed = tuple(each for each in own if each not in chosen)
    before, after = _partitions(state, own), _wanted_partitions(state, wish, chosen)
    keep = tuple(name for name in before if name in after and before[name] == after[name])
    destroy = tuple(name for name in before if name not in keep)
    move = tuple(name for name in destroy if name in costs.move_ms)
    change = _mig_change(state, wish)
    reset = change is not MigChange.NONE and state.mig_toggle_needs_reset
    downtime_ms = 0.0
    if move:
        downtime_ms = len(destroyed) * costs.destroy_ms + len(created) * costs.create_ms
        downtime_ms += sum(costs.move_ms[name] for name in move)
        downtime_ms += costs.mode_ms if change else 0.0
        downtime_ms += costs.reset_ms if reset else 0.0
    return GpuPlan(
        uuid=state.uuid,
        index=state.index,
        mig_change=change,
        reset=reset,
        kept_instances=kept,
        created_instances=created,
        destroyed_instances=destroyed,
        foreign_instances=foreign,
        chosen=chosen,
        keep=keep,
        create=tuple(name for name in after if name not in keep),
        destroy=destroy,
        move=move,
        foreign=tuple(state.partition_id(each) for each in foreign),
        cleared=tuple(sorted(state.cleared)),
        fragmentation_before=fragmentation(state.geometry, (*own, *foreign)),
        fragmentation_after=fragmentation(state.geometry, (*chosen, *foreign)),
        downtime_ms=downtime_ms,
        owners=_owners(state, wish, chosen),
        shares=_wanted_shares(wish, chosen),
    )


def _owners(state: GpuState, wish: GpuWanted, chosen: tuple[Instance, ...]) -> dict[str, str]:
    """A share without an owner of its own has that of the place it is in."""
    places: list[tuple[Instance | None, str, tuple[Share, ...]]] = [(None, wish.owner, wish.shares)]
    if wish.instances is not None:
        pairs = zip(chosen, wish.instances, strict=True)
        places = [(place, each.owner, each.shares) for place, each in pairs]
    found: dict[str, str] = {}
    for place, owner, shares in places:
        names = share_ids(state.partition_id(place), shares)
        own = [each.owner for each in shares] or [""]
        found |= {name: one or owner for name, one in zip(names, own, strict=True)}
    return {name: owner for name, owner in found.items() if owner}


def _mig_change(state: GpuState, wish: GpuWanted) -> MigChange:
    wants_mig = wish.instances is not None
    if wants_mig == state.mig_enabled:
        return MigChange.NONE
    return MigChange.ENABLE if wants_mig else MigChange.DISABLE


def _partitions(state: GpuState, own: tuple[Instance, ...]) -> dict[str, tuple[Share | None, ...]]:
    """The partitions that are there, each with what it is."""
    places: tuple[Instance | None, ...] = own if state.mig_enabled else (None,)
    return _by_name((state.partition_id(each), state.shares.get(each, ())) for each in places)


def _wanted_partitions(
    state: GpuState, wish: GpuWanted, chosen: tuple[Instance, ...]
) -> dict[str, tuple[Share | None, ...]]:
    if wish.instances is None:
        return _by_name([(state.partition_id(None), wish.shares)])
    pairs = sorted(zip(chosen, wish.instances, strict=True), key=lambda pair: pair[0])
    return _by_name((state.partition_id(place), each.shares) for place, each in pairs)


def _wanted_shares(
    wish: GpuWanted, chosen: tuple[Instance, ...]
) -> dict[Instance | None, tuple[Share, ...]]:
    """The places that are to be shared."""
    if wish.instances is None:
        return {None: wish.shares} if wish.shares else {}
    pairs = zip(chosen, wish.instances, strict=True)
    return {place: each.shares for place, each in pairs if each.shares}


def _by_name(
    places: Iterable[tuple[str, tuple[Share, ...]]],
) -> dict[str, tuple[Share | None, ...]]:
    named: dict[str, tuple[Share | None, ...]] = {}
    for parent, shares in places:
        named |= share_identities(parent, shares)
    return named
