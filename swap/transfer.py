"""Copying an image to the device, layer by layer, while its first layers are already computed with.

It owns one background thread per transfer and the gate at which a layer's user waits. It never maps
pages and never frees what it was given: the region must be large enough and the source mapped until
`join` has returned. Where copies queue on the device, the next are issued while one runs, so that
the link never waits for this thread. Invariant: a layer is reported as landed only once all its
bytes are on the device, and a gate that waits is always woken: by the layer, a failure or a
cancellation.
"""

from __future__ import annotations

import bisect
import collections
import threading
import time
from collections.abc import Callable

from swap.arena import PagePool, Region
from swap.device import DeviceMemory
from swap.errors import (
    CorruptWeights,
    DeviceMisuse,
    SwapError,
    TransferCancelled,
    TransferFailed,
)
from swap.image import Manifest
from swap.segment import Mapping, Segment
from swap.shared_link import Link, OwnLink, Turn

# Within some 5 % a copy's rate is the same from 16 MiB to 1 GiB a call. After each call the thread
# needs the interpreter's lock, for which a busy thread lets it wait up to the switch interval (5 ms
# unless set lower): so calls are few and long, across layers where those are small. It is also
# what a cancelled transfer finishes first, with those that the device lets wait behind it.
COPY_BYTES_MAX = 64 << 20
LINK_COPIES = 5

Reached = Callable[[str, threading.Event], None]


class LayerGate:
    """Which layers have landed. Any thread may wait; only the transfer opens it."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._position = {layer: index for index, layer in enumerate(layers)}
        self._landed = 0
        self._error: SwapError | None = None
        self._changed = threading.Condition()

    @property
    def landed_layers(self) -> int:
        """How many layers have landed, in the manifest's order."""
        return self._landed

    def wait(self, layer: int, timeout_s: float | None = None) -> None:
        """Return once `layer` has landed; layers the image does not have never hold anybody up.

        Raises TransferFailed, TransferCancelled, or TimeoutError after `timeout_s`.
        """
        position = self._position.get(layer, -1)
        if self._landed > position:
            return
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._landed > position or self._error is not None, timeout_s
            )
            if self._landed > position:
                return
            if not arrived:
                raise TimeoutError(f"layer {layer} did not land within {timeout_s} s")
            assert self._error is not None
            raise self._error

    def land(self, count: int) -> None:
        """The next `count` layers are complete."""
        if count:
            with self._changed:
                self._landed += count
                self._changed.notify_all()

    def fail(self, error: SwapError) -> None:
        """No further layer will land."""
        with self._changed:
            self._error = error
            self._changed.notify_all()


