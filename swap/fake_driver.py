"""The CUDA driver's calls over host memory, with the driver's rules enforced.

It owns the context, the registrations of host memory, and what runs: copies, and what tests
`launch` as kernels, run later, on their stream's thread. It never corrects a caller: what breaks a
rule is answered with the code that the driver gives, and what the driver leaves undefined
(unmapping or unpinning under a running copy or kernel) with the code that such a thing ends in.
Invariant: `holdings` is all zeros once everything was given back.
"""

from __future__ import annotations

import collections
import ctypes
import threading
from dataclasses import dataclass, field

from swap.cuda_driver import (
    ALREADY_REGISTERED,
    DEFAULT_STREAM,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_VALUE,
    NOT_INITIALIZED,
    NOT_REGISTERED,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    DriverError,
    Rows,
)
from swap.device import Clock, SystemClock
from swap.fake_memory import GRANULARITY_BYTES, FakeMemory, overlap
from swap.fake_streams import FakeStreams, Work

ILLEGAL_ADDRESS = "CUDA_ERROR_ILLEGAL_ADDRESS"
PITCH_BYTES_MAX = (1 << 31) - 1
_GPU, _CONTEXT = 0, 0x5EED


@dataclass
class _Copy:
    device: tuple[int, int]
    host: tuple[int, int]


@dataclass
class Refusals:
    """Failures to be had on purpose, until they are unset again."""

    create_from: int | None = None
    """From this call of cuMemCreate on, counted from 1, the GPU has no memory left."""
    register: bool = False
    """The system does not let host memory be locked."""
    read_only: bool = False
    """The GPU does not register memory that is mapped for reading only."""
    codes: dict[str, str] = field(default_factory=dict)
    """Code with which the next call of that name fails, once."""


