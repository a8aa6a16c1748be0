"""Shared places without daemons, for rehearsing changes of layout.

It owns a dictionary and the rule that a server holds its instance. It starts nothing; the daemons
that a simulated node has are processes, made by `partitioner.mps.places`. The invariant: it answers
as that one does, with nothing for a place that is only half done.
"""

from __future__ import annotations

from collections.abc import Mapping

from partitioner.errors import MpsShareError
from partitioner.geometry import Instance
from partitioner.gpu import Gpu
from partitioner.layout import Share


class MemorySharing:
    """See `partitioner.executor.Sharing`. `half_done` places are what a crash would leave."""

    def __init__(self) -> None:
        self.places: dict[tuple[str, Instance | None], tuple[Share, ...]] = {}
        self.half_done: set[tuple[str, Instance | None]] = set()

    async def shared(self, gpu: str) -> Mapping[Instance | None, tuple[Share, ...]]:
        """See `Sharing`."""
        return {
            place: () if (owner, place) in self.half_done else shares
            for (owner, place), shares in self.places.items()
            if owner == gpu
        }

    async def share(self, gpu: Gpu, place: Instance | None, shares: tuple[Share, ...]) -> None:
        """See `Sharing`."""
        if (place is None) == gpu.mig_enabled or (
            place is not None and place not in [each.place for each in gpu.instances or ()]
        ):
            raise MpsShareError(f"{place or 'the whole GPU'} is not there, so it cannot be shared")
        self.places[gpu.uuid, place] = shares
        self.half_done.discard((gpu.uuid, place))

    async def unshare(self, gpu: str, place: Instance | None) -> None:
        """See `Sharing`."""
        self.places.pop((gpu, place), None)
        self.half_done.discard((gpu, place))

    def pids(self) -> frozenset[int]:
        """See `Sharing`."""
        return frozenset()
