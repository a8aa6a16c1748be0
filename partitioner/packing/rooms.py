"""What fits into one room together: walls, memory, and the time per output token.

It owns that judgement, which the greedy packer, the exact one and the explanations all share. It is
pure; answers are kept, since packing asks the same again and again. The invariants: memory is
counted with every worker's context and workspace and in whole pages; a group is refused when any of
its members would miss its time per token or its rate, however much memory there is.

Times are what may be, with all that have no rate always busy. Models of one worker take turns: a
token waits for one step of every other busy one. Clients of one MPS server lengthen each other's
steps as `sharing.yaml` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from partitioner.layout_file import MAX_SHARES
from partitioner.packing.sharing import Rules
from partitioner.packing.values import (
    Arrangement,
    Bin,
    Isolation,
    ModelNeed,
    Refusal,
    Room,
    Worker,
)

ALWAYS = 1.0
"""How busy a model is of which no rate is known."""


def whole_room(each: Bin) -> Room:
    """The GPU uncut."""
    slots = max(1, each.state.geometry.memory_slots)
    return Room("", each.state.memory_bytes, slots, 1.0, each.bytes_per_s)


def instance_rooms(each: Bin) -> dict[str, Room]:
    """A room for each plain profile of the GPU, by the profile's name."""
    geometry = each.state.geometry
    return {
        profile.name: Room(
            profile.name,
            profile.memory_bytes,
            profile.slots,
            max(geometry.memory_slots / profile.slots, each.sm_count / profile.sm_count, 1.0),
            each.bytes_per_s,
        )
        for profile in geometry.plain
    }


