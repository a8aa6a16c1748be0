"""How much KV of paused requests a move would push out of the device into host memory.

It owns that arithmetic over what a worker last told of itself, and follows the worker's order: what
is free, weights that nobody needs, the outgoing models' weights, and only then KV that waits. It
never asks a worker. The invariant: no more is foreseen than the engines hold and host memory takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.link.control import EngineState, EngineStatus

PAUSED = (EngineStatus.STANDBY, EngineStatus.STAGED)


@dataclass(frozen=True)
class Holdings:
    """What the engines of a partition hold of its pages now; `room_bytes` can still be parked."""

    page_bytes: int
    pages_free: int
    room_bytes: int
    engines: tuple[EngineState, ...] = ()

    def parked_bytes(
        self,
        outgoing: tuple[str, ...],
        incoming: str,
        weights_bytes: int,
        kv_bytes_min: int,
        *,
        preserved: bool,
    ) -> int:
        """KV that is parked so that `incoming` gets its weights and the KV of one longest request.

        The outgoing models' running requests are counted only where they are `preserved`. A request
        is parked whole, and requests that run side by side grow side by side: whoever gives pages
        is taken to have blocks of each of its requests in the last ones.
        """
        missing = self._pages(weights_bytes) + self._pages(kv_bytes_min) - self.pages_free
        kept: list[tuple[bool, int]] = []
        for engine in self.engines:
            leaves = engine.model in outgoing
            kept_on = engine.paused or (leaves and preserved and engine.running)
            used_bytes = engine.kv_used_bytes if kept_on else 0
            if engine.model == incoming:
                missing -= self._pages(engine.weights_bytes)
                missing -= self._pages(min(engine.kv_bytes, kv_bytes_min))
            elif leaves:
                kv_pages = self._pages(engine.kv_bytes) - self._pages(used_bytes)
                missing -= self._pages(engine.weights_bytes) + max(0, kv_pages)
                kept.append((True, used_bytes))
            elif engine.spare:
                missing -= self._pages(engine.weights_bytes)
            if engine.model not in (incoming, *outgoing) and engine.status in PAUSED:
                kept.append((False, used_bytes))
        parked = 0
        for _, used_bytes in sorted(kept, key=lambda each: each[0]):
            if missing > 0:
                parked += used_bytes
                missing -= self._pages(used_bytes)
        return min(parked, self.room_bytes)

    def _pages(self, size_bytes: int) -> int:
        return -(-size_bytes // self.page_bytes)
