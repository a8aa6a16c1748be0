"""Custody of image segments: descriptors kept so that the weights outlive whoever else dies.

The gateway holds the numbers and nothing more: it never maps, reads or sizes a segment, and it
drops one only when told to. Invariant: one descriptor for each digest, closed at the latest when
the process ends.
"""

from __future__ import annotations

import os

from daemon.gateway.errors import SegmentRefused


class Custody:
    """Descriptors by image digest, `segments_max` at most."""

    def __init__(self, segments_max: int) -> None:
        self._segments_max = segments_max
        self._descriptors: dict[str, int] = {}

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(sorted(self._descriptors))

    def keep(self, digest: str, descriptors: list[int]) -> None:
        """Take over a segment's descriptor; a second one of the same digest is closed.

        Raises SegmentRefused, with every descriptor closed, unless there is exactly one and room.
        """
        known = digest in self._descriptors
        if len(descriptors) != 1 or (not known and len(self._descriptors) >= self._segments_max):
            for descriptor in descriptors:
                os.close(descriptor)
            raise SegmentRefused(
                f"segment {digest} came with {len(descriptors)} descriptors while "
                f"{len(self._descriptors)} of at most {self._segments_max} segments are kept; "
                "send exactly one descriptor, and drop segments that are not needed"
            )
        if known:
            os.close(descriptors[0])
        else:
            self._descriptors[digest] = descriptors[0]

    def fetch(self, digest: str) -> int:
        """The kept descriptor, which stays the gateway's; a link duplicates what it sends."""
        try:
            return self._descriptors[digest]
        except KeyError:
            raise SegmentRefused(f"segment {digest} is not kept here; build it again") from None

    def drop(self, digest: str) -> None:
        """Close a kept descriptor. Idempotent."""
        descriptor = self._descriptors.pop(digest, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Close all."""
        for digest in self.digests:
            self.drop(digest)
