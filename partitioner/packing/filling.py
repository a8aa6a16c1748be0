"""Filling one GPU: of all ways to cut it, the one that takes in the most value.

It owns the ways a GPU can be cut (as sets of rooms, without places), the greedy filling of such a
set, and the final places of what is used. It is pure. The invariants: instances that are not ours
stay; no instance is made that no model uses; places are chosen by the planner's own search, so that
a packing that is there already changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from partitioner.errors import LayoutDoesNotFitError
from partitioner.geometry import Geometry, Instance, maximal_layouts
from partitioner.layout import Costs, GpuState, GpuWanted, Wanted
from partitioner.packing.rooms import Rooms, instance_rooms, whole_room
from partitioner.packing.values import Arrangement, Bin, Filled, Room
from partitioner.placing import choose

Groups = tuple[tuple[Room, frozenset[int]], ...]

Score = tuple[float, int, int]


@dataclass(frozen=True)
class Cuts:
    """One GPU with the sets of rooms that it can be cut into, the smallest room first."""

    bin: Bin
    sets: tuple[tuple[Room, ...], ...]


def cuts_of(bins: Iterable[Bin]) -> tuple[Cuts, ...]:
    """The best ways to cut each GPU; GPUs that are alike are looked at once."""
    known: dict[tuple[object, ...], tuple[tuple[Room, ...], ...]] = {}
    cuts = []
    for each in bins:
        state = each.state
        alike = (
            *(state.geometry, state.foreign, state.memory_bytes, each.sm_count, each.bytes_per_s),
            *(each.may_be_whole, each.may_be_cut),
        )
        if alike not in known:
            known[alike] = _best_cuts(each)
        cuts.append(Cuts(each, known[alike]))
    return tuple(cuts)


def every_cut(each: Bin) -> set[tuple[Room, ...]]:
    """Each fullest set of rooms once, however many places it has."""
    sets: set[tuple[Room, ...]] = set()
    if each.may_be_whole:
        sets.add((whole_room(each),))
    if each.may_be_cut:
        sets.update(_instance_sets(each))
    return sets


def _best_cuts(each: Bin) -> tuple[tuple[Room, ...], ...]:
    """The sets of rooms that no other one could stand in for, the fewest rooms first."""
    sets = every_cut(each)
    best = [one for one in sets if not any(_dominates(other, one) for other in sets)]
    return tuple(sorted(best, key=lambda rooms: (len(rooms), [room.profile for room in rooms])))


def _dominates(one: Sequence[Room], other: Sequence[Room]) -> bool:
    """Whether `one` has a room at least as good for each of the other's, and something more.

    What it takes for small models in large rooms is given back when they are given their places.
    """
    free = list(one)
    better = len(one) > len(other)
    for room in reversed(other):
        as_good = [each for each in free if _as_good(each, room)]
        if not as_good:
            return False
        taken = min(as_good, key=lambda each: (each.memory_bytes, -each.slowdown))
        free.remove(taken)
        better = better or not _as_good(room, taken)
    return better


def _as_good(one: Room, other: Room) -> bool:
    return one.memory_bytes >= other.memory_bytes and one.slowdown <= other.slowdown


def _instance_sets(each: Bin) -> Iterable[tuple[Room, ...]]:
    state, rooms = each.state, instance_rooms(each)
    geometry = _plain(state)
    for layout in maximal_layouts(geometry, state.foreign):
        own = [rooms[place.profile] for place in layout if place not in state.foreign]
        if own:
            yield tuple(sorted(own, key=lambda room: (room.memory_bytes, -room.slowdown)))


def _plain(state: GpuState) -> Geometry:
    """The plain profiles, and those of instances that are not ours."""
    kept = {each.profile for each in state.foreign}
    geometry = state.geometry
    plain = {each.name for each in geometry.plain} | kept
    return Geometry(tuple(each for each in geometry.profiles if each.name in plain))


def fill(rooms: Rooms, cut: Sequence[Room], order: Sequence[int]) -> tuple[float, Groups]:
    """Take in models in this order, each into the smallest room that it fits; value and groups."""
    groups: list[frozenset[int]] = [frozenset()] * len(cut)
    reserve_bytes = rooms.rules.worker_bytes
    free = [room.memory_bytes - reserve_bytes for room in cut]
    apart = [rooms.apart(room) for room in cut]
    there = [1 << len(rooms.models)] * len(cut)
    value = 0.0
    for index in order:
        need_bytes = rooms.bytes[index]
        for number, room in enumerate(cut):
            if need_bytes > free[number] or apart[number][index] & there[number]:
                continue
            group = groups[number] | {index}
            if rooms.fits(group, room) is None:
                continue
            groups[number] = group
            there[number] |= 1 << index
            free[number] -= need_bytes
            value += rooms.models[index].value
            break
    used = tuple((room, group) for room, group in zip(cut, groups, strict=True) if group)
    return value, used


def score(value: float, slots: int, gpus: int) -> Score:
    """Higher is better: value, to where its rounding tells, then fewer slots, then fewer GPUs."""
    return (round(value, 9), -slots, -gpus)


def slots_used(groups: Groups) -> int:
    """Memory slots that the rooms of a filling take."""
    return sum(room.slots for room, _ in groups)


def placed(rooms: Rooms, each: Bin, groups: Groups, costs: Costs) -> Filled:
    """Give each group the place that changes, takes and fragments least, and its arrangement."""
    if any(not room.profile for room, _ in groups):
        ((room, group),) = groups
        return Filled(each, ((None, _must_fit(rooms, group, room)),))
    by_name = instance_rooms(each)
    wishes: list[Wanted] = []
    for room, group in groups:
        # As large a part of the GPU as was found or smaller: a larger one is somebody else's.
        allowed = [
            other
            for other in by_name.values()
            if other.slots <= room.slots and rooms.fits(group, other) is not None
        ]
        least = min(other.slots for other in allowed)
        names = {other.profile for other in allowed if other.slots == least}
        profiles = [each.state.geometry.by_name[name] for name in sorted(names)]
        smallest = min(profile.compute_slices for profile in profiles)
        options = tuple(
            place
            for profile in profiles
            if profile.compute_slices == smallest
            for place in profile.placements
        )
        wishes.append(Wanted(options, room.profile))
    chosen = _choose(each.state, tuple(wishes), groups, costs)
    there = dict(zip(chosen, groups, strict=True))
    return Filled(
        each,
        tuple(
            (place, _must_fit(rooms, there[place][1], by_name[place.profile]))
            for place in sorted(there)
        ),
    )


def _choose(
    state: GpuState, wishes: tuple[Wanted, ...], groups: Groups, costs: Costs
) -> tuple[Instance, ...]:
    """Places for shrunken rooms; the rooms as they were found always have some."""
    try:
        return choose(state, GpuWanted(state.uuid, wishes), costs)
    except LayoutDoesNotFitError:
        by_name = state.geometry.by_name
        found = tuple(Wanted(by_name[r.profile].placements, r.profile) for r, _ in groups)
        return choose(state, GpuWanted(state.uuid, found), costs)


def _must_fit(rooms: Rooms, group: frozenset[int], room: Room) -> Arrangement:
    found = rooms.fits(group, room)
    assert found is not None
    return found
