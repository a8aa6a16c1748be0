"""One model after another: where an arrival goes, on a node that serves others already.

It owns the choice for a single arrival, and first fit to compare it with. It is pure. The choice
joins others where that takes no memory slot: those of its own tenant first, then where it leaves
the least memory over. Else it has a room made: one that others may join as large as there is, since
what many share has no remainders; one behind a wall in hardware of the fewest slots that do; both
where the fragmentation of the GPU grows least. Else, if it may, it takes the place of at most
`MOVES_MAX` instances that find another one. The invariant: nobody who is there is refused what it
was promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from partitioner.geometry import Geometry, Instance, Profile, fragmentation
from partitioner.packing.rooms import Rooms, instance_rooms, whole_room
from partitioner.packing.values import Bin, Isolation, Room

MOVES_MAX = 3

WAYS_KEPT_MAX = 100_000

Group = frozenset[int]
Groups = tuple[tuple[Instance | None, Group], ...]


@dataclass(frozen=True)
class Standing:
    """One GPU as it is used: groups by instance, or by None for the whole GPU."""

    bin: Bin
    groups: Groups = ()

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


Cost = tuple[float, ...]
"""Lower is better."""


@dataclass(frozen=True)
class Way:
    """A way to take a group in on one GPU: that GPU then, and what it takes."""

    number: int
    then: Standing
    growth: float
    cost: Cost


@dataclass(frozen=True)
class Admission:
    """The node with the arrival, and how many instances had to move for it."""

    node: Node
    moved: int = 0


Choice = Callable[["Arrivals", Node, int], Admission | None]


class Arrivals:
    """Places groups of the models of `rooms`, always on the same GPUs."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        self._fragments: dict[tuple[Geometry, tuple[Instance, ...]], float] = {}
        self._rooms_of: dict[int, dict[str, Room]] = {}
        self._ways: dict[tuple[int, Groups, Group], Way | None] = {}

    def ways(self, node: Node, number: int, group: Group) -> Iterator[Way]:
        """Every way to take a group in on one GPU without moving anybody; joining others first."""
        here = node[number]
        for position, (place, there) in enumerate(here.groups):
            room = self._room(number, here, place)
            found = self.rooms.fits(there | group, room)
            if found is not None:
                groups = list(here.groups)
                groups[position] = (place, there | group)
                left_bytes = room.memory_bytes - found.used_bytes
                cost = (0, not self._at_home(group, there), left_bytes, number)
                yield Way(number, replace(here, groups=tuple(groups)), 0.0, cost)
        if here.whole:
            return
        sign = -1 if self._open_to_others(group) else 1
        for place, slices, growth in self._new(number, here, group):
            then = replace(here, groups=(*here.groups, (place, group)))
            yield Way(number, then, growth, (1, sign * place.size, growth, slices, number))
        whole = whole_room(here.bin)
        if not here.groups and here.bin.may_be_whole and self.rooms.fits(group, whole):
            then = replace(here, groups=((None, group),))
            yield Way(number, then, 0.0, (1, sign * whole.slots, 0.0, 0, number))

    def _at_home(self, group: Group, there: Group) -> bool:
        """Whether a model of the same tenant is there, whose worker may serve both."""
        models = self.rooms.models
        return not {models[i].tenant for i in group}.isdisjoint(models[i].tenant for i in there)

    def _open_to_others(self, group: Group) -> bool:
        """Whether models of other tenants may come into the group's room."""
        walls = (self.rooms.models[index].isolation for index in group)
        return self.rooms.rules.shares and Isolation.HARDWARE not in walls

    def best(self, node: Node, group: Group) -> Way | None:
        """The cheapest of all ways on all GPUs."""
        found = (self._best_on(node, number, group) for number in range(len(node)))
        return min((way for way in found if way is not None), key=_cost, default=None)

    def _best_on(self, node: Node, number: int, group: Group) -> Way | None:
        """The cheapest on one GPU; kept, since most GPUs are as they were when last asked."""
        key = (number, node[number].groups, group)
        if key not in self._ways:
            if len(self._ways) >= WAYS_KEPT_MAX:
                self._ways.clear()
            self._ways[key] = min(self.ways(node, number, group), key=_cost, default=None)
        return self._ways[key]

    def displacing(self, node: Node, group: Group) -> tuple[int, Node] | None:
        """The group in the place of others, which go where they cost least.

        Of all ways that move the fewest, the one that fragments least; tells how many move.
        """
        ways: list[tuple[int, int, Instance]] = []
        for number, here in enumerate(node):
            if here.whole or not here.bin.may_be_cut:
                continue
            for profile in self._fitting(number, here, group):
                ways += [(len(_under(here, e)), number, e) for e in profile.placements]
        for count in range(1, MOVES_MAX + 1):
            tried = (
                self._displace(node, number, place, group)
                for leaving, number, place in ways
                if leaving == count
            )
            best = min((each for each in tried if each is not None), key=_growth, default=None)
            if best is not None:
                return count, best[1]
        return None

    def _displace(
        self, node: Node, number: int, place: Instance, group: Group
    ) -> tuple[float, Node] | None:
        here = node[number]
        leaving = _under(here, place)
        kept = tuple(each for each in here.groups if each not in leaving)
        emptied = replace(here, groups=kept)
        if not here.bin.state.geometry.fits(emptied.instances, place):
            return None
        then = _with(node, number, replace(here, groups=(*kept, (place, group))))
        growth = self.fragmentation(here.bin.state.geometry, then[number].instances)
        growth -= self.fragmentation(here.bin.state.geometry, here.instances)
        for _, moving in sorted(leaving, key=lambda each: -each[0].size):
            way = self.best(then, moving)
            if way is None:
                return None
            growth += way.growth
            then = _with(then, way.number, way.then)
        return growth, then

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
    moved = arrivals.displacing(node, frozenset((index,)))
    return Admission(moved[1], moved[0]) if moved is not None else None


def first_fit(arrivals: Arrivals, node: Node, index: int) -> Admission | None:
    """The first GPU with room, there the first room, else the smallest profile's first start."""
    for number in range(len(node)):
        for way in arrivals.ways(node, number, frozenset((index,))):
            return Admission(_with(node, number, way.then))
    return None


def _with(node: Node, number: int, then: Standing) -> Node:
    return (*node[:number], then, *node[number + 1 :])


def _under(here: Standing, place: Instance) -> list[tuple[Instance, Group]]:
    """The instances with their groups that stand where another is wanted."""
    return [(old, group) for old, group in here.groups if old is not None and old.mask & place.mask]


def _cost(way: Way) -> Cost:
    return way.cost


def _growth(way: tuple[float, Node]) -> float:
    return way[0]