class FakeDriver:
    """See `swap.cuda_driver.Driver`. With `link_bytes_per_s` copies take their time on `clock`."""

    def __init__(
        self,
        memory_bytes: int = 1 << 40,
        *,
        link_bytes_per_s: float | None = None,
        clock: Clock | None = None,
        unmaps_ranges: bool = True,
        pitch_bytes_max: int = PITCH_BYTES_MAX,
        multiprocessors: int = 132,
    ) -> None:
        self.refuse = Refusals()
        self.calls: collections.Counter[str] = collections.Counter()
        """How often each call was made, by its name."""
        self._link_bytes_per_s = link_bytes_per_s
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._memory = FakeMemory(memory_bytes)
        self._memory.unmaps_ranges = unmaps_ranges
        self._pitch_bytes_max = pitch_bytes_max
        self._multiprocessors = multiprocessors
        self._initialised = False
        self._contexts = 0
        self._current = threading.local()
        self._lock = threading.RLock()
        self._registered: dict[int, tuple[int, bool]] = {}
        self._copies: list[_Copy] = []
        self._streams = FakeStreams(DEFAULT_STREAM)

    def holdings(self) -> dict[str, int]:
        """What was taken and not given back."""
        with self._lock:
            return {
                "contexts": self._contexts,
                **self._memory.holdings(),
                "registrations": len(self._registered),
                "streams": self._streams.streams,
                "events": self._streams.events,
            }

    def launch(self, work: Work) -> None:
        """Run something on the default stream, as a kernel would."""
        with self._lock:
            self._streams.issue(DEFAULT_STREAM, work, "cuLaunchKernel")

    def close(self) -> None:
        """End the threads and free the memory: the end of the fake GPU, not a driver's call."""
        self._streams.end()
        self._memory.close()

    # The device and its context.

    def init(self) -> None:
        self._initialised = True

    def device_get(self, ordinal: int) -> int:
        if not self._initialised:
            raise DriverError("cuDeviceGet", NOT_INITIALIZED)
        if ordinal != _GPU:
            raise DriverError("cuDeviceGet", INVALID_DEVICE)
        return _GPU

    def primary_context_retain(self, device: int) -> int:
        with self._lock:
            self._check_device("cuDevicePrimaryCtxRetain", device)
            self._contexts += 1
            return _CONTEXT

    def primary_context_release(self, device: int) -> None:
        with self._lock:
            self._check_device("cuDevicePrimaryCtxRelease", device)
            if not self._contexts:
                raise DriverError("cuDevicePrimaryCtxRelease", INVALID_CONTEXT)
            self._contexts -= 1

    def context_set_current(self, context: int) -> None:
        with self._lock:
            if context != _CONTEXT or not self._contexts:
                raise DriverError("cuCtxSetCurrent", INVALID_CONTEXT)
        self._current.context = context

    # Memory.

    def granularity(self, device: int) -> int:
        self._check_device("cuMemGetAllocationGranularity", device)
        return GRANULARITY_BYTES

    def multiprocessors(self, device: int) -> int:
        self._check_device("cuDeviceGetAttribute", device)
        return self._multiprocessors

    def pitch_bytes_max(self, device: int) -> int:
        self._check_device("cuDeviceGetAttribute", device)
        return self._pitch_bytes_max

    def mem_address_reserve(self, size_bytes: int, alignment_bytes: int) -> int:
        with self._lock:
            self._enter("cuMemAddressReserve")
            return self._memory.reserve(size_bytes, alignment_bytes)

    def mem_address_free(self, address: int, size_bytes: int) -> None:
        with self._lock:
            self._enter("cuMemAddressFree")
            self._memory.free(address, size_bytes)

    def mem_create(self, size_bytes: int, device: int) -> int:
        with self._lock:
            self._enter("cuMemCreate")
            self._check_device("cuMemCreate", device)
            refused = self.refuse.create_from
            if refused is not None and self.calls["cuMemCreate"] >= refused:
                raise DriverError("cuMemCreate", OUT_OF_MEMORY)
            return self._memory.create(size_bytes)

    def mem_release(self, handle: int) -> None:
        with self._lock:
            self._enter("cuMemRelease")
            self._memory.release(handle)

    def mem_map(self, address: int, size_bytes: int, handle: int) -> None:
        with self._lock:
            self._enter("cuMemMap")
            self._memory.map(address, size_bytes, handle)

    def mem_set_access(self, address: int, size_bytes: int, device: int) -> None:
        with self._lock:
            self._enter("cuMemSetAccess")
            self._check_device("cuMemSetAccess", device)
            self._memory.set_access(address, size_bytes)

    def mem_unmap(self, address: int, size_bytes: int) -> None:
        with self._lock:
            self._enter("cuMemUnmap")
            range_ = (address, address + size_bytes)
            used = any(overlap(one.device, range_) for one in self._copies)
            if used or not self._streams.idle(DEFAULT_STREAM):
                raise DriverError("cuMemUnmap", ILLEGAL_ADDRESS)
            self._memory.unmap(address, size_bytes)

    # Host memory.

    def host_register(self, address: int, size_bytes: int, *, read_only: bool) -> None:
        with self._lock:
            self._enter("cuMemHostRegister")
            if size_bytes <= 0 or not _is_mapped(address, size_bytes, writable=not read_only):
                raise DriverError("cuMemHostRegister", INVALID_VALUE)
            taken = self._registrations(address, size_bytes)
            if taken:
                raise DriverError("cuMemHostRegister", ALREADY_REGISTERED)
            if read_only and self.refuse.read_only:
                raise DriverError("cuMemHostRegister", NOT_SUPPORTED)
            if self.refuse.register:
                raise DriverError("cuMemHostRegister", OUT_OF_MEMORY)
            self._registered[address] = (size_bytes, read_only)

    def host_unregister(self, address: int) -> None:
        with self._lock:
            self._enter("cuMemHostUnregister")
            if address not in self._registered:
                raise DriverError("cuMemHostUnregister", NOT_REGISTERED)
            end = address + self._registered[address][0]
            if any(overlap(one.host, (address, end)) for one in self._copies):
                raise DriverError("cuMemHostUnregister", ILLEGAL_ADDRESS)
            del self._registered[address]

    def memcpy_to_device(self, destination: int, source: int, size: int, stream: int) -> None:
        shape = Rows(destination, size, source, size, 1)
        self._issue("cuMemcpyHtoDAsync", shape, stream, to_host=False)

    def memcpy_to_host(self, destination: int, source: int, size: int, stream: int) -> None:
        shape = Rows(source, size, destination, size, 1)
        self._issue("cuMemcpyDtoHAsync", shape, stream, to_host=True)

    def memcpy_rows(self, shape: Rows, stream: int, *, to_host: bool) -> None:
        if not shape.row_bytes <= shape.pitch_bytes <= self._pitch_bytes_max:
            raise DriverError("cuMemcpy2DAsync", INVALID_VALUE)
        self._issue("cuMemcpy2DAsync", shape, stream, to_host=to_host)

    # Streams and events.

    def stream_create(self) -> int:
        with self._lock:
            self._enter("cuStreamCreate")
            return self._streams.create_stream()

    def stream_synchronize(self, stream: int) -> None:
        with self._lock:
            self._enter("cuStreamSynchronize")
            wait = self._streams.wait_for_stream(stream)
        wait()

    def stream_wait_event(self, stream: int, event: int) -> None:
        with self._lock:
            self._enter("cuStreamWaitEvent")
            self._streams.wait_behind(stream, event)

    def stream_destroy(self, stream: int) -> None:
        with self._lock:
            self._enter("cuStreamDestroy")
        self._streams.destroy_stream(stream)

    def event_create(self) -> int:
        with self._lock:
            self._enter("cuEventCreate")
            return self._streams.create_event()

    def event_record(self, event: int, stream: int) -> None:
        with self._lock:
            self._enter("cuEventRecord")
            self._streams.record(event, stream)

    def event_done(self, event: int) -> bool:
        with self._lock:
            self._enter("cuEventQuery")
            return self._streams.event_done(event)

    def event_synchronize(self, event: int) -> None:
        with self._lock:
            self._enter("cuEventSynchronize")
            wait = self._streams.wait_for_event(event)
        wait()

    def event_destroy(self, event: int) -> None:
        with self._lock:
            self._enter("cuEventDestroy")
            self._streams.destroy_event(event)

    # Inside, with the lock held.

    def _issue(self, call: str, shape: Rows, stream: int, *, to_host: bool) -> None:
        with self._lock:
            self._enter(call)
            pitch, host, size = shape.pitch_bytes, shape.host, shape.row_bytes * shape.rows
            span = (shape.rows - 1) * pitch + shape.row_bytes
            copy = _Copy((shape.device, shape.device + span), (host, host + size))
            if size <= 0 or not self._memory.accessible(shape.device, span):
                raise DriverError(call, INVALID_VALUE)
            for start in self._registrations(host, size):
                length, read_only = self._registered[start]
                inside = start <= host and host + size <= start + length
                if not inside or (to_host and read_only):
                    raise DriverError(call, INVALID_VALUE)

            def work() -> None:
                for row in range(shape.rows):
                    into, out_of = shape.device + row * pitch, host + row * shape.row_bytes
                    if to_host:
                        into, out_of = out_of, into
                    ctypes.memmove(into, out_of, shape.row_bytes)
                if self._link_bytes_per_s is not None:
                    self._clock.sleep(size / self._link_bytes_per_s)
                with self._lock:
                    self._copies.remove(copy)

            self._streams.issue(stream, work, call)
            self._copies.append(copy)

    def _enter(self, call: str) -> None:
        self.calls[call] += 1
        code = self.refuse.codes.pop(call, None)
        if code is not None:
            raise DriverError(call, code)
        if getattr(self._current, "context", None) is None or not self._contexts:
            raise DriverError(call, INVALID_CONTEXT)

    def _check_device(self, call: str, device: int) -> None:
        if not self._initialised:
            raise DriverError(call, NOT_INITIALIZED)
        if device != _GPU:
            raise DriverError(call, INVALID_DEVICE)

    def _registrations(self, address: int, size_bytes: int) -> list[int]:
        wanted = (address, address + size_bytes)
        return [
            start
            for start, (length, _) in self._registered.items()
            if overlap((start, start + length), wanted)
        ]


def _is_mapped(address: int, size_bytes: int, *, writable: bool) -> bool:
    """Whether this process has memory at all of these addresses, as its memory map says."""
    reached = address
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        for line in file:
            bounds, access = line.split(None, 2)[:2]
            start, end = (int(part, 16) for part in bounds.split("-"))
            if start <= reached < end and access[0] == "r" and (access[1] == "w" or not writable):
                reached = end
    return reached >= address + size_bytes
