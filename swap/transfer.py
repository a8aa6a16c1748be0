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
import statistics
import threading
import time

from swap.arena import PagePool, Region
from swap.device import DeviceMemory
from swap.errors import DeviceMisuse, SwapError, TransferCancelled, TransferFailed
from swap.image import Manifest
from swap.segment import Mapping, Segment

# Within some 5 % a copy's rate is the same from 16 MiB to 1 GiB a call. After each call the thread
# needs the interpreter's lock, for which a busy thread lets it wait up to the switch interval (5 ms
# unless set lower): so calls are few and long, across layers where those are small. It is also
# what a cancelled transfer finishes first, with those that the device lets wait behind it.
COPY_BYTES_MAX = 64 << 20
LINK_COPIES = 5


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

    With `growing` pages may be mapped later: it waits for them, and is told of each by `backed`.
    Raises DeviceMisuse when the region is too small, or the source smaller than the image.
    """

    def __init__(
        self,
        device: DeviceMemory,
        manifest: Manifest,
        source: Mapping,
        region: Region,
        *,
        growing: bool = False,
    ) -> None:
        needed = manifest.weights_bytes
        room = region.pages_max * device.page_bytes if growing else region.mapped_bytes
        if room < needed or source.size_bytes < needed:
            raise DeviceMisuse(
                f"image {manifest.digest[:12]} has {needed} bytes of weights; its region has "
                f"{region.mapped_bytes} bytes mapped and its source {source.size_bytes}"
            )
        self.gate = LayerGate(tuple(span.layer for span in manifest.layers))
        self.bytes_total = needed
        self.seconds = 0.0
        """How long copying took, once it has ended."""
        self._device = device
        self._manifest = manifest
        self._source = source.address
        self._destination = region.address
        self._bytes_done = 0
        self._backed_bytes = region.mapped_bytes
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        self._error: SwapError | None = None
        name = f"transfer {manifest.digest[:12]}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def bytes_done(self) -> int:
        return self._bytes_done

    @property
    def complete(self) -> bool:
        """Whether every layer has landed."""
        return self.gate.landed_layers == len(self._manifest.layers)

    def backed(self, size_bytes: int) -> None:
        """The region's first `size_bytes` are mapped by now."""
        with self._changed:
            self._backed_bytes = size_bytes
            self._changed.notify()

    def start(self) -> None:
        """Begin copying in the background. Once only."""
        self._thread.start()

    def cancel(self) -> None:
        """Stop after the copy call under way; no effect on a transfer that has ended."""
        with self._changed:
            self._cancelled.set()
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
            ends = [span.offset_bytes + span.bytes for span in self._manifest.layers]
            issued: collections.deque[tuple[int, int]] = collections.deque()
            start = 0
            while issued or start < self.bytes_total:
                room = self._room(start, wait=not issued)
                if room and len(issued) <= self._device.copies_ahead:
                    issued.append(self._issue(start, min(COPY_BYTES_MAX, room)))
                    start = issued[-1][1]
                else:
                    self._land(ends, *issued.popleft())
        except TransferCancelled as error:
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
            self.seconds = time.monotonic() - started

    def _room(self, start: int, *, wait: bool) -> int:
        """Bytes that can be copied from `start` on.

        With `wait` none only when everything was begun; a cancelled transfer waits for nothing.
        """
        with self._changed:
            if wait and start < self.bytes_total:
                self._changed.wait_for(
                    lambda: self._backed_bytes > start or self._cancelled.is_set()
                )
            backed = self.bytes_total if self._cancelled.is_set() else self._backed_bytes
            return max(min(backed, self.bytes_total) - start, 0)

    def _issue(self, start: int, count: int) -> tuple[int, int]:
        """Begin to copy a stretch; returns the copy's number and where the stretch ends."""
        if self._cancelled.is_set():
            raise TransferCancelled(
                f"the transfer of image {self._manifest.digest[:12]} was cancelled after "
                f"{self._bytes_done} of {self.bytes_total} bytes",
                bytes_done=self._bytes_done,
                bytes_total=self.bytes_total,
            )
        copy = self._device.copy_in(self._destination + start, self._source + start, count)
        return copy, start + count

    def _land(self, ends: list[int], copy: int, end: int) -> None:
        """Wait for a stretch, and let its complete layers be used."""
        self._device.wait(copy)
        self._bytes_done = end
        self.gate.land(bisect.bisect_right(ends, end) - self.gate.landed_layers)

    def _end(self, error: SwapError) -> None:
        try:
            # Copies issued before the end must not outlive the transfer.
            self._device.synchronize()
        except SwapError as unfinished:
            error.add_note(f"waiting for its copies failed too: {unfinished}")
        self._error = error
        self.gate.fail(error)


def measure_link(pool: PagePool, copy_bytes: int) -> float:
    """The device's copy rate in bytes per second: the median of LINK_COPIES whole copies.

    Uses free pages of the pool (fewer bytes when fewer are free) and a segment like those images
    live in, both made present first; small copies measure the caches rather than the link. Raises
    InsufficientDeviceMemory when not one page is free.
    """
    device = pool.device
    pages = max(1, min(pool.pages_for(copy_bytes), pool.free_pages))
    size = min(copy_bytes, pages * pool.page_bytes)
    region = Region(pool, "link measurement", pages * pool.page_bytes)
    try:
        region.grow(pages)
        device.prefault(region.pages)
        with Segment.create(size, "link measurement") as segment, segment.map() as source:
            device.register(source.address, size)
            try:
                rates = [_rate(device, region.address, source.address, size)]
                rates = [
                    _rate(device, region.address, source.address, size) for _ in range(LINK_COPIES)
                ]
            finally:
                device.unregister(source.address)
    finally:
        region.release()
    return statistics.median(rates)


def _rate(device: DeviceMemory, destination: int, source: int, size: int) -> float:
    started = time.monotonic()
    device.copy_in(destination, source, size)
    device.synchronize()
    return size / (time.monotonic() - started)
