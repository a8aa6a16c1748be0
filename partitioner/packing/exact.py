"""The best packing there is, by looking at every one: what the packer is graded against.

It owns an exhaustive search that shares with the packer the judgement of one room only. It is pure.
It takes time that triples with each model, so that it refuses more than `MODELS_MAX`. The
invariant: no packing has a higher value than what it returns.

For each GPU it finds every set of models that the GPU can host: room by room, along every fullest
way to cut it, each set so far joined with every group of further models that fits the next room.
Then the sets of the GPUs are combined, again all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from partitioner.packing.filling import every_cut
from partitioner.packing.rooms import Rooms
from partitioner.packing.sharing import Rules
from partitioner.packing.values import Bin, ModelNeed, Room

MODELS_MAX = 10


def best_value(models: Sequence[ModelNeed], bins: Sequence[Bin], rules: Rules) -> float:
    """The most value that any packing places. Sets of models are numbers, a bit for each."""
    if len(models) > MODELS_MAX:
        raise ValueError(
            f"{len(models)} models: every packing of at most {MODELS_MAX} is looked at"
        )
    rooms = Rooms(models, rules)
    everyone = 1 << len(models)
    worth = [sum(m.value for i, m in enumerate(models) if s >> i & 1) for s in range(everyone)]
    best = [0.0] * everyone
    known: dict[frozenset[tuple[Room, ...]], set[int]] = {}
    for each in bins:
        sets = frozenset(every_cut(each))
        if sets not in known:
            known[sets] = _hosted(rooms, sets)
        hosted = sorted(known[sets])
        best = [
            max(worth[one] + best[chosen & ~one] for one in hosted if one & ~chosen == 0)
            for chosen in range(everyone)
        ]
    return best[-1]


def _hosted(rooms: Rooms, sets: Iterable[tuple[Room, ...]]) -> set[int]:
    """Every set of models that one GPU can host."""
    groups: dict[Room, list[int]] = {}
    for room in {room for cut in sets for room in cut}:
        groups[room] = [
            number
            for number in range(1, 1 << len(rooms.models))
            if rooms.fits(_members(number), room) is not None
        ]
    begun: dict[tuple[Room, ...], set[int]] = {(): {0}}

    def reached(cut: tuple[Room, ...]) -> set[int]:
        """The sets that the first rooms can host together."""
        if cut not in begun:
            before = reached(cut[:-1])
            begun[cut] = before | {
                one | more for more in groups[cut[-1]] for one in before if not one & more
            }
        return begun[cut]

    return set().union(*(reached(cut) for cut in sets)) | {0}


def _members(number: int) -> frozenset[int]:
    return frozenset(index for index in range(number.bit_length()) if number >> index & 1)
