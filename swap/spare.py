"""Spare memory: segments that are present before an image needs them.

It owns those segments, until one is taken for an image; a segment that was taken never comes back,
since an image is sealed for good and others may hold it: evicting it frees its pages, and new ones
are touched instead. It never touches memory itself and decides nothing about images. Invariant:
`bytes` is all that spare segments can take of the host, at any moment, whoever else has one open.
For one thread (the daemon's event loop); no call waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from swap.errors import DeviceError
from swap.huge_pages import SMALL_PAGE_BYTES, Setting, page_bytes_for
from swap.segment import Segment

SPARE_BYTES_MIN = 64 << 20
"""Touching less costs a load no more than starting a process for it does."""


@dataclass(frozen=True)
class Want:
    """A segment that should be there: for the next image of this size, on this NUMA node."""

    size_bytes: int
    numa_node: int = -1


def wanted_segments(
    missing_bytes: Sequence[int], nodes: Sequence[int], count_max: int, limit_bytes: int
) -> tuple[Want, ...]:
    """What to have ready for images that are not in memory: the largest of them, within a limit.

    A smaller image takes a larger segment cut to size, so these serve all; `count_max` of them, as
    many as are loaded at once, spread over the nodes. What does not fit whole is there in part.
    """
    wants = []
    for index, size_bytes in enumerate(sorted(missing_bytes, reverse=True)[:count_max]):
        size_bytes = min(size_bytes, limit_bytes)
        if size_bytes < SPARE_BYTES_MIN:
            break
        limit_bytes -= size_bytes
        wants.append(Want(size_bytes, nodes[index % len(nodes)] if nodes else -1))
    return tuple(wants)


def make_segment(size_bytes: int, name: str, setting: Setting, *, exact: bool = False) -> Segment:
    """A segment of the largest pages the host can give; an `exact` one is not rounded up to them.

    Raises DeviceError.
    """
    page_bytes = page_bytes_for(size_bytes, setting)
    if page_bytes > SMALL_PAGE_BYTES and not (exact and size_bytes % page_bytes):
        with contextlib.suppress(DeviceError):  # somebody else was quicker
            return Segment.create(size_bytes, name, page_bytes)
    return Segment.create(size_bytes, name)


@dataclass(eq=False)
class Spare:
    """A spare segment; while it is `touched` somebody else works on it, and it is not given."""

    segment: Segment
    numa_node: int
    touched: bool = True


class SpareMemory:
    """The spare segments of a node."""

    def __init__(self) -> None:
        self._spares: list[Spare] = []

    @property
    def bytes(self) -> int:
        return sum(spare.segment.size_bytes for spare in self._spares)

    def settle(self, wants: Sequence[Want]) -> tuple[Want, ...]:
        """Give up what nobody wants; returns what is wanted and not there."""
        left = sorted(self._spares, key=lambda spare: spare.segment.size_bytes)
        missing, kept = [], []
        for want in wants:
            for spare in left:
                if spare.numa_node == want.numa_node and spare.segment.size_bytes >= (
                    want.size_bytes
                ):
                    left.remove(spare)
                    kept.append(spare)
                    break
            else:
                missing.append(want)
        for spare in left:
            self.drop(spare)
        return tuple(missing)

    def add(self, segment: Segment, numa_node: int) -> Spare:
        """Take a new segment in, which its maker now has touched."""
        spare = Spare(segment, numa_node)
        self._spares.append(spare)
        return spare

    def take(
        self, size_bytes: int, numa_node: int = -1, size_bytes_max: int | None = None
    ) -> Segment | None:
        """A segment of this size, as far as possible present; the caller's from here on.

        One of huge pages is of whole ones, up to `size_bytes_max`. None if there is none on that
        node; -1 is any node.
        """
        most = size_bytes if size_bytes_max is None else size_bytes_max
        fitting = [
            spare
            for spare in self._spares
            if not spare.touched
            and (numa_node == -1 or spare.numa_node in (-1, numa_node))
            and spare.segment.whole_pages(size_bytes) <= most
        ]
        if not fitting:
            return None
        large = [spare for spare in fitting if spare.segment.size_bytes >= size_bytes]
        if large:
            spare = min(large, key=lambda each: each.segment.size_bytes)
        else:
            # What is lacking is added, which a pool of huge pages may refuse later on.
            small = [each for each in fitting if each.segment.page_bytes == SMALL_PAGE_BYTES]
            if not small:
                return None
            spare = max(small, key=lambda each: each.segment.size_bytes)
        self._spares.remove(spare)
        try:
            spare.segment.truncate(size_bytes)
        except OSError:
            spare.segment.close()
            return None
        return spare.segment

    def shrink(self, limit_bytes: int) -> None:
        """Free memory until no more than this is spare, from the smallest segment up."""
        for spare in sorted(self._spares, key=lambda each: each.segment.size_bytes):
            excess = self.bytes - limit_bytes
            if excess <= 0:
                return
            page_bytes = spare.segment.page_bytes
            keep = (spare.segment.size_bytes - excess) // page_bytes * page_bytes
            if keep < SPARE_BYTES_MIN:
                self.drop(spare)
            else:
                spare.segment.truncate(keep)

    def drop(self, spare: Spare) -> None:
        """Free one segment's memory, even while somebody else has it open. Idempotent."""
        if spare in self._spares:
            self._spares.remove(spare)
            with contextlib.suppress(OSError):
                spare.segment.truncate(0)
            spare.segment.close()

    def close(self) -> None:
        """Free everything."""
        for spare in list(self._spares):
            self.drop(spare)
