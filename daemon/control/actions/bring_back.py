"""Models that lost their partition: brought back where there is room.

It owns the background loads that follow a change of layout, and a GPU's trouble. It places nothing
itself: where a model goes is the conductor's to say. The invariant: a model that is not brought
back stays in host memory and is named among the node's warnings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from daemon.control.actions.conductor import Conductor
from daemon.control.errors import ControlError, Refused
from daemon.control.state.operations import Operations
from daemon.control.state.records import Cause, Intent, Kind
from daemon.control.state.running import Request
from daemon.control.state.world import World
from engine.link.errors import LinkError
from swap.errors import SwapError

log = logging.getLogger(__name__)


class BringBack:
    """Loads models again, one after the other, warm from the host store."""

    def __init__(self, world: World, operations: Operations, conductor: Conductor) -> None:
        self._world = world
        self._operations = operations
        self._conductor = conductor
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned: dict[str, str] = {}
        """What was warned of, by model; taken back once it is there again."""

    def later(self, models: tuple[str, ...], lost: str, *, after: str = "") -> None:
        """Once the operation `after` has ended, and the node is ready, load these models.

        `lost` says of a model that finds no place how it lost its own.
        """
        if models:
            task = asyncio.create_task(self._load_all(models, lost, after), name="bring back")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End what goes on in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _load_all(self, models: tuple[str, ...], lost: str, after: str) -> None:
        world = self._world
        # Before that an operation of an earlier daemon is not taken up again.
        await world.became_ready.wait()
        if after:
            with contextlib.suppress(Refused):  # It may be forgotten.
                await self._operations.wait(after, None)
        for key in models:
            if key in world.placements or world.registry.get(key) is None:
                continue  # Somebody was faster, or it is gone from the repository.
            problem = await self._load(key)
            with contextlib.suppress(KeyError, ValueError):
                world.warnings.remove(self._warned.pop(key))
            if problem:
                self._warned[key] = f"{key} {lost}: {problem}"
                log.warning("%s", self._warned[key])
                world.warnings.append(self._warned[key])

    async def _load(self, key: str) -> str:
        """Returns why it does not serve again; empty when it does."""
        intent = Intent(Kind.LOAD, cause=Cause.RECOVERY, incoming=key)
        try:
            begun = await self._conductor.submit(Request("recovery"), intent)
            ended = await self._operations.wait(begun.name, None)
        except (ControlError, SwapError, LinkError) as error:
            return str(error)
        if ended.failure is not None:
            return ended.failure.message
        assert ended.result is not None
        return "" if ended.result.state == "ACTIVE" else ended.result.message