class Transfer:
    """One image on its way to a region whose mapped pages hold its weights.

    The image's stored bytes arrive `arrival_offset_bytes` into the region. With `growing` pages may
    be mapped later, first to last: it waits for them, and is told of each by `backed`.
    It copies when it has its `turn` at the link; `under_way` is called once it has had the first.
    One that is to give way to others copies few bytes a call (`copy_bytes_max`), and can be paused.
    It may be from `start_bytes` to `end_bytes` of the stored bytes: what is before is there
    already, its layers too.
    `reached(place, cancelled)` is called by each thread before its work, "copying" or "unpacking";
    what it raises ends the transfer. `cancelled` is set when nobody wants that any more.
    Raises DeviceMisuse when the region is too small, or the source smaller than the image.
    """

    copy_bytes_max = COPY_BYTES_MAX

    def __init__(
        self,
        device: DeviceMemory,
        manifest: Manifest,
        source: Mapping,
        region: Region,
        *,
        growing: bool = False,
        arrival_offset_bytes: int = 0,
        copy_bytes_max: int | None = None,
        start_bytes: int = 0,
        end_bytes: int | None = None,
        turn: Turn | None = None,
        under_way: Callable[[], None] = lambda: None,
        reached: Reached = lambda place, cancelled: None,
    ) -> None:
        stored = manifest.stored_bytes
        end_bytes = stored if end_bytes is None else end_bytes
        needed = arrival_offset_bytes + end_bytes
        room = region.pages_max * device.page_bytes if growing else region.mapped_bytes
        if room < needed or source.size_bytes < stored:
            raise DeviceMisuse(
                f"image {manifest.digest[:12]} of {stored} bytes needs {needed}; its region has "
                f"{region.mapped_bytes} bytes mapped and its source {source.size_bytes}"
            )
        self.gate = LayerGate(tuple(span.layer for span in manifest.layers))
        self.bytes_total = end_bytes - start_bytes
        self.seconds = 0.0
        """How long copying took, waiting for turns apart, once it has ended."""
        self.turn: Turn = turn if turn is not None else OwnLink().turn()
        self._under_way = under_way
        self._reached = reached
        self._copies_ahead = device.copies_ahead if self.turn.whole else 0
        self._device = device
        self._manifest = manifest
        self._source = source.address
        self._arrival_offset = arrival_offset_bytes
        self._destination = region.address + arrival_offset_bytes
        self._ends = [span.offset_bytes + span.bytes for span in manifest.layers]
        self._start = start_bytes
        self._end_bytes = start_bytes + self.bytes_total
        self._bytes_done = 0
        self.gate.land(bisect.bisect_right(self._ends, start_bytes))
        self._backed_bytes = region.mapped_bytes - arrival_offset_bytes
        """Of the image's bytes, those that have a place to arrive at."""
        if copy_bytes_max is not None:
            self.copy_bytes_max = copy_bytes_max
        self._paused = False
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._error: SwapError | None = None
        name = f"transfer {manifest.digest[:12]}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def bytes_done(self) -> int:
        return self._bytes_done

    @property
    def landed_bytes(self) -> int:
        """Where the weights end that are there."""
        return self._start + self._bytes_done

    @property
    def complete(self) -> bool:
        """Whether every layer has landed."""
        return self.gate.landed_layers == len(self._manifest.layers)

    def backed(self, size_bytes: int) -> None:
        """The region's first `size_bytes` are mapped by now."""
        with self._changed:
            self._backed_bytes = size_bytes - self._arrival_offset
            self._changed.notify()

    def start(self) -> None:
        """Begin copying in the background. Once only."""
        self._thread.start()

    def cancel(self) -> None:
        """Stop after the copy call under way; no effect on a transfer that has ended."""
        with self._changed:
            self._cancelled.set()
            self._changed.notify()

    def pause(self, paused: bool) -> None:
        """Begin no further copy call until this is called again with False."""
        with self._changed:
            self._paused = paused
            self._changed.notify()

    def join(self) -> None:
        """Wait for the end. Raises TransferFailed or TransferCancelled.

        When it has returned or raised, nothing is being copied any more.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._copy_image()
        except (TransferCancelled, CorruptWeights) as error:
            self._end(error)
        except BaseException as error:  # whatever it is, the waiting step loop must hear of it
            failure = TransferFailed(
                f"copying image {self._manifest.digest[:12]} to the device failed: {error}",
                bytes_done=self._bytes_done,
                bytes_total=self.bytes_total,
            )
            failure.__cause__ = error
            self._end(failure)
        finally:
            self.turn.end()
            self.seconds = time.monotonic() - started - self.turn.waited_s

    def _copy_image(self) -> None:
        """Issue copies ahead of the one that is waited for, as far as the device lets them."""
        self._reached("copying", self._cancelled)
        issued: collections.deque[tuple[int, int]] = collections.deque()
        start = self._start
        while issued or start < self._end_bytes:
            room = self._room(start, wait=not issued)
            if room and len(issued) <= self._copies_ahead:
                issued.append(self._issue(start, min(self.copy_bytes_max, room)))
                start = issued[-1][1]
            else:
                copy, end = issued.popleft()
                self._device.wait(copy)
                self._bytes_done = end - self._start
                self._arrived(end)
                if not issued:
                    self.turn.pause()

    def _arrived(self, end: int) -> None:
        """The image's bytes up to `end` are there: let complete layers be used."""
        self.gate.land(bisect.bisect_right(self._ends, end) - self.gate.landed_layers)

    def _room(self, start: int, *, wait: bool) -> int:
        """Bytes that can be copied from `start` on.

        With `wait` none only when everything was begun; a cancelled transfer waits for nothing.
        """
        with self._changed:
            if wait and start < self._end_bytes:
                self._changed.wait_for(
                    lambda: (
                        (self._backed_bytes > start and not self._paused)
                        or self._cancelled.is_set()
                    )
                )
            if self._paused and not self._cancelled.is_set():
                return 0
            backed = self._end_bytes if self._cancelled.is_set() else self._backed_bytes
            return max(min(backed, self._end_bytes) - start, 0)

    def _issue(self, start: int, count: int) -> tuple[int, int]:
        """Begin to copy a stretch; returns the copy's number and where the stretch ends."""
        waiting = self.turn.waiting
        self.turn.take(self._cancelled)
        if waiting:
            self._under_way()
        if self._cancelled.is_set():
            raise self._cancellation()
        copy = self._device.copy_in(self._destination + start, self._source + start, count)
        return copy, start + count

    def _cancellation(self) -> TransferCancelled:
        return TransferCancelled(
            f"the transfer of image {self._manifest.digest[:12]} was cancelled after "
            f"{self._bytes_done} of {self.bytes_total} bytes",
            bytes_done=self._bytes_done,
            bytes_total=self.bytes_total,
        )

    def _end(self, error: SwapError) -> None:
        try:
            # Copies issued before the end must not outlive the transfer.
            self._device.synchronize()
        except SwapError as unfinished:
            error.add_note(f"waiting for its copies failed too: {unfinished}")
        self._error = error
        self.gate.fail(error)


