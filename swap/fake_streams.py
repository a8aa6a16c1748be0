"""Streams and events of the fake driver: work that runs in order, each stream on a thread.

It owns the order of what was issued and the moments at which events are reached. It never knows
what the work does. Invariant: work of one stream runs one piece after the other, in the order of
issue, and not before `issue` was called nor in the caller's thread: whoever reads a result without
waiting reads too early.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from swap.cuda_driver import INVALID_HANDLE, DriverError

Work = Callable[[], None]


class _Stream:
    """One stream; its thread starts with the first work."""

    def __init__(self) -> None:
        self.issued = 0
        self.done = 0
        self.changed = threading.Condition()
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def issue(self, work: Work) -> None:
        self.issued += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fake stream", daemon=True)
            self._thread.start()
        self._work.put(work)

    def wait(self, position: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.done >= position)

    def end(self) -> None:
        """Return once all work is done and the thread has ended."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            with self.changed:
                self.done += 1
                self.changed.notify_all()


class FakeStreams:
    """All streams and events of a fake driver. Calls come under the driver's lock, waits do not.

    `default` is there from the start; it is the one that kernels are launched on.
    """

    def __init__(self, default: int) -> None:
        self._default = default
        self._streams: dict[int, _Stream] = {default: _Stream()}
        self._events: dict[int, tuple[_Stream, int] | None] = {}
        self._next = 1 << 12

    @property
    def streams(self) -> int:
        """How many were created and not destroyed."""
        return len(self._streams) - 1

    @property
    def events(self) -> int:
        return len(self._events)

    def create_stream(self) -> int:
        self._next += 1
        self._streams[self._next] = _Stream()
        return self._next

    def destroy_stream(self, number: int) -> None:
        """Work that was issued is still done, as it is by the driver."""
        if number == self._default:
            raise DriverError("cuStreamDestroy", INVALID_HANDLE)
        self._stream(number, "cuStreamDestroy").end()
        del self._streams[number]

    def issue(self, number: int, work: Work, call: str) -> None:
        self._stream(number, call).issue(work)

    def wait_for_stream(self, number: int) -> Work:
        """Something to call without the lock that returns once all work issued so far is done."""
        stream = self._stream(number, "cuStreamSynchronize")
        position = stream.issued
        return lambda: stream.wait(position)

    def wait_behind(self, number: int, event: int) -> None:
        """Have a stream's later work wait for what the event stands for now."""
        recorded = self._event(event, "cuStreamWaitEvent")
        stream = self._stream(number, "cuStreamWaitEvent")
        if recorded is not None:
            behind, position = recorded
            stream.issue(lambda: behind.wait(position))

    def idle(self, number: int) -> bool:
        stream = self._stream(number, "cuStreamQuery")
        return stream.done >= stream.issued

    def create_event(self) -> int:
        self._next += 1
        self._events[self._next] = None
        return self._next

    def destroy_event(self, number: int) -> None:
        self._event(number, "cuEventDestroy")
        del self._events[number]

    def record(self, number: int, stream: int) -> None:
        self._event(number, "cuEventRecord")
        recorded = self._stream(stream, "cuEventRecord")
        self._events[number] = (recorded, recorded.issued)

    def event_done(self, number: int) -> bool:
        """An event that was never recorded counts as reached."""
        event = self._event(number, "cuEventQuery")
        return event is None or event[0].done >= event[1]

    def wait_for_event(self, number: int) -> Work:
        """Something to call without the lock that returns once the event is reached."""
        event = self._event(number, "cuEventSynchronize")
        return lambda: event[0].wait(event[1]) if event is not None else None

    def end(self) -> None:
        """End every thread, once its work is done."""
        for stream in self._streams.values():
            stream.end()

    def _stream(self, number: int, call: str) -> _Stream:
        if number not in self._streams:
            raise DriverError(call, INVALID_HANDLE)
        return self._streams[number]

    def _event(self, number: int, call: str) -> tuple[_Stream, int] | None:
        if number not in self._events:
            raise DriverError(call, INVALID_HANDLE)
        return self._events[number]
