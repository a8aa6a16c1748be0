"""Which models go where on a node: greedily, then mended, within a bounded number of tries.

It owns the search over the node. It is pure and deterministic: chance comes from a fixed seed. What
counts is, in this order, the value of what is placed, then how few memory slots and GPUs it takes.
`exact` grades it where that can be computed. The invariant: the number of fillings that are tried
is bounded, so that the time is too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from partitioner.layout import Costs
from partitioner.packing.filling import Cuts, Groups, cuts_of, fill, placed, slots_used
from partitioner.packing.rooms import Rooms
from partitioner.packing.sharing import Rules
from partitioner.packing.values import Bin, ModelNeed, Packing

FILLINGS_MAX = 4000
"""Sets of rooms that are filled in all."""
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
        return (self.value, -sum(map(slots_used, used)), -len(used))


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

    def run(self) -> _Draft:
        everyone = range(len(self._rooms.models))
        numbers = range(len(self._gpus))
        best = _Draft(((),) * len(self._gpus), 0.0)
        for order in self._orders():
            ordered = sorted(everyone, key=order)
            draft = self._refill(best, numbers, ordered, empty=True)
            if draft.score() > best.score():
                best = draft
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
        """Empty some GPUs and fill them again with what was there and what was left out."""
        count = len(self._gpus)
        everyone = set(range(len(self._rooms.models)))
        while self._left > 0 and count:
            left_out = sorted(everyone - _models(best.groups))
            if not left_out:
                break
            numbers = self._chance.sample(range(count), min(count, self._chance.choice((1, 2, 2))))
            pool = [*left_out, *_models([best.groups[number] for number in numbers])]
            order = self._chance.choice(self._orders())
            pool.sort(key=order)
            # One that was left out goes first; and some others change places with a neighbour.
            first = self._chance.choice(left_out)
            pool.remove(first)
            for place in range(len(pool) - 1):
                if self._chance.random() < 0.2:
                    pool[place], pool[place + 1] = pool[place + 1], pool[place]
            draft = self._refill(best, numbers, [first, *pool])
            if draft.score() > best.score():
                best = draft
        return best

    def _refill(
        self, draft: _Draft, numbers: Sequence[int], order: Sequence[int], *, empty: bool = False
    ) -> _Draft:
        """Fill these GPUs one after the other, each in the way that takes in the most value."""
        groups: list[Groups] = [()] * len(self._gpus) if empty else list(draft.groups)
        rest = list(order)
        for number in numbers:
            best: tuple[float, int, Groups] = (0.0, 0, ())
            for cut in self._gpus[number].sets:
                self._left -= 1
                value, used = fill(self._rooms, cut, rest)
                found = (value, -slots_used(used), used)
                if found[:2] > best[:2]:
                    best = found
            groups[number] = best[2]
            here = _models([best[2]])
            rest = [index for index in rest if index not in here]
        models = self._rooms.models
        value = sum(models[index].value for index in _models(groups))
        return _Draft(tuple(groups), value)


def _models(groups: Sequence[Groups]) -> set[int]:
    return {index for each in groups for _, group in each for index in group}
