"""Staging ahead: models that may be wanted next, put into memory that nobody needs meanwhile.

`choose` is the judgement, over frozen values; the loop gathers these and begins its choice as an
operation. It never makes anybody leave: a model is staged only into pages that are free, and goes
as soon as they are not. The invariant: it begins nothing on a partition while an operation changes
that, nor within `IDLE_S` of an exchange there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from daemon.control.actions.conductor import Conductor
from daemon.control.errors import ControlError
from daemon.control.state.operations import Operations
from daemon.control.state.records import Cause, Intent, Kind
from daemon.control.state.running import Request
from daemon.control.state.world import World
from swap.errors import SwapError
from swap.pieces import unpacking_bytes

LOOK_INTERVAL_S = 0.5
IDLE_S = 1.0
# What had to go was in the way: it is not put back at once, or it would come and go with the KV.
AGAIN_S = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model in host memory that is on no partition. `active_s`: when it last was (monotonic)."""

    model: str
    weights_bytes: int
    active_s: float
    beside_bytes: int = 0
    """Memory that bringing weights in takes beside them."""


@dataclass(frozen=True)
class Spare:
    """A partition where nothing is going on. `mapped`: models whose images its worker maps."""

    partition: str
    page_bytes: int
    pages_free: int
    mapped: frozenset[str]

    @property
    def bytes_free(self) -> int:
        return self.pages_free * self.page_bytes


@dataclass(frozen=True)
class Choice:
    """A model to be staged: so many of its first bytes, 0 for all."""

    model: str
    partition: str
    weights_bytes: int = 0


def choose(spares: Iterable[Spare], candidates: Iterable[Candidate]) -> list[Choice]:
    """What to stage now: who was ACTIVE last comes first, where most is free.

    Each partition gets one model at a time, each model one partition. Where a model does not fit
    its first layers are staged.
    """
    left = {spare.partition: spare for spare in spares}
    chosen: list[Choice] = []
    for candidate in sorted(candidates, key=lambda each: (-each.active_s, each.model)):
        fitting = [
            spare
            for spare in left.values()
            if candidate.model in spare.mapped and spare.bytes_free > candidate.beside_bytes
        ]
        if fitting:
            best = max(fitting, key=lambda each: (each.bytes_free, each.partition))
            room_bytes = best.bytes_free - candidate.beside_bytes
            part = room_bytes if candidate.weights_bytes > room_bytes else 0
            chosen.append(Choice(candidate.model, best.partition, part))
            del left[best.partition]
    return chosen


class StageAhead:
    """Carries staging ahead out; run `run` as a task."""

    def __init__(self, world: World, conductor: Conductor, operations: Operations) -> None:
        self._world = world
        self._conductor = conductor
        self._operations = operations
        self._begun_s: dict[str, float] = {}

    async def run(self) -> None:
        """Look every LOOK_INTERVAL_S, for ever."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """Choose and begin once."""
        world = self._world
        if not world.config.scheduling.stage_ahead or not world.ready or world.stopping:
            return
        for each in choose(self._spares(), self._candidates()):
            model, partition = each.model, each.partition
            self._begun_s[model] = time.monotonic()
            intent = Intent(
                Kind.STAGE,
                cause=Cause.AHEAD,
                partition=partition,
                incoming=model,
                stage_bytes=each.weights_bytes,
            )
            try:
                await self._conductor.submit(Request("stage-ahead"), intent)
            except (ControlError, SwapError) as error:
                log.info("%s is not staged on %s: %s", model, partition, error)

    def _spares(self) -> list[Spare]:
        world, now_s = self._world, time.monotonic()
        staging = {
            record.intent.partition
            for record in self._operations.all()
            if record.intent.kind is Kind.STAGE and not record.done
        }
        spares = []
        for partition, client in world.processes.workers.items():
            state = client.state
            quiet_s = now_s - world.exchanged_s.get(partition, world.started_s)
            busy = self._operations.holder(f"partition:{partition}") is not None
            busy = busy or not world.is_open(partition)
            if busy or partition in staging or state.exchanging or quiet_s < IDLE_S:
                continue
            mapped = frozenset(
                key for digest in state.images for key in world.registry.of_digest(digest)
            )
            spares.append(Spare(partition, state.page_bytes, state.pages_free, mapped))
        return spares

    def _candidates(self) -> list[Candidate]:
        world, now_s = self._world, time.monotonic()
        return [
            Candidate(
                version.key,
                version.facts.weights_bytes,
                world.left_s.get(version.key, 0.0),
                unpacking_bytes(world.store.manifest(version.digest)),
            )
            for version in world.registry.versions()
            if version.facts is not None
            and version.failure is None
            and world.state(version)[0] == "STANDBY"
            and version.key not in world.placements
            and world.refusal(version.key) is None
            and self._operations.holder(f"model:{version.key}") is None
            and now_s - self._begun_s.get(version.key, -AGAIN_S) >= AGAIN_S
        ]
