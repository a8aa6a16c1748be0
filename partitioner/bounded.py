"""NVML with a deadline: every call runs in one thread of its own and is waited for only so long.

It owns that thread and its bounded queue. It never lets a stuck driver stop its caller, and never
calls the library from two threads at once. The invariant: every method returns or raises within the
deadline, whatever the driver does. A call that is stuck cannot be ended from here; while it lasts,
others are refused at once, and when it returns after all its late answer is dropped and service
goes on.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from partitioner.errors import NvmlBusyError, NvmlClosedError, NvmlTimeoutError
from partitioner.geometry import Geometry, Instance
from partitioner.gpu import Gpu, NvmlDriver, Telemetry
from partitioner.nvml import PynvmlReader
from partitioner.nvml_gate import NvmlGate
from partitioner.nvml_health import HealthReadings
from partitioner.readings import GpuReadings

# Look-ups of seconds are normal under load; a driver that is silent for this long is stuck.
DEFAULT_DEADLINE_S = 30.0
MAX_WAITING_CALLS = 64

Result = TypeVar("Result")
_Job = tuple[str, Callable[[], Any], "Future[Any]"]


class CallThread:
    """Runs calls one after the other in a daemon thread, which never keeps the process alive."""

    def __init__(
        self,
        name: str,
        deadline_s: float = DEFAULT_DEADLINE_S,
        max_waiting: int = MAX_WAITING_CALLS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if deadline_s <= 0 or max_waiting < 1:
            raise ValueError("deadline_s must be above 0 and max_waiting at least 1")
        self._name = name
        self._deadline_s = deadline_s
        self._max_waiting = max_waiting
        self._clock = clock
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._running: tuple[str, float] | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    async def call(self, what: str, function: Callable[[], Result]) -> Result:
        """Run `function` in the thread; `what` names it. Cancelling ends the waiting only."""
        future = asyncio.wrap_future(self._submit(what, function))
        try:
            done, _ = await asyncio.wait({future}, timeout=self._deadline_s)
            if not done:
                raise self._timeout(what)
            return future.result()
        finally:
            future.cancel()

    def stop(self) -> None:
        """End the thread after the call it is in; calls that still wait are refused."""
        with self._changed:
            self._stopped = True
            waiting = [future for _, _, future in self._jobs]
            self._jobs.clear()
            self._changed.notify_all()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(NvmlClosedError(f"{self._name}: closed while a call waited"))

    def _submit(self, what: str, function: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        with self._changed:
            if self._stopped:
                raise NvmlClosedError(f"{self._name}: {what} came after closing")
            if self._running is not None and self._clock() - self._running[1] > self._deadline_s:
                raise self._timeout(what)
            # Whoever gave up waiting has cancelled its call: such calls take no room.
            self._jobs = deque(job for job in self._jobs if not job[2].cancelled())
            if len(self._jobs) >= self._max_waiting:
                raise NvmlBusyError(
                    f"{self._name}: {what} refused, {self._max_waiting} calls wait already; "
                    "try again later"
                )
            self._jobs.append((what, function, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return future

    def _timeout(self, what: str) -> NvmlTimeoutError:
        running = self._running
        stuck = f"{running[0]} has not returned" if running else "it has not returned in time"
        return NvmlTimeoutError(
            f"{self._name}: {what} gave up after {self._deadline_s:g} s: {stuck}; the driver may "
            "be stuck: look at its kernel log (dmesg)"
        )

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._stopped:
                    self._changed.wait()
                if not self._jobs:
                    return
                what, function, future = self._jobs.popleft()
                self._running = (what, self._clock())
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # Handed to the caller, who raises it.
                    future.set_exception(error)
            with self._changed:
                self._running = None


class BoundedNvml:
    """An `NvmlDriver` for asyncio, with deadlines.

    A change that misses its deadline may still be made later: who meant it must read again.

    Nothing happens until the first call, which opens the library; where that fails the call raises
    `NvmlUnavailableError` and the next one tries again.
    """

    def __init__(
        self,
        open_reader: Callable[[], NvmlDriver] = PynvmlReader,
        deadline_s: float = DEFAULT_DEADLINE_S,
        max_waiting: int = MAX_WAITING_CALLS,
        gate: NvmlGate | None = None,
    ) -> None:
        self._open_reader = open_reader
        self.gate = gate or NvmlGate()
        """For whoever else opens NVML in this process; the reader's own."""
        self._reader: NvmlDriver | None = None
        self._calls = CallThread("NVML", deadline_s, max_waiting)

    async def discover(self) -> tuple[Gpu, ...]:
        """List every GPU; see `NvmlReader.discover`."""
        return await self._calls.call("discover", lambda: self._opened().discover())

    async def telemetry(self, uuid: str, generation: int) -> Telemetry:
        """Read one GPU; see `NvmlReader.telemetry`."""
        what = f"telemetry of {uuid}"
        return await self._calls.call(what, lambda: self._opened().telemetry(uuid, generation))

    async def readings(self) -> tuple[GpuReadings, ...]:
        """Read every GPU for monitoring; see `PynvmlReader.readings`."""
        return await self._calls.call("readings", lambda: self._opened().readings())

    async def health(self, uuid: str) -> HealthReadings:
        """What the driver tells of a GPU's health; see `NvmlReader.health`."""
        return await self._calls.call(f"health of {uuid}", lambda: self._opened().health(uuid))

    async def geometry(self, uuid: str, generation: int) -> Geometry:
        """What instances a board allows; see `NvmlReader.geometry`."""
        what = f"geometry of {uuid}"
        return await self._calls.call(what, lambda: self._opened().geometry(uuid, generation))

    async def invalidate(self, uuid: str) -> int:
        """Move a GPU's generation on; see `NvmlReader.invalidate`."""
        return await self._calls.call(f"invalidate {uuid}", lambda: self._opened().invalidate(uuid))

    async def reread(self, uuid: str) -> Gpu:
        """Read one GPU; see `NvmlDriver.reread`."""
        return await self._calls.call(f"reread {uuid}", lambda: self._opened().reread(uuid))

    async def set_mig_mode(
        self, uuid: str, generation: int, enabled: bool, *, may_wait: bool = False
    ) -> None:
        """Switch MIG mode; see `NvmlDriver.set_mig_mode`."""
        await self._calls.call(
            f"MIG mode of {uuid}",
            lambda: self._opened().set_mig_mode(uuid, generation, enabled, may_wait=may_wait),
        )

    async def reset_gpu(self, uuid: str, generation: int) -> None:
        """Reset a GPU; see `NvmlDriver.reset_gpu`."""
        await self._calls.call(
            f"resetting {uuid}", lambda: self._opened().reset_gpu(uuid, generation)
        )

    async def create_instance(self, uuid: str, generation: int, place: Instance) -> None:
        """Create an instance; see `NvmlDriver.create_instance`."""
        await self._calls.call(
            f"creating {place} on {uuid}",
            lambda: self._opened().create_instance(uuid, generation, place),
        )

    async def complete_instance(
        self, uuid: str, generation: int, number: int, place: Instance
    ) -> None:
        """Create a missing compute instance; see `NvmlDriver.complete_instance`."""
        await self._calls.call(
            f"completing {place} on {uuid}",
            lambda: self._opened().complete_instance(uuid, generation, number, place),
        )

    async def destroy_instance(
        self, uuid: str, generation: int, number: int, place: Instance
    ) -> None:
        """Destroy an instance; see `NvmlDriver.destroy_instance`."""
        await self._calls.call(
            f"destroying {place} on {uuid}",
            lambda: self._opened().destroy_instance(uuid, generation, number, place),
        )

    async def close(self) -> None:
        """Let go of the library. One that is stuck is abandoned. Closing twice is allowed."""
        try:
            with suppress(NvmlTimeoutError, NvmlBusyError, NvmlClosedError):
                await self._calls.call("close", self._close_reader)
        finally:
            self._calls.stop()

    def _opened(self) -> NvmlDriver:
        """Return the reader, opened now if need be. Runs in the call thread only."""
        if self._reader is None:
            self._reader = self._open_reader()
        return self._reader

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
