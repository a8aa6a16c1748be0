"""Why a model was left out, and the nearest change that would give it a place.

It owns the explanations. It decides no placement. The invariant: every remedy was tried: with that
one change, and all else as it was packed, the room that it speaks of takes the model in.

The nearest change is the smallest in proportion to the figure that changes. A weaker wall counts as
half of the figure, since it costs no memory and yet somebody wanted it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from partitioner.geometry import Instance
from partitioner.layout_file import format_size
from partitioner.packing.rooms import Rooms, instance_rooms, relaxed, whole_room
from partitioner.packing.sharing import Rules
from partitioner.packing.values import (
    Arrangement,
    Bin,
    Filled,
    Isolation,
    LeftOut,
    ModelNeed,
    Packing,
    Refusal,
    Room,
)

MIB = 1 << 20
WEAKER_WALL = 0.5
TRIES_MAX = 4
"""Figures that one remedy changes at most: less memory may still be too slow, and so on."""


@dataclass(frozen=True)
class _Place:
    """A room that a model could have: with others in it, or yet to be made."""

    name: str
    room: Room
    group: frozenset[int]


@dataclass(frozen=True)
class _Remedy:
    size: float
    where: str
    words: str


def explain(
    models: Sequence[ModelNeed], bins: Sequence[Bin], rules: Rules, packing: Packing
) -> tuple[LeftOut, ...]:
    """One explanation for each model that was left out."""
    rooms = Rooms(models, rules)
    places = list(_places(bins, packing.filled))
    everything = [_Place(f"gpu{e.state.index}", r, frozenset()) for e in bins for r in _rooms(e)]
    return tuple(_explain(rooms, index, places, everything) for index in packing.left_out)


def _explain(
    rooms: Rooms, index: int, places: Sequence[_Place], everything: Sequence[_Place]
) -> LeftOut:
    alone = frozenset((index,))
    refused = [rooms.judge(alone, each.room) for each in everything]
    fits = any(isinstance(each, Arrangement) for each in refused)
    if fits:
        reason = "fits on this node, but not beside the models that were worth more or came first"
    else:
        reason = _reason(rooms, _nearest([each for each in refused if isinstance(each, Refusal)]))
    unknown = any(isinstance(each, Refusal) and each.kind == "unknown" for each in refused)
    tried = [_remedy(rooms, index, place) for place in places]
    found = [each for each in tried if each is not None]
    best = min(found, key=_nearness, default=None)
    if unknown:
        remedy = "measure its time per token with a GPU to itself, and write it as alone_ms"
    elif best is not None:
        remedy = f"{best.words}: then it fits on {best.where}"
    elif fits:
        remedy = _instead(rooms, index, places)
    else:
        remedy = "smaller weights or a larger GPU: no other figure of it is enough"
    return LeftOut(index, reason, remedy)


def _nearness(remedy: _Remedy) -> tuple[float, bool, str]:
    """Of equal changes the one that makes no new room."""
    return (remedy.size, remedy.where.startswith("a new"), remedy.where)


def _instead(rooms: Rooms, index: int, places: Sequence[_Place]) -> str:
    """Whose place it could have; for a model that fits where somebody else is."""
    models = rooms.models
    taken = [
        (sum(models[each].value for each in place.group), place.name, place.group)
        for place in places
        if place.group and rooms.fits(frozenset((index,)), place.room) is not None
    ]
    if not taken:
        return "another GPU like the one that it fits on"
    value, name, group = min(taken, key=lambda each: each[:2])
    others = ", ".join(models[each].name for each in sorted(group))
    return (
        f"another GPU, or a value above {value:g}: then it is worth the place of {others} on {name}"
    )


def _nearest(refusals: Sequence[Refusal]) -> Refusal | None:
    """The refusal that is missed by least."""
    return min(refusals, key=_missed, default=None)


def _missed(refusal: Refusal) -> float:
    if not refusal.want or not refusal.have:
        return float("inf")
    return abs(refusal.want / refusal.have - 1)


def _reason(rooms: Rooms, refusal: Refusal | None) -> str:
    if refusal is None:
        return "this node has no GPU that can be used"
    if refusal.kind == "memory":
        least = format_size(_up(int(refusal.want)))
        return (
            f"needs {least} with its worker's context and workspace, and the largest room that "
            f"could be there has {format_size(int(refusal.have))}"
        )
    need = rooms.models[refusal.model]
    if refusal.kind == "time":
        return (
            f"wants a token in {need.ms_per_token:g} ms, and even by itself it may take "
            f"{refusal.have:.1f} ms here"
        )
    if refusal.kind == "rate":
        return (
            f"wants {need.tokens_per_s:g} tokens/s, and {need.requests} requests at once give at "
            f"most {refusal.have:.0f} here"
        )
    return "nothing tells how long its tokens take, so that its target cannot be judged"


def _places(bins: Sequence[Bin], filled: Sequence[Filled]) -> Iterator[_Place]:
    """Every room that is used, every one that could be made beside them, and unused GPUs."""
    used = {each.bin.state.uuid: each for each in filled}
    for each in bins:
        here = used.get(each.state.uuid)
        by_name = instance_rooms(each)
        own: list[Instance] = []
        whole = False
        for place, arrangement in here.rooms if here is not None else ():
            room = whole_room(each) if place is None else by_name[place.profile]
            yield _Place(each.state.partition_id(place), room, frozenset(arrangement.models))
            whole = whole or place is None
            own += [place] if place is not None else []
        if whole:
            continue
        if here is None and each.may_be_whole:
            yield _Place(each.state.partition_id(None), whole_room(each), frozenset())
        if each.may_be_cut:
            stands = (*own, *each.state.foreign)
            for profile in each.state.geometry.plain:
                free = [e for e in profile.placements if each.state.geometry.fits(stands, e)]
                if free:
                    name = f"a new {profile.name} on gpu{each.state.index}"
                    yield _Place(name, by_name[profile.name], frozenset())


def _rooms(each: Bin) -> list[Room]:
    rooms = list(instance_rooms(each).values()) if each.may_be_cut else []
    return [*rooms, whole_room(each)] if each.may_be_whole else rooms


def _remedy(rooms: Rooms, index: int, place: _Place) -> _Remedy | None:
    """Change one figure of the model after the other until this room takes it in."""
    need, group = rooms.models[index], place.group | {index}
    changed, size = need, 0.0
    words: list[str] = []
    for _ in range(TRIES_MAX):
        judged = rooms.with_model(index, changed).judge(group, place.room)
        if isinstance(judged, Arrangement):
            return _Remedy(size, place.name, " and ".join(words)) if words else None
        step = _change(changed, judged, index, rooms.rules)
        if step is None:
            return None
        changed, part, said = step
        size += part
        words.append(said)
    return None


def _change(
    need: ModelNeed, refusal: Refusal, index: int, rules: Rules
) -> tuple[ModelNeed, float, str] | None:
    """The need with the figure changed that was refused; None where it is not the model's own."""
    if refusal.kind == "isolation" and need.isolation > Isolation.PROCESS:
        words = "ask for isolation: process instead of hardware"
        return relaxed(need, Isolation.PROCESS), WEAKER_WALL, words
    if refusal.kind == "memory":
        page = rules.page_bytes
        lack_bytes = -(-int(refusal.want - refusal.have) // page) * page
        have_bytes = -(-need.kv_bytes // page) * page
        if lack_bytes < have_bytes:
            words = f"lower its KV by {format_size(_up(lack_bytes))}"
            left = replace(need, kv_bytes=have_bytes - lack_bytes)
            return left, lack_bytes / (need.weights_bytes + need.kv_bytes), words
    if refusal.model != index:
        return None
    if refusal.kind == "time":
        longer_ms = _up_to_tenth(refusal.have)
        words = f"let a token take {longer_ms:g} ms instead of {need.ms_per_token:g}"
        left = replace(need, ms_per_token=longer_ms)
        return left, longer_ms / need.ms_per_token - 1, words
    if refusal.kind == "rate" and refusal.have >= 1:
        rate = float(int(refusal.have))
        words = f"ask for {rate:g} tokens/s instead of {need.tokens_per_s:g}"
        return replace(need, tokens_per_s=rate), 1 - rate / need.tokens_per_s, words
    return None


def _up(size_bytes: int) -> int:
    return -(-size_bytes // MIB) * MIB


def _up_to_tenth(value: float) -> float:
    return (int(value * 10) + 1) / 10
