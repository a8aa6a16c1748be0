"""Copies between host memory and a GPU: what was issued, what runs, which host memory is pinned.

It owns the device's two streams, one for each direction of the link, the events that tell of
copies' ends, and the account of registrations, since the driver refuses a copy whose host side lies
in two of them. It never knows what is mapped where, and takes no lock: the device does both.
Invariants: a copy that runs is in the account; of one whose issue failed nothing runs.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from swap.cuda_driver import DEFAULT_STREAM, Driver, Rows
from swap.page_table import rows_span

Direction = Literal["in", "out"]


@dataclass(frozen=True)
class _Copy:
    """A copy that was issued: its event, and the addresses it touches, as (start, end)."""

    event: int
    device: tuple[int, int]
    host: tuple[int, int]
    thread: int


class CudaCopies:
    """The copies of one device, with its context current and its lock held in every call.

    Raises what the driver refuses the streams with, holding nothing then.
    """

    def __init__(self, driver: Driver, device: int) -> None:
        self.registered: dict[int, int] = {}
        """Bytes of pinned host memory, by where it starts."""
        self.copied_bytes = 0
        self._driver = driver
        self._pitch_bytes_max = driver.pitch_bytes_max(device)
        self._copies: dict[int, _Copy] = {}
        self._events: list[int] = []
        self._numbers = itertools.count(1)
        self._streams = {"in": driver.stream_create()}
        try:
            self._streams["out"] = driver.stream_create()
        except BaseException:
            driver.stream_destroy(self._streams["in"])
            raise

    # Issuing.

    def issue(self, direction: Direction, device: int, host: int, size_bytes: int) -> int:
        """Begin to copy behind what was issued before; returns the copy's number."""
        copy = self._call(direction)
        with self._issuing(direction, (device, size_bytes), (host, size_bytes)) as issued:
            for offset, count in self._pieces(host, size_bytes):
                copy(device + offset, host + offset, count)
        return issued[0]

    def issue_rows(
        self,
        direction: Direction,
        device: int,
        host: int,
        row_bytes: int,
        rows: int,
        pitch_bytes: int,
    ) -> int:
        """Begin to copy rows, `pitch_bytes` apart on the device and side by side on the host.

        One call of the driver, but for rows that it cannot take as one: those that are too far
        apart, and those whose host side lies in two registrations.
        """
        size_bytes = rows * row_bytes
        span = (device, rows_span(row_bytes, rows, pitch_bytes))
        as_one = pitch_bytes <= self._pitch_bytes_max and len(self._pieces(host, size_bytes)) == 1
        with self._issuing(direction, span, (host, size_bytes)) as issued:
            if as_one:
                shape = Rows(device, pitch_bytes, host, row_bytes, rows)
                self._driver.memcpy_rows(
                    shape, self._streams[direction], to_host=direction == "out"
                )
            else:
                copy = self._call(direction)
                for row in range(rows):
                    place = host + row * row_bytes
                    for offset, count in self._pieces(place, row_bytes):
                        copy(device + row * pitch_bytes + offset, place + offset, count)
        return issued[0]

    def _call(self, direction: Direction) -> Callable[[int, int, int], None]:
        """The driver's copy, from (device, host, bytes)."""
        stream = self._streams[direction]
        if direction == "in":
            return lambda device, host, count: self._driver.memcpy_to_device(
                device, host, count, stream
            )
        return lambda device, host, count: self._driver.memcpy_to_host(host, device, count, stream)

    @contextlib.contextmanager
    def _issuing(
        self, direction: Direction, device: tuple[int, int], host: tuple[int, int]
    ) -> Iterator[list[int]]:
        """Account for a copy as (start, bytes) of its sides; yields a list that gets its number."""
        stream, issued = self._streams[direction], list[int]()
        event = self._events.pop() if self._events else self._driver.event_create()
        try:
            if direction == "out":
                # Behind what is being computed, without anybody's waiting for that here. What the
                # stream waits for is taken now, so that the event can tell of the copy next.
                self._driver.event_record(event, DEFAULT_STREAM)
                self._driver.stream_wait_event(stream, event)
            yield issued
            self._driver.event_record(event, stream)
        except BaseException:
            # Nothing may run on, unknown to us.
            self._events.append(event)
            self._driver.stream_synchronize(stream)
            raise
        number = next(self._numbers)
        touched, read = (device[0], sum(device)), (host[0], sum(host))
        self._copies[number] = _Copy(event, touched, read, threading.get_ident())
        self.copied_bytes += host[1]
        issued.append(number)

    def _pieces(self, host: int, size_bytes: int) -> list[tuple[int, int]]:
        """(offset, bytes) of a copy's parts, none of which crosses the edge of a registration."""
        edges = {0, size_bytes}
        for start, length in self.registered.items():
            edges.update(
                edge - host for edge in (start, start + length) if 0 < edge - host < size_bytes
            )
        return [(start, stop - start) for start, stop in itertools.pairwise(sorted(edges))]

    # What runs.

    def event_of(self, number: int) -> int | None:
        """The event of a copy that is not known to have ended."""
        copy = self._copies.get(number)
        return copy.event if copy is not None else None

    def of_thread(self, thread: int) -> list[int]:
        """Numbers of a thread's copies that are not known to have ended."""
        return [number for number, one in self._copies.items() if one.thread == thread]

    def running_in(self, side: Literal["device", "host"], start: int, end: int) -> bool:
        """Whether a copy touches addresses of one side now."""
        for number, one in list(self._copies.items()):
            if self._driver.event_done(one.event):
                self.ended(number)
        ranges = (one.device if side == "device" else one.host for one in self._copies.values())
        return any(begin < end and start < stop for begin, stop in ranges)

    @property
    def running(self) -> bool:
        """Whether anything is being copied."""
        return self.running_in("device", 0, 1 << 64)

    def ended(self, number: int) -> None:
        """A copy is complete. Idempotent."""
        copy = self._copies.pop(number, None)
        if copy is not None:
            self._events.append(copy.event)

    def close(self) -> None:
        """Give everything back; nothing may be running."""
        for address in self.registered:
            self._driver.host_unregister(address)
        for event in self._events:
            self._driver.event_destroy(event)
        for stream in self._streams.values():
            self._driver.stream_destroy(stream)
        self.registered, self._events, self._streams = {}, [], {}
