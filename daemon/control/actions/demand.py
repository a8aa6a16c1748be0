"""Which model comes up where, in place of whom: the judgement behind swaps on demand.

A pure function of what requests wait for and of what is where; `demand_loop` gathers these and
carries the decision out. The invariants: a model is not taken off sooner than `min_residency_s`
after it became ACTIVE, and each partition gets at most one decision at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wanted:
    """A model that requests wait for. `partition`: it must come there, where its requests are."""

    model: str
    requests: int
    oldest_s: float
    pages: Mapping[str, int]
    """Pages it takes, by partition: page sizes may differ."""
    partition: str = ""


@dataclass(frozen=True)
class Occupant:
    """A model on a partition: its pages, how long it has been ACTIVE, how many requests it has."""

    model: str
    pages: int
    active_for_s: float
    requests: int


@dataclass(frozen=True)
class Room:
    """A partition, as far as the decision goes. `busy` while an operation changes it."""

    partition: str
    pages_total: int
    occupants: tuple[Occupant, ...]
    busy: bool


@dataclass(frozen=True)
class Bring:
    """Put a model on a partition, in place of `victims`."""

    model: str
    partition: str
    victims: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """What to do now, and when to look again at the latest (None: when something changes)."""

    brings: tuple[Bring, ...]
    look_again_s: float | None


def decide(
    wanted: Iterable[Wanted],
    rooms: Iterable[Room],
    max_active_models: int,
    min_residency_s: float,
) -> Decision:
    """Choose a partition and victims for each wanted model, who waited longest first.

    Beside the others where it fits; else in place of those with the fewest requests and the longest
    time on the partition. Every partition gets at most one decision.
    """
    free = {room.partition: room for room in rooms if not room.busy}
    sizes = {room.partition: room.pages_total for room in free.values()}
    brings: list[Bring] = []
    again: list[float] = []
    for want in sorted(wanted, key=lambda each: (-each.oldest_s, each.model)):
        options: list[Bring] = []
        candidates = [
            room
            for room in free.values()
            if want.partition in ("", room.partition) and room.partition in want.pages
        ]
        for room in candidates:
            victims = _victims(room, want, max_active_models, min_residency_s)
            if isinstance(victims, float):
                again.append(victims)
            elif victims is not None:
                options.append(Bring(want.model, room.partition, victims))
        if (
            not options
            and candidates
            and all(want.pages[room.partition] > room.pages_total for room in candidates)
        ):
            # Nothing will ever make room: let the plan say so, with its figures.
            largest = max(candidates, key=lambda room: room.pages_total)
            options.append(Bring(want.model, largest.partition, ()))
        if options:
            best = min(
                options,
                key=lambda each: (len(each.victims), -sizes[each.partition], each.partition),
            )
            brings.append(best)
            del free[best.partition]
    return Decision(tuple(brings), min(again, default=None))


def _victims(
    room: Room, want: Wanted, max_active_models: int, min_residency_s: float
) -> tuple[str, ...] | float | None:
    """Who must leave; or in how many seconds somebody may; or None when it would never fit."""
    needed = want.pages[room.partition]
    if needed > room.pages_total:
        return None
    staying = list(room.occupants)
    leaving: list[str] = []
    ordered = sorted(staying, key=lambda each: (each.requests, -each.active_for_s, each.model))
    wait_s = 0.0
    while True:
        pages_free = room.pages_total - sum(each.pages for each in staying)
        crowded = bool(max_active_models) and len(staying) >= max_active_models
        if pages_free >= needed and not crowded:
            return tuple(leaving)
        old = [each for each in ordered if each.active_for_s >= min_residency_s]
        if not old:
            wait_s = min(min_residency_s - each.active_for_s for each in ordered)
            return max(wait_s, 0.0)
        ordered.remove(old[0])
        staying.remove(old[0])
        leaving.append(old[0].model)