class Rooms:
    """Judges groups of `models`, by index."""

    def __init__(self, models: Sequence[ModelNeed], rules: Rules) -> None:
        self.models = tuple(models)
        self.rules = rules
        self.bytes = tuple(rules.model_bytes(e.weights_bytes, e.kv_bytes) for e in models)
        self._judged: dict[tuple[Room, frozenset[int]], Arrangement | Refusal] = {}
        self._speeds: dict[Room, dict[int, _Speed]] = {}
        self._apart: dict[Room, list[int]] = {}

    def fits(self, group: frozenset[int], room: Room) -> Arrangement | None:
        """How the group sits in the room, or None."""
        found = self.judge(group, room)
        return found if isinstance(found, Arrangement) else None

    def judge(self, group: frozenset[int], room: Room) -> Arrangement | Refusal:
        """How the group sits in the room, or the refusal that is nearest to a fit."""
        key = (room, group)
        found = self._judged.get(key)
        if found is None:
            found = self._judged[key] = self._judge(tuple(sorted(group)), room)
            if len(group) <= 2 and isinstance(found, Refusal):
                self._learn(group, room)
        return found

    def apart(self, room: Room) -> list[int]:
        """For each model, whom it is known not to go with in this room: a bit for each model.

        Who was refused by itself goes with nobody, not even with `NOBODY`. What is known grows as
        groups are judged; a group that has a refused one in it is refused too.
        """
        if room not in self._apart:
            self._apart[room] = list(self._walled)
        return self._apart[room]

    def _learn(self, group: frozenset[int], room: Room) -> None:
        apart = self.apart(room)
        if len(group) == 1:
            (index,) = group
            apart[index] = -1
        else:
            one, other = group
            apart[one] |= 1 << other
            apart[other] |= 1 << one

    def with_model(self, index: int, need: ModelNeed) -> Rooms:
        """The same models, but for one."""
        models = (*self.models[:index], need, *self.models[index + 1 :])
        return Rooms(models, self.rules)

    def _judge(self, group: tuple[int, ...], room: Room) -> Arrangement | Refusal:
        least = self.rules.worker_bytes + sum(self.bytes[index] for index in group)
        if least > room.memory_bytes:
            return Refusal("memory", group[-1], least, room.memory_bytes)
        wall = self._wall(group)
        if wall is Isolation.HARDWARE:
            return Refusal("isolation", group[-1])
        refusal: Refusal | None = None
        for split in self._splits(group, wall):
            found = self._split(group, split, room)
            if isinstance(found, Arrangement):
                return found
            refusal = refusal or found
        return refusal or Refusal("shares", group[-1])

    @cached_property
    def _walled(self) -> tuple[int, ...]:
        """For each model, those of other tenants behind a wall in hardware: nobody shares then."""
        everyone = [1 << index for index in range(len(self.models))]
        return tuple(
            sum(
                bit
                for bit, other in zip(everyone, self.models, strict=True)
                if other.tenant != need.tenant
                and max(need.isolation, other.isolation) is Isolation.HARDWARE
            )
            for need in self.models
        )

    def _wall(self, group: tuple[int, ...]) -> Isolation:
        """The strongest wall that two of the group must have between them."""
        members = [self.models[index] for index in group]
        if len({each.tenant for each in members}) < 2:
            return Isolation.NONE
        return max(each.isolation for each in members)

    def _splits(self, group: tuple[int, ...], wall: Isolation) -> list[tuple[tuple[int, ...], ...]]:
        """Into workers: one of all, one of each tenant, one of each model; least memory first."""
        splits: list[tuple[tuple[int, ...], ...]] = []
        if wall is Isolation.NONE:
            splits.append((group,))
        if len(group) == 1 or not self.rules.shares:
            return splits
        tenants: dict[str, list[int]] = {}
        for index in group:
            tenants.setdefault(self.models[index].tenant, []).append(index)
        by_tenant = tuple(tuple(each) for each in tenants.values())
        by_model = tuple((index,) for index in group)
        if len(by_tenant) > 1:
            splits.append(by_tenant)
        if by_model != by_tenant:
            splits.append(by_model)
        return [each for each in splits if len(each) <= MAX_SHARES]

    def _split(
        self, group: tuple[int, ...], split: tuple[tuple[int, ...], ...], room: Room
    ) -> Arrangement | Refusal:
        rules, sizes = self.rules, self.bytes
        used_bytes = rules.worker_bytes * len(split) + sum([sizes[index] for index in group])
        used_bytes += rules.server_bytes if len(split) > 1 else 0
        if used_bytes > room.memory_bytes:
            return Refusal("memory", group[-1], used_bytes, room.memory_bytes)
        times = self._times(split, self._speeds_of(group, room))
        if isinstance(times, Refusal):
            return times
        workers = tuple(
            Worker(each, rules.worker_bytes + sum([sizes[index] for index in each]))
            for each in split
        )
        return Arrangement(group, workers, used_bytes, tuple(times[index] for index in group))

    def _times(
        self, split: tuple[tuple[int, ...], ...], speeds: dict[int, _Speed]
    ) -> dict[int, float] | Refusal:
        """The time per token of each model, or the first that will not do."""
        small_max_bytes = self.rules.mps_weights_max_bytes
        largest_bytes = max([self.models[i].weights_bytes for each in split for i in each])
        small = largest_bytes <= small_max_bytes
        busy = [min(1.0, sum([speeds[i].busy for i in each])) for each in split]
        times: dict[int, float] = {}
        for number, worker in enumerate(split):
            turns_ms = sum([speeds[i].busy * speeds[i].step_ms for i in worker])
            clients = sum(busy[:number]) + sum(busy[number + 1 :])
            for index in worker:
                found = self._time(index, speeds[index], turns_ms, clients, small)
                if isinstance(found, Refusal):
                    return found
                times[index] = found
        return times

    def _speeds_of(self, group: tuple[int, ...], room: Room) -> dict[int, _Speed]:
        """Those of the group at least; kept, since they are asked for again and again."""
        known = self._speeds.setdefault(room, {})
        for index in group:
            if index not in known:
                known[index] = self._speed(index, room)
        return known

    def _speed(self, index: int, room: Room) -> _Speed:
        """Time per token with the room to itself, and how much of the time it is busy."""
        need = self.models[index]
        alone_ms = need.alone_ms
        if not alone_ms and room.bytes_per_s:
            alone_ms = 1000 * need.weights_bytes / (room.bytes_per_s * self.rules.decode_reach)
        step_ms = alone_ms * room.slowdown
        busy = ALWAYS
        if need.tokens_per_s and step_ms:
            busy = min(ALWAYS, need.tokens_per_s * step_ms / 1000 / need.requests)
        return _Speed(step_ms, busy)

    def _time(
        self, index: int, speed: _Speed, turns_ms: float, clients: float, small: bool
    ) -> float | Refusal:
        """A model's time per token among the others, or why that will not do; 0 not known.

        `turns_ms` is what the models of its worker take in turn, `clients` how many other workers
        are busy, `small` whether all of the room's models are.
        """
        need, rules = self.models[index], self.rules
        if not speed.step_ms:
            asked = need.ms_per_token or need.tokens_per_s
            return Refusal("unknown", index) if asked else 0.0
        turns_ms += (1 - speed.busy) * speed.step_ms
        time_ms = turns_ms * (1 + clients * (rules.mps_time if small else 1.0))
        if need.ms_per_token and time_ms > need.ms_per_token:
            return Refusal("time", index, need.ms_per_token, time_ms)
        if need.tokens_per_s:
            kept = 1 / (1 + clients)
            if small:
                kept = max(kept, 1 - clients * rules.mps_throughput)
            most_tokens_per_s = 1000 * need.requests / turns_ms * kept
            if need.tokens_per_s > most_tokens_per_s:
                return Refusal("rate", index, need.tokens_per_s, most_tokens_per_s)
        return time_ms


@dataclass(frozen=True)
class _Speed:
    step_ms: float
    busy: float


def relaxed(need: ModelNeed, isolation: Isolation) -> ModelNeed:
    """The same need behind another wall."""
    return replace(need, isolation=isolation)
