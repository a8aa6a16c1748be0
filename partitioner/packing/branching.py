"""Every packing of some models onto some GPUs, cut off where it cannot win.

It owns that search: model after model joins others in a room, has a new one made, or is left out.
It is pure, and shares with `exact` the judgement of one room and the ways to cut a GPU only. The
invariants: the number of branches is bounded; when the bound was not reached, no packing has a
higher value than what is returned, or than what was to be beaten where nothing is.

A branch ends where it could not win even if every model that still finds a room, each looked at by
itself, were taken in and took no further slot: room that is given away never comes back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from partitioner.packing.filling import Cuts, Groups, Score, score
from partitioner.packing.rooms import Rooms
from partitioner.packing.values import Room

Counts = tuple[int, ...]
"""How many rooms of each kind a GPU has."""


@dataclass(frozen=True)
class Searched:
    """Groups by GPU that score higher, where there are any; `complete` when all was looked at."""

    groups: tuple[Groups, ...] | None
    complete: bool


class _Kinds:
    """The kinds of room that a GPU can have, the smallest first, and which go together."""

    def __init__(self, cuts: Cuts) -> None:
        self.rooms = sorted(
            {room for cut in cuts.sets for room in cut},
            key=lambda room: (room.memory_bytes, -room.slowdown, room.profile),
        )
        counted = [Counter(cut) for cut in cuts.sets]
        self._fullest = [tuple(each[room] for room in self.rooms) for each in counted]
        self._more: dict[Counts, list[tuple[int, Counts]]] = {}

    def more(self, counts: Counts) -> list[tuple[int, Counts]]:
        """What can be made beside these rooms, and the rooms then."""
        if counts not in self._more:
            found = []
            for kind in range(len(counts)):
                then = (*counts[:kind], counts[kind] + 1, *counts[kind + 1 :])
                if any(all(map(int.__le__, then, full)) for full in self._fullest):
                    found.append((kind, then))
            self._more[counts] = found
        return self._more[counts]


@dataclass
class _Open:
    """A room that was made on a GPU, and who is in it."""

    number: int
    room: Room
    group: frozenset[int]


def best_packing(
    rooms: Rooms,
    gpus: Sequence[Cuts],
    models: Sequence[int],
    best: Score,
    branches_max: int,
) -> Searched:
    """The best packing of the models onto the GPUs, if it scores higher than `best`."""
    branch = _Branch(rooms, gpus, models, best, branches_max)
    branch.descend(0, 0.0, 0)
    return Searched(branch.found, branch.branches < branches_max)


class _Branch:
    """The search at one place in it: who is where, and how far down it is."""

    def __init__(
        self,
        rooms: Rooms,
        gpus: Sequence[Cuts],
        models: Sequence[int],
        best: Score,
        branches_max: int,
    ) -> None:
        self._rooms = rooms
        kinds: dict[tuple[tuple[Room, ...], ...], _Kinds] = {}
        self._gpus = [kinds.setdefault(each.sets, _Kinds(each)) for each in gpus]
        # The largest first: they leave the fewest ways, and so end a branch early.
        self._order = sorted(models, key=lambda index: (-rooms.bytes[index], index))
        self._values = [rooms.models[index].value for index in self._order]
        self._open: list[_Open] = []
        self._counts: list[Counts] = [(0,) * len(each.rooms) for each in self._gpus]
        self._best, self._branches_max = best, branches_max
        self.branches = 0
        self.found: tuple[Groups, ...] | None = None

    def descend(self, depth: int, value: float, slots: int) -> None:
        self.branches += 1
        if self.branches >= self._branches_max:
            return
        used = sum(map(any, self._counts))
        reached = score(value, slots, used)
        if reached > self._best:
            self._best = reached
            self.found = self._groups()
        if not self._may_win(depth, value, slots, used):
            return
        index = self._order[depth]
        more = value + self._values[depth]
        for there in self._joinable(index):
            group = there.group
            there.group = group | {index}
            self.descend(depth + 1, more, slots)
            there.group = group
        for number, room, then in list(self._makeable(index)):
            counts = self._counts[number]
            self._counts[number] = then
            self._open.append(_Open(number, room, frozenset((index,))))
            self.descend(depth + 1, more, slots + room.slots)
            self._open.pop()
            self._counts[number] = counts
        self.descend(depth + 1, value, slots)

    def _may_win(self, depth: int, value: float, slots: int, used: int) -> bool:
        """Whether what is worth enough of the models that are yet to come finds a room."""
        hope = value + sum(self._values[depth:])
        if score(hope, slots, used) <= self._best:
            return False
        for index, worth in zip(self._order[depth:], self._values[depth:], strict=True):
            if not self._joinable(index) and next(self._makeable(index), None) is None:
                hope -= worth
                if score(hope, slots, used) <= self._best:
                    return False
        return True

    def _joinable(self, index: int) -> list[_Open]:
        fits = self._rooms.fits
        return [each for each in self._open if fits(each.group | {index}, each.room) is not None]

    def _makeable(self, index: int) -> Iterator[tuple[int, Room, Counts]]:
        alone = frozenset((index,))
        begun: set[int] = set()
        for number, (kinds, counts) in enumerate(zip(self._gpus, self._counts, strict=True)):
            if not any(counts):
                # Of empty GPUs that are alike one is as good as another.
                if id(kinds) in begun:
                    continue
                begun.add(id(kinds))
            for kind, then in kinds.more(counts):
                room = kinds.rooms[kind]
                if self._rooms.fits(alone, room) is not None:
                    yield number, room, then

    def _groups(self) -> tuple[Groups, ...]:
        return tuple(
            tuple((each.room, each.group) for each in self._open if each.number == number)
            for number in range(len(self._gpus))
        )
