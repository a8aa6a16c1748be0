"""The watch over shares: what it warns of, and that nothing it meets ends the daemon."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

from daemon.control.actions.share_watch import ShareWatch
from daemon.control.errors import ProcessFailed
from partitioner.mps.mending import EndWorker, Mended
from partitioner.mps.sightings import Workers


class Places:
    """Ends the worker that it is told of, and finds the same at each look."""

    def __init__(self, found: Mended) -> None:
        self.found = found
        self.seen: list[dict[str, int]] = []

    def noted(self) -> tuple[object, ...]:
        return ("gpu0",)

    async def mend(self, workers: Workers, end_worker: EndWorker) -> Mended:
        self.seen.append(dict(workers()))
        await end_worker("gpu0/mps0")
        return self.found


def world() -> Any:
    workers = {"gpu0/mps0": SimpleNamespace(pid=7)}
    processes = SimpleNamespace(workers=workers)
    return SimpleNamespace(processes=processes, warnings=deque(maxlen=20))


def test_what_is_found_at_each_look_is_warned_of_once() -> None:
    async def end(partition: str) -> None:
        pass

    async def scenario() -> None:
        here, places = world(), Places(Mended(("gpu0",), ("gpu1: its daemon is stuck",)))
        here.warnings.append("something else")
        watch = ShareWatch(here, places, end)
        for _ in range(3):
            await watch.look()
        assert list(here.warnings) == [
            "something else",
            "MPS of gpu0 was in fault; its workers were restarted",
            "MPS: gpu1: its daemon is stuck",
        ]
        assert places.seen == [{"gpu0/mps0": 7}] * 3

    asyncio.run(scenario())


def test_a_worker_that_cannot_be_ended_does_not_end_the_watch() -> None:
    tried = asyncio.Event()

    async def end(partition: str) -> None:
        tried.set()
        raise ProcessFailed("it did not end within 10 s of SIGKILL")

    async def scenario() -> None:
        watch = ShareWatch(world(), Places(Mended()), end)
        running = asyncio.create_task(watch.run())
        for _ in range(2):
            tried.clear()
            watch.wake()
            await asyncio.wait_for(tried.wait(), 120)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())