def measure_link(
    pool: PagePool, copy_bytes: int, link: Link | None = None, *, outward: bool = False
) -> float:
    """The rate of copies to the device, or `outward` from it, in bytes per second: the best of
    LINK_COPIES whole ones.

    The best, since it is a limit that is asked for: what else the host does makes copies slower and
    never faster, so that a median would be of the neighbours' load as well. Uses free pages of the
    pool (fewer bytes when fewer are free) and a segment like those images live in, both made
    present first; small copies measure the caches rather than the link. Each is a piece in the
    background where the link is shared. Raises InsufficientDeviceMemory when not one page is free.
    """
    device = pool.device
    turn = (link if link is not None else OwnLink()).turn(background=True)
    pages = max(1, min(pool.pages_for(copy_bytes), pool.free_pages))
    size = min(copy_bytes, pages * pool.page_bytes)
    region = Region(pool, "link measurement", pages * pool.page_bytes)
    try:
        region.grow(pages)
        device.prefault(region.pages)
        with (
            Segment.create(size, "link measurement") as segment,
            segment.map_for_filling(huge_pages=False) if outward else segment.map() as host,
        ):
            device.register(host.address, size, writable=outward)
            try:
                seconds = [
                    _copy_s(device, region.address, host.address, size, turn, outward)
                    for _ in range(1 + LINK_COPIES)
                ][1:]
            finally:
                device.unregister(host.address)
    finally:
        region.release()
    return size / min(seconds)


def _copy_s(
    device: DeviceMemory, address: int, host: int, size: int, turn: Turn, outward: bool
) -> float:
    turn.take(threading.Event())
    try:
        started = time.monotonic()
        if outward:
            device.copy_out_rows(host, address, size, 1, size)  # as KV is parked
        else:
            device.copy_in(address, host, size)
        device.synchronize()
        return time.monotonic() - started
    finally:
        turn.end()
