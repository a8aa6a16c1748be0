"""One model after another: where an arrival goes, on a node that serves others already.

It owns the choice for a single arrival, and first fit to compare it with. It is pure. The choice
joins others where that takes no memory slot; else it takes the fewest slots that do, where the
fragmentation of the GPU grows least; else, if it may, it takes the place of at most `MOVES_MAX`
instances that find another one. The invariant: nobody who is there is refused what it was promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from partitioner.geometry import Geometry, Instance, Profile, fragmentation
from partitioner.packing.rooms import Rooms, instance_rooms, whole_room
from partitioner.packing.values import Bin, Room

MOVES_MAX = 3

Group = frozenset[int]


@dataclass(frozen=True)
class Standing:
    """One GPU as it is used: groups by instance, or by None for the whole GPU."""

    bin: Bin
    groups: tuple[tuple[Instance | None, Group], ...] = ()

    @property
    def instances(self) -> tuple[Instance, ...]:
        """What is on the board, instances that are not ours included."""
        own = (place for place, _ in self.groups if place is not None)
        return tuple(sorted((*own, *self.bin.state.foreign)))

    @property
    def whole(self) -> bool:
        """Whether somebody has the GPU uncut."""
        return any(place is None for place, _ in self.groups)

    def without(self, index: int) -> Standing:
        """After a model has left, and with it its instance when it was the last."""
        kept = ((place, group - {index}) for place, group in self.groups)
        return replace(self, groups=tuple(each for each in kept if each[1]))


Node = tuple[Standing, ...]


@dataclass(frozen=True)
class Way:
    """A way to take a group in on one GPU: that GPU then, and what it takes."""

    number: int
    then: Standing
    slots: int
    growth: float
    slices: int

    @property
    def cost(self) -> tuple[int, float, int, int]:
        """Lower is better."""
        return (self.slots, self.growth, self.slices, self.number)


@dataclass(frozen=True)
class Admission:
    """The node with the arrival, and how many instances had to move for it."""

    node: Node
    moved: int = 0


Choice = Callable[["Arrivals", Node, int], Admission | None]


class Arrivals:
    """Places groups of the models of `rooms`."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        self._fragments: dict[tuple[Geometry, tuple[Instance, ...]], float] = {}
        self._rooms_of: dict[int, dict[str, Room]] = {}

    def ways(self, node: Node, number: int, group: Group) -> Iterator[Way]:
        """Every way to take a group in on one GPU without moving anybody; joining others first."""
        here = node[number]
        for position, (place, there) in enumerate(here.groups):
            if self.rooms.fits(there | group, self._room(number, here, place)) is not None:
                groups = list(here.groups)
                groups[position] = (place, there | group)
                yield Way(number, replace(here, groups=tuple(groups)), 0, 0.0, 0)
        if here.whole:
            return
        for place, slices, growth in self._new(number, here, group):
            then = replace(here, groups=(*here.groups, (place, group)))
            yield Way(number, then, place.size, growth, slices)
        whole = whole_room(here.bin)
        if not here.groups and here.bin.may_be_whole and self.rooms.fits(group, whole):
            yield Way(number, replace(here, groups=((None, group),)), whole.slots, 0.0, 0)

    def best(self, node: Node, group: Group) -> Way | None:
        """The cheapest of all ways on all GPUs."""
        ways = (way for number in range(len(node)) for way in self.ways(node, number, group))
        return min(ways, key=lambda way: way.cost, default=None)

    def displacing(self, node: Node, group: Group) -> Iterator[tuple[int, float, Node]]:
        """Ways that put the group in the place of others, which go where they cost least.

        Tells how many instances move, and by how much the fragmentation grows in all.
        """
        for number, here in enumerate(node):
            if here.whole or not here.bin.may_be_cut:
                continue
            for profile in self._fitting(number, here, group):
                for place in profile.placements:
                    found = self._displace(node, number, place, group)
                    if found is not None:
                        yield found

    def _displace(
        self, node: Node, number: int, place: Instance, group: Group
    ) -> tuple[int, float, Node] | None:
        here = node[number]
        leaving = [
            each for each in here.groups if each[0] is not None and each[0].mask & place.mask
        ]
        if not 0 < len(leaving) <= MOVES_MAX:
            return None
        kept = tuple(each for each in here.groups if each not in leaving)
        emptied = replace(here, groups=kept)
        if not here.bin.state.geometry.fits(emptied.instances, place):
            return None
        then = _with(node, number, replace(here, groups=(*kept, (place, group))))
        growth = 0.0
        for old, moving in sorted(leaving, key=lambda each: -(each[0].size if each[0] else 0)):
            assert old is not None
            way = self.best(then, moving)
            if way is None:
                return None
            growth += way.growth
            then = _with(then, way.number, way.then)
        return len(leaving), growth, then

    def _new(
        self, number: int, here: Standing, group: Group
    ) -> Iterator[tuple[Instance, int, float]]:
        if not here.bin.may_be_cut:
            return
        geometry, stands = here.bin.state.geometry, here.instances
        before: float | None = None
        for profile in self._fitting(number, here, group):
            for place in profile.placements:
                if not geometry.fits(stands, place):
                    continue
                if before is None:
                    before = self.fragmentation(geometry, stands)
                growth = self.fragmentation(geometry, (*stands, place)) - before
                yield place, profile.compute_slices, growth

    def _fitting(self, number: int, here: Standing, group: Group) -> list[Profile]:
        """The profiles that have room for a group, the smallest first."""
        plain = here.bin.state.geometry.plain
        return [
            each
            for each in sorted(plain, key=lambda each: (each.slots, each.compute_slices))
            if self.rooms.fits(group, self._room(number, here, each.placements[0])) is not None
        ]

    def _room(self, number: int, here: Standing, place: Instance | None) -> Room:
        if place is None:
            return whole_room(here.bin)
        if number not in self._rooms_of:
            self._rooms_of[number] = instance_rooms(here.bin)
        return self._rooms_of[number][place.profile]

    def fragmentation(self, geometry: Geometry, layout: Sequence[Instance]) -> float:
        """That of the board, kept."""
        key = (geometry, tuple(sorted(layout)))
        if key not in self._fragments:
            self._fragments[key] = fragmentation(geometry, layout)
        return self._fragments[key]


def least_fragmenting(arrivals: Arrivals, node: Node, index: int) -> Admission | None:
    """The choice of the module's text, without moving anybody."""
    way = arrivals.best(node, frozenset((index,)))
    return Admission(_with(node, way.number, way.then)) if way is not None else None


def least_fragmenting_or_moving(arrivals: Arrivals, node: Node, index: int) -> Admission | None:
    """The choice of the module's text."""
    found = least_fragmenting(arrivals, node, index)
    if found is not None:
        return found
    ways = arrivals.displacing(node, frozenset((index,)))
    best = min(ways, key=lambda way: way[:2], default=None)
    return Admission(best[2], best[0]) if best is not None else None


def first_fit(arrivals: Arrivals, node: Node, index: int) -> Admission | None:
    """The first GPU with room, there the first room, else the smallest profile's first start."""
    for number in range(len(node)):
        for way in arrivals.ways(node, number, frozenset((index,))):
            return Admission(_with(node, number, way.then))
    return None


def _with(node: Node, number: int, then: Standing) -> Node:
    return (*node[:number], then, *node[number + 1 :])
