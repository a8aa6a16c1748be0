"""Which instances are worth moving so that more of a GPU's free memory is of use.

It owns the weighing of what would be gained against what it takes. It is pure. Each GPU is looked
at by itself: every legal layout with the same profiles, of which the one is taken that gains most
beyond its cost. The gain is memory that was free and of no use and then is of use, at so many
milliseconds for a GiB; the cost is the time that each model which must move is away, by the
planner's own reckoning. The invariant: nothing moves whose cost is as high as what it gains, and
instances that are not ours never.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from partitioner.geometry import Instance, fragmentation, legal_layouts
from partitioner.layout import Costs, GpuState, GpuWanted, Share, Wanted
from partitioner.planner import plan

GIB = 1 << 30
WORTH_MS_PER_GIB = 1000.0
"""A GiB that becomes of use is worth a model's absence of so long, where nobody says otherwise."""


@dataclass(frozen=True)
class Weighed:
    """What one GPU could become: `places` in the order of its own instances, sorted."""

    state: GpuState
    places: tuple[Instance, ...]
    moved: tuple[str, ...]
    before: float
    after: float
    gained_bytes: float
    gain_ms: float
    cost_ms: float

    @property
    def worth_it(self) -> bool:
        """Whether it gains more than it costs."""
        return self.gain_ms > self.cost_ms

    @property
    def then(self) -> GpuState:
        """The GPU's own instances as they would be, each with the shares that it has."""
        own = sorted(set(self.state.instances) - self.state.foreign)
        shares: dict[Instance | None, tuple[Share, ...]] = {
            place: self.state.shares[old]
            for old, place in zip(own, self.places, strict=True)
            if old in self.state.shares
        }
        return replace(self.state, instances=tuple(sorted(self.places)), shares=shares)


def weigh(states: Sequence[GpuState], costs: Costs, worth_ms_per_gib: float) -> tuple[Weighed, ...]:
    """For each GPU that could be less fragmented: the way that gains most beyond its cost."""
    found = []
    for state in sorted(states, key=lambda each: each.index):
        ways = [each for each in _ways(state, costs, worth_ms_per_gib) if each.gained_bytes > 0]
        if ways:
            found.append(max(ways, key=lambda each: (each.gain_ms - each.cost_ms, -each.cost_ms)))
    return tuple(found)


def _ways(state: GpuState, costs: Costs, worth_ms_per_gib: float) -> Iterator[Weighed]:
    own = sorted(set(state.instances) - state.foreign)
    if not own or not state.mig_enabled:
        return
    profiles = Counter(each.profile for each in own)
    before = fragmentation(state.geometry, state.instances)
    for layout in legal_layouts(state.geometry, state.foreign):
        fresh = [each for each in layout if each not in state.foreign]
        if Counter(each.profile for each in fresh) != profiles or set(fresh) == set(own):
            continue
        after = fragmentation(state.geometry, layout)
        gained_bytes = (before - after) * state.memory_bytes
        if gained_bytes <= 0:
            continue
        places = _matched(own, fresh)
        wanted = tuple(
            Wanted((place,), str(place), shares=state.shares.get(old, ()))
            for old, place in zip(own, places, strict=True)
        )
        (planned,) = plan([state], [GpuWanted(state.uuid, wanted)], costs).gpus
        cost_ms = planned.downtime_ms * len(planned.move)
        gain_ms = gained_bytes / GIB * worth_ms_per_gib
        yield Weighed(*(state, places, planned.move, before, after, gained_bytes, gain_ms, cost_ms))


def _matched(own: Sequence[Instance], fresh: Sequence[Instance]) -> tuple[Instance, ...]:
    """A place of its profile for each instance; those that can stay do."""
    free = [each for each in fresh if each not in own]
    places = []
    for each in own:
        if each in fresh:
            places.append(each)
            continue
        place = next(other for other in free if other.profile == each.profile)
        free.remove(place)
        places.append(place)
    return tuple(places)
