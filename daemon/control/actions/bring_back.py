"""Models that lost their partition to a new layout: brought back where there is room.

It owns the background loads that follow a change of layout. It places nothing itself: where a model
goes is the conductor's to say. The invariant: a model that is not brought back stays in host memory
and is named among the node's warnings.
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

    def later(self, operation: str, models: tuple[str, ...]) -> None:
        """Once `operation` has ended, and the node is ready, load what it displaced."""
        if models:
            task = asyncio.create_task(self._after(operation, models), name="bring back")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _after(self, operation: str, models: tuple[str, ...]) -> None:
        # Before that an operation of an earlier daemon is not taken up again.
        await self._world.became_ready.wait()
        with contextlib.suppress(Refused):  # It may be forgotten.
            await self._operations.wait(operation, None)
        for key in models:
            problem = await self._load(key)
            if problem:
                log.warning("%s was not brought back after %s: %s", key, operation, problem)
                self._world.warnings.append(f"{key} lost its partition to a new layout: {problem}")

    async def _load(self, key: str) -> str:
        """Returns why it does not serve again; empty when it does."""
        intent = Intent(Kind.LOAD, cause=Cause.RECOVERY, incoming=key)
        try:
            begun = await self._conductor.submit(Request("ApplyLayout"), intent)
            ended = await self._operations.wait(begun.name, None)
        except (ControlError, SwapError, LinkError) as error:
            return str(error)
        if ended.failure is not None:
            return ended.failure.message
        assert ended.result is not None
        return "" if ended.result.state == "ACTIVE" else ended.result.message
