"""Which models go where on a node: greedily, then mended, within a bounded number of tries.

It owns the search over the node. It is pure and deterministic: chance comes from a fixed seed. What
counts is, in this order, the value of what is placed, then how few memory slots and GPUs it takes.
Where models and GPUs are few, `branching` looks at all there is, and the answer is the best one.
`exact` grades the packer where that can be computed. The invariant: the number of fillings that are
tried and of branches that are looked at is bounded, so that the time is too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from partitioner.layout import Costs
from partitioner.packing.branching import best_packing
from partitioner.packing.filling import Cuts, Groups, cuts_of, fill, placed, score, slots_used
from partitioner.packing.rooms import Rooms
from partitioner.packing.sharing import Rules
from partitioner.packing.values import Bin, ModelNeed, Packing

FEW_MAX = 40
"""Models times GPUs up to which all packings are looked at: ten models on four GPUs."""
BRANCHES_MAX = 10_000
"""Branches that are looked at in all, where they are: what has more is mended like the rest."""
FILLINGS_MAX = 4000
"""Sets of rooms that are filled in all."""
CUTS_MAX = 6
"""Ways to cut a GPU that are tried each time that it is filled again, drawn anew."""
NOISE = 0.2
"""How far models change places when they are lined up again: the spread of their logarithms."""
SEED = 1

Order = Callable[[int], tuple[float, ...]]


@dataclass(frozen=True)
class _Draft:
    """Groups by number of the GPU."""

    groups: tuple[Groups, ...]
    value: float

    def score(self) -> tuple[float, int, int]:
        """Higher is better."""
        used = [each for each in self.groups if each]
        return score(self.value, sum(map(slots_used, used)), len(used))


def pack(
    models: Sequence[ModelNeed], bins: Sequence[Bin], rules: Rules, costs: Costs | None = None
) -> Packing:
    """Place the most valuable models that fit; those left out are named by index."""
    rooms = Rooms(models, rules)
    search = _Search(rooms, cuts_of(bins))
    draft = search.run()
    filled = tuple(
        placed(rooms, each, groups, costs or Costs())
        for each, groups in zip(bins, draft.groups, strict=True)
        if groups
    )
    there = {index for each in filled for index in each.models}
    left_out = tuple(index for index in range(len(models)) if index not in there)
    ordered = sorted(filled, key=lambda each: each.bin.state.index)
    return Packing(tuple(ordered), left_out, draft.value)


class _Search:
    def __init__(self, rooms: Rooms, gpus: Sequence[Cuts]) -> None:
        self._rooms = rooms
        self._gpus = gpus
        self._left = FILLINGS_MAX
        self._chance = random.Random(SEED)
        known = {room for sets in {each.sets for each in gpus} for cut in sets for room in cut}
        self._everyone = [
            index
            for index in range(len(rooms.models))
            if any(rooms.fits(frozenset((index,)), room) is not None for room in known)
        ]
        """Those that fit somewhere at all."""

    def run(self) -> _Draft:
        empty = _Draft(((),) * len(self._gpus), 0.0)
        numbers = range(len(self._gpus))
        best = empty
        for order in self._orders():
            draft = self._filled(empty, numbers, sorted(self._everyone, key=order))
            best = max(best, draft, key=_Draft.score)
        if len(self._everyone) * len(self._gpus) <= FEW_MAX:
            found = best_packing(
                self._rooms, self._gpus, self._everyone, best.score(), BRANCHES_MAX
            )
            if found.groups is not None:
                best = self._draft(found.groups)
            if found.complete:
                return best
        return self._mend(best)

    def _orders(self) -> tuple[Order, ...]:
        """Ways to line models up: most value for its memory, largest, most valuable, hardest."""
        models, size = self._rooms.models, self._rooms.bytes
        return (
            lambda i: (-models[i].value / size[i], -size[i], i),
            lambda i: (-size[i], -models[i].value, i),
            lambda i: (-models[i].value, -size[i], i),
            lambda i: (-models[i].isolation, -size[i], i),
        )

    def _mend(self, best: _Draft) -> _Draft:
        """Empty a GPU or two and fill them again with what was there and what was left out.

        What is worth as much is gone on from too: from there other ways lead on.
        """
        count = len(self._gpus)
        now = best
        while self._left > 0 and count:
            there = _models(now.groups)
            left_out = [index for index in self._everyone if index not in there]
            if not left_out:
                break
            numbers = self._chance.sample(range(count), min(count, self._chance.choice((1, 2))))
            pool = [*left_out, *sorted(_models(now.groups[number] for number in numbers))]
            order = self._lined_up(pool)
            # One that was left out goes first.
            first = self._chance.choice(left_out)
            order.remove(first)
            draft = self._filled(now, numbers, [first, *order], CUTS_MAX)
            if draft.value >= now.value:
                now = draft
            best = max(best, now, key=_Draft.score)
        return best

    def _lined_up(self, pool: Sequence[int]) -> list[int]:
        """By value and by value for the memory, halfway between the two, and some chance."""
        models, size = self._rooms.models, self._rooms.bytes
        worth = {
            index: models[index].value / size[index] ** 0.5 * self._chance.lognormvariate(0, NOISE)
            for index in pool
        }
        return sorted(pool, key=lambda index: (-worth[index], index))

    def _filled(
        self, draft: _Draft, numbers: Sequence[int], order: Sequence[int], cuts_max: int = 0
    ) -> _Draft:
        """Fill these GPUs one after the other, each in the way that takes in the most value.

        With `cuts_max` so many ways are drawn: a GPU that is filled less well may leave the next
        one what it needs.
        """
        groups = list(draft.groups)
        rest = list(order)
        for number in numbers:
            cuts = self._gpus[number].sets
            if 0 < cuts_max < len(cuts):
                cuts = tuple(self._chance.sample(cuts, cuts_max))
            self._left -= len(cuts)
            filled = (fill(self._rooms, cut, rest) for cut in cuts)
            _, groups[number] = max(
                filled, key=lambda each: (each[0], -slots_used(each[1])), default=(0.0, ())
            )
            here = _models([groups[number]])
            rest = [index for index in rest if index not in here]
        return self._draft(tuple(groups))

    def _draft(self, groups: tuple[Groups, ...]) -> _Draft:
        models = self._rooms.models
        return _Draft(groups, sum(models[index].value for index in sorted(_models(groups))))


def _models(groups: Iterable[Groups]) -> set[int]:
    return {index for each in groups for _, group in each for index in group}
