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
        return found

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
        rules = self.rules
        workers = tuple(
            Worker(each, rules.worker_bytes + sum(self.bytes[index] for index in each))
            for each in split
        )
        used_bytes = sum(each.memory_bytes for each in workers)
        used_bytes += rules.server_bytes if len(workers) > 1 else 0
        if used_bytes > room.memory_bytes:
            return Refusal("memory", group[-1], used_bytes, room.memory_bytes)
        times: dict[int, float] = {}
        speeds = {index: self._speed(index, room) for index in group}
        for worker in workers:
            others = [each for each in workers if each is not worker]
            for index in worker.models:
                found = self._time(index, worker, others, speeds)
                if isinstance(found, Refusal):
                    return found
                times[index] = found
        return Arrangement(group, workers, used_bytes, tuple(times[index] for index in group))

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
        self, index: int, worker: Worker, others: Sequence[Worker], speeds: dict[int, _Speed]
    ) -> float | Refusal:
        """A model's time per token among the others, or why that will not do; 0 not known."""
        need, rules = self.models[index], self.rules
        step_ms = speeds[index].step_ms
        if not step_ms:
            asked = need.ms_per_token or need.tokens_per_s
            return Refusal("unknown", index) if asked else 0.0
        turns = sum(speeds[each].busy * speeds[each].step_ms for each in worker.models)
        turns += (1 - speeds[index].busy) * step_ms
        clients = sum(min(1.0, sum(speeds[i].busy for i in each.models)) for each in others)
        small = all(
            self.models[i].weights_bytes <= rules.mps_weights_max_bytes
            for each in (worker, *others)
            for i in each.models
        )
        time_ms = turns * (1 + clients * (rules.mps_time if small else 1.0))
        if need.ms_per_token and time_ms > need.ms_per_token:
            return Refusal("time", index, need.ms_per_token, time_ms)
        kept = 1 / (1 + clients)
        if small:
            kept = max(kept, 1 - clients * rules.mps_throughput)
        most_tokens_per_s = 1000 * need.requests / turns * kept
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
