"""Bringing a packed image to the device: its pieces are unpacked behind the copy, layer by layer.

It owns the second thread that this takes, and the order: a piece is begun once all of it has
arrived, pieces one after the other, and a layer lands once its last piece is unpacked. It takes no
memory: `swap.pieces` has laid stored bytes and weights into one region so that neither gets in the
other's way. Invariant: when the transfer has ended, nothing is being copied and nothing unpacked.
"""

from __future__ import annotations

import bisect
import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate

from swap.arena import Region
from swap.device import DeviceMemory
from swap.image import Manifest
from swap.pieces import PlacedPiece, place_pieces, read_placed, run_of, run_within
from swap.segment import Mapping
from swap.shared_link import Turn
from swap.transfer import COPY_BYTES_MAX, Reached, Transfer
from swap.unpacking import Unpacker

PACKED_COPY_BYTES_MAX = 16 << 20
"""Copied by one call where unpacking a piece takes this processor longer than copying it: what is
unpacked waits for the copy, so it is shorter than where nothing is."""


class PackedTransfer(Transfer):
    """A transfer of a packed image's pieces into a region; bytes are those stored.

    The weights' first `there_bytes` are there already: whole pieces. Of the rest it brings in as
    many as can be unpacked within `room_bytes`, or all. A piece that turns out to be damaged ends
    it with CorruptWeights.
    """

    def __init__(
        self,
        device: DeviceMemory,
        manifest: Manifest,
        source: Mapping,
        region: Region,
        unpacker: Unpacker,
        *,
        growing: bool = False,
        copy_bytes_max: int | None = None,
        there_bytes: int = 0,
        room_bytes: int | None = None,
        turn: Turn | None = None,
        under_way: Callable[[], None] = lambda: None,
        reached: Reached = lambda place, cancelled: None,
    ) -> None:
        self._pieces = place_pieces(manifest)
        if room_bytes is None:
            run = run_of(manifest, there_bytes, manifest.weights_bytes)
        else:
            run = run_within(manifest, there_bytes, room_bytes)
        super().__init__(
            device,
            manifest,
            source,
            region,
            growing=growing,
            copy_bytes_max=copy_bytes_max,
            turn=turn,
            under_way=under_way,
            reached=reached,
            arrival_offset_bytes=run.arrival_offset_bytes,
            start_bytes=run.start_bytes,
            end_bytes=run.end_bytes,
        )
        if copy_bytes_max is None:
            behind = unpacker.pieces_ahead > 0
            self.copy_bytes_max = COPY_BYTES_MAX if behind else PACKED_COPY_BYTES_MAX
        self._mapping = source
        self._unpacker = unpacker
        self._weights = region.address
        per_layer = {span.layer: 0 for span in manifest.layers}
        for piece in self._pieces:
            per_layer[piece.tensor.layer] += 1
        self._layer_ends = list(accumulate(per_layer.values()))
        self._progress = threading.Condition()
        self._last = run.last
        self._pieces_there = run.first
        self._unpacked = run.first
        """Of the pieces, those that are complete: the first ones."""
        self._land()
        self._copying_failed = False
        self._unpacking: Future[None] | None = None

    def _copy_image(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="unpack") as threads:
            self._unpacking = threads.submit(self._unpack_all)
            try:
                super()._copy_image()
            except BaseException:
                with self._progress:
                    self._copying_failed = True
                    self._progress.notify()
                raise
            self.turn.end()  # others may copy while the last pieces are unpacked
            self._unpacking.result()
        if self._unpacked < self._last:  # given up after the last copy
            raise self._cancellation()
        self._land()

    @property
    def landed_bytes(self) -> int:
        pieces, unpacked = self._pieces, self._unpacked
        return (
            self._manifest.weights_bytes
            if unpacked == len(pieces)
            else pieces[unpacked].offset_bytes
        )

    def _land(self) -> None:
        """Let layers be used whose pieces are all unpacked."""
        self.gate.land(
            bisect.bisect_right(self._layer_ends, self._unpacked) - self.gate.landed_layers
        )

    def _arrived(self, end: int) -> None:
        """Have every piece unpacked that is there whole; raise what unpacking has met so far."""
        there = self._pieces_there
        while there < self._last:
            piece = self._pieces[there]
            if piece.stored_offset_bytes + piece.stored_bytes > end:
                break
            there += 1
        with self._progress:
            self._pieces_there = there
            self._progress.notify()
        if self._unpacking is not None and self._unpacking.done():
            self._unpacking.result()

    def _unpack_all(self) -> None:
        """Begin pieces as they arrive, ahead of the one that is waited for; land layers in order.

        Returns early, with nothing being unpacked, when no more pieces will come.
        """
        begun: collections.deque[int] = collections.deque()
        first = start = self._unpacked  # of those that are begun and not complete
        try:
            while first < self._last:
                following = first + len(begun)
                there = self._there(following, wait=not begun)
                if not there and not begun:
                    return
                if following == start:
                    self._reached("unpacking", self._cancelled)
                if there and len(begun) <= self._unpacker.pieces_ahead:
                    begun.append(self._begin(self._pieces[following]))
                    continue
                self._unpacker.wait(begun.popleft())
                first += 1
                self._unpacked = first
                self._land()
            self._unpacker.check()
        finally:
            while begun:
                self._unpacker.wait(begun.popleft())

    def _there(self, index: int, *, wait: bool) -> bool:
        """Whether a piece has arrived, and is still wanted."""
        with self._progress:
            if wait and index < self._last:
                self._progress.wait_for(lambda: self._pieces_there > index or self._copying_failed)
            return self._pieces_there > index and not self._cancelled.is_set()

    def _begin(self, piece: PlacedPiece) -> int:
        arrived = self._destination + piece.stored_offset_bytes
        target = self._weights + piece.offset_bytes
        if piece.packed:
            return self._unpacker.unpack(read_placed(self._mapping, piece), arrived, target)
        return self._unpacker.move(arrived, target, piece.stored_bytes)
