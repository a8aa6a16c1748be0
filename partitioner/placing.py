"""Where the wanted instances of one GPU go, chosen exactly.

It owns the search over placements and the layout that is named when nothing fits. It is pure. The
invariants: what is chosen is legal beside the foreign instances, and the number of destroyed
instances is the least there can be. Among choices that destroy as few, the one is taken that
interrupts models for the shortest time, then that changes the shares of the fewest kept instances,
then that takes the fewest slots, then that leaves the board least fragmented, then the first in the
order of placements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from partitioner.errors import LayoutDoesNotFitError
from partitioner.geometry import Geometry, Instance, fragmentation, legal_layouts
from partitioner.layout import Costs, GpuState, GpuWanted, Wanted


def choose(state: GpuState, wish: GpuWanted, costs: Costs) -> tuple[Instance, ...]:
    """Return a placement for each wanted instance, in their order; exact, see the module's text."""
    search = _Search(state, wish.instances or (), costs)
    found = search.run()
    if found is None:
        raise LayoutDoesNotFitError(wish.line, _does_not_fit(state, wish.instances or ()))
    return found


Score = tuple[int, float, int, int, float, tuple[Instance, ...]]


class _Search:
    """Depth-first search over placements, with an upper bound on what can still be kept."""

    def __init__(self, state: GpuState, wanted: Sequence[Wanted], costs: Costs) -> None:
        self._geometry = state.geometry
        self._fixed = tuple(sorted(state.foreign))
        own = frozenset(state.instances) - state.foreign
        self._own = own
        self._shares = state.shares
        self._cost_ms = {
            each: sum(costs.move_ms.get(name, 0.0) for name in state.partition_ids(each))
            for each in own
        }
        self._all_ms = sum(self._cost_ms.values())
        # Shares tell wishes apart only where an instance that has some could be kept.
        shapes = [_shape(each, bool(state.shares)) for each in wanted]
        # Alike wishes stand together, so that their permutations are searched once.
        order = sorted(
            range(len(wanted)),
            key=lambda i: (len(wanted[i].options), shapes[i], i),
        )
        self._order = order
        self._wanted = [wanted[index] for index in order]
        self._shapes = [shapes[index] for index in order]
        self._options = [
            sorted(set(each.options), key=lambda place: (place not in own, place))
            for each in self._wanted
        ]
        self._can_keep = [any(each in own for each in options) for options in self._options]
        self._best: tuple[Score, tuple[Instance, ...]] | None = None
        self._fragments: dict[tuple[Instance, ...], float] = {}

    def run(self) -> tuple[Instance, ...] | None:
        if len(self._wanted) > self._geometry.compute_slices:
            return None
        taken = 0
        counts = Counter(each.profile for each in self._fixed)
        slices = self._geometry.compute_slices
        for each in self._fixed:
            taken |= each.mask
            slices -= self._geometry.by_name[each.profile].compute_slices
        self._descend((), taken, slices, counts, 0)
        if self._best is None:
            return None
        placed = [place for _, place in sorted(zip(self._order, self._best[1], strict=True))]
        return tuple(placed)

    def _descend(
        self,
        chosen: tuple[Instance, ...],
        taken: int,
        slices: int,
        counts: Counter[str],
        kept: int,
    ) -> None:
        depth = len(chosen)
        if self._best is not None and kept + sum(self._can_keep[depth:]) < -self._best[0][0]:
            return
        if depth == len(self._wanted):
            self._judge(chosen, kept)
            return
        options = self._options[depth]
        first = 0
        if depth and self._shapes[depth] == self._shapes[depth - 1]:
            first = options.index(chosen[-1]) + 1
        for place in options[first:]:
            profile = self._geometry.by_name[place.profile]
            if (
                place.mask & taken
                or profile.compute_slices > slices
                or counts[place.profile] >= profile.max_instances
            ):
                continue
            counts[place.profile] += 1
            self._descend(
                (*chosen, place),
                taken | place.mask,
                slices - profile.compute_slices,
                counts,
                kept + (place in self._own),
            )
            counts[place.profile] -= 1

    def _judge(self, chosen: tuple[Instance, ...], kept: int) -> None:
        """Take the choice if it is better; fragmentation is computed only where it decides."""
        lost_ms = self._all_ms - sum(self._cost_ms.get(place, 0.0) for place in chosen)
        reshared = sum(
            place in self._own and self._shares.get(place, ()) != each.shares
            for place, each in zip(chosen, self._wanted, strict=True)
        )
        first = (-kept, lost_ms, reshared, sum(place.size for place in chosen))
        if self._best is not None and first > self._best[0][:4]:
            return
        layout = tuple(sorted((*chosen, *self._fixed)))
        if layout not in self._fragments:
            self._fragments[layout] = fragmentation(self._geometry, layout)
        score = (*first, self._fragments[layout], chosen)
        if self._best is None or score < self._best[0]:
            self._best = (score, chosen)


def _shape(wanted: Wanted, with_shares: bool) -> tuple[object, ...]:
    """Equal for wishes that may change places."""
    if not with_shares:
        return (tuple(sorted(wanted.options)), [])
    limits = [
        (each.memory_bytes or 0, each.thread_percent or 0, each.owner) for each in wanted.shares
    ]
    return (tuple(sorted(wanted.options)), limits)


def _does_not_fit(state: GpuState, wanted: Sequence[Wanted]) -> str:
    asked = ", ".join(each.what for each in wanted)
    nearest = nearest_fit(state.geometry, wanted, state.foreign)
    beside = ", ".join(str(each) for each in sorted(state.foreign))
    places = ", ".join(str(each) for each in nearest) or "no instance at all"
    return (
        f"{asked} do not fit together on gpu{state.index} ({state.product})"
        f"{f' beside {beside}, which are not ours' if beside else ''}; the nearest layout that "
        f"would fit is: {places}"
    )


def nearest_fit(
    geometry: Geometry, wanted: Sequence[Wanted], foreign: Iterable[Instance] = ()
) -> tuple[Instance, ...]:
    """Return the layout that serves the most wishes, and with them the most memory.

    What cannot be served is replaced by the largest smaller profiles that still find room, never by
    more instances than were asked for.
    """
    fixed = frozenset(foreign)
    options = [frozenset(each.options) for each in wanted]
    best: tuple[int, int, tuple[Instance, ...]] | None = None
    for layout in legal_layouts(geometry, fixed):
        own = tuple(each for each in layout if each not in fixed)
        if len(own) > len(wanted) or (best is not None and len(own) < -best[0]):
            continue
        memory_bytes = sum(geometry.by_name[each.profile].memory_bytes for each in own)
        score = (-_served(options, own), -memory_bytes, own)
        if best is None or score < best:
            best = score
    return best[2] if best is not None else ()


def _served(options: Sequence[frozenset[Instance]], layout: tuple[Instance, ...]) -> int:
    """How many wishes a layout serves: a maximum matching, found by augmenting paths."""
    served: dict[int, Instance] = {}

    def use(place: Instance, tried: set[int]) -> bool:
        for index, possible in enumerate(options):
            if place in possible and index not in tried:
                tried.add(index)
                if index not in served or use(served[index], tried):
                    served[index] = place
                    return True
        return False

    return sum(use(place, set()) for place in layout)
