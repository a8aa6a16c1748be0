"""Memory that is present before a load needs it, kept ready for the images that are not in memory.

It owns when spare segments are made and touched, and by whom: a builder process of its own, at the
lowest priority, and never while an image is being built or read. It never touches memory in hotbayd
itself and never counts an image. Invariants: spare memory is within what the host store's budget
leaves free, and gives way at once; without any, loads work as ever, only slower.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from daemon.control.errors import ControlError
from daemon.control.state.world import World
from engine.link.build import Touch
from engine.link.errors import LinkError
from swap.errors import DeviceError
from swap.huge_pages import largest_bytes
from swap.segment import Segment
from swap.spare import Spare, Want, make_segment, wanted_segments

log = logging.getLogger(__name__)


class Toucher(Protocol):
    """A process that makes memory present."""

    async def touch(self, request: Touch, descriptor: int) -> None: ...


Touchers = Callable[[], AbstractAsyncContextManager[Toucher]]


class SpareKeeper:
    """Keeps spare segments, and makes every image's segment, of spare memory where there is any."""

    def __init__(self, world: World, touchers: Touchers) -> None:
        self._world = world
        self._touchers = touchers
        self._memory = world.spare
        self._loads = 0
        self._wake = asyncio.Event()
        self._touching: asyncio.Task[bool] | None = None

    def largest_bytes(self, size_bytes: int) -> int:
        """What to reserve for an image's segment, which huge pages may round up."""
        return largest_bytes(size_bytes, self._world.config.host_store.huge_pages)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Touch nothing during the block."""
        self._loads += 1
        if self._touching is not None:
            self._touching.cancel()
        try:
            yield
        finally:
            self._loads -= 1
            self.wake()

    def segment(self, size_bytes: int, name: str, numa_node: int) -> Segment:
        """A segment of zeros for an image for which the store has just reserved `largest_bytes`.

        Raises DeviceError.
        """
        setting = self._world.config.host_store.huge_pages
        segment = self._memory.take(size_bytes, numa_node, self.largest_bytes(size_bytes))
        self.give_way()
        return make_segment(size_bytes, name, setting) if segment is None else segment

    def give_way(self) -> None:
        """Free what the store's budget has no room for any more."""
        self._memory.shrink(self._limit_bytes())

    def wake(self) -> None:
        """Look again at what should be there."""
        self._wake.set()

    async def run(self) -> None:
        """Keep spare memory, for ever; what is left of it is freed at the end."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self.give_way()
                while not self._loads and (missing := self._memory.settle(self._wants())):
                    task = asyncio.create_task(self._touch(missing[0]), name="touch memory")
                    self._touching = task
                    try:
                        await asyncio.wait([task])
                    finally:
                        self._touching = None
                        task.cancel()
                        await asyncio.wait([task])
                    if task.cancelled() or not task.result():
                        break
        finally:
            self._memory.close()

    def _limit_bytes(self) -> int:
        return min(self._world.config.host_store.spare_bytes, self._world.store.free_bytes)

    def _wants(self) -> tuple[Want, ...]:
        world = self._world
        missing_bytes = [
            self.largest_bytes(version.facts.segment_bytes)
            for version in world.registry.versions()
            if version.facts is not None
            and version.failure is None
            and version.digest not in world.store
        ]
        nodes = sorted({gpu.numa_node for gpu in world.gpus if gpu.numa_node is not None})
        count = world.config.limits.builds_max
        return wanted_segments(missing_bytes, nodes, count, self._limit_bytes())

    async def _touch(self, want: Want) -> bool:
        """Make one segment and have it touched; whether it is there now."""
        config = self._world.config
        setting = config.host_store.huge_pages
        try:
            segment = make_segment(want.size_bytes, "spare", setting, exact=True)
        except DeviceError as error:
            log.warning("no spare memory: %s", error)
            return False
        spare = self._memory.add(segment, want.numa_node)
        request = Touch(
            threads=config.limits.build_threads,
            huge_pages=setting != "off",
            numa_node=want.numa_node,
        )
        try:
            await self._have_touched(spare, request)
        except (ControlError, LinkError) as error:
            log.warning("no spare memory of %d bytes: %s", want.size_bytes, error)
            return False
        return not segment.closed

    async def _have_touched(self, spare: Spare, request: Touch) -> None:
        try:
            async with self._touchers() as toucher:
                try:
                    await toucher.touch(request, spare.segment.descriptor)
                except BaseException:
                    # At once, and not when the process has ended: somebody needs the memory.
                    self._memory.drop(spare)
                    raise
        except BaseException:
            self._memory.drop(spare)
            raise
        spare.touched = False
