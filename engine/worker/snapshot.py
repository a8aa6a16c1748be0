"""What the step thread tells of itself, as frozen values that any thread may read.

Owns the reading of counters; it never changes what it reads. The main thread answers `Describe`
from the newest snapshot, so that a step that takes long never keeps hotbayd waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.link.control import EngineState, ExchangeResult
from engine.worker.residency import Residency


@dataclass(frozen=True)
class Snapshot:
    """The step thread's part of WorkerState."""

    pages_free: int
    images: tuple[str, ...]
    engines: tuple[EngineState, ...]
    exchanging: str
    exchanged: ExchangeResult | None

    @property
    def outline(self) -> tuple[object, ...]:
        """What is worth telling at once when it changes; counters are told once a second."""
        engines = tuple(
            (one.model, one.status, one.spare, one.reason, one.running + one.waiting > 0)
            for one in self.engines
        )
        return self.images, engines, self.exchanging, self.exchanged


def take_snapshot(
    residency: Residency, exchanging: str, exchanged: ExchangeResult | None
) -> Snapshot:
    """The present state; on the step thread only."""
    return Snapshot(
        pages_free=residency.pool.free_pages
        + sum(one.pages_unused for one in residency.residents.values()),
        images=tuple(residency.images),
        engines=tuple(one.state() for one in residency.residents.values()),
        exchanging=exchanging,
        exchanged=exchanged,
    )
