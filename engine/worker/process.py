"""A worker's process from its first socket to its last: how its parts are connected.

Owns the order of starting and ending. It never does the work of a part. Invariant: when the sockets
can be connected to, the worker can serve; and when they are gone, nothing more is taken.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from engine.choose_stepper import choose_stepper
from engine.graphs import CudaGraphs
from engine.worker.calls import Calls
from engine.worker.control_side import ControlSide
from engine.worker.desk import Desk
from engine.worker.failpoints import FailPoint, FailPoints
from engine.worker.garbage import keep_what_is_there
from engine.worker.listener import Listeners
from engine.worker.loop import StepLoop
from engine.worker.options import Options
from engine.worker.residency import Residency
from engine.worker.residue import check_reserve, process_bytes
from engine.worker.token_side import TokenSide
from engine.workspace import Workspace
from swap.arena import PagePool
from swap.cuda_device import CudaDevice
from swap.device import DeviceMemory
from swap.errors import SwapError
from swap.host_device import HostDevice
from swap.shared_link import Link, OwnLink, SharedLink
from swap.transfer import measure_link

MEASURE_BYTES = 64 << 20
JOIN_TIMEOUT_S = 1.0
"""How long an ending worker waits for a step under way."""
EXIT_CRASHED = 70

log = logging.getLogger(__name__)


async def serve(options: Options, opened: Callable[[Options], DeviceMemory] | None = None) -> int:
    """Run a worker until it is told to end; returns the process's exit status.

    `opened` gives other memory than the options name: a device over a fake driver.

    Raises PartitionTaken, or DeviceError when there is not as much memory.
    """
    torch.set_num_threads(options.threads)
    listeners = Listeners(options.directory)
    pool = PagePool((opened or open_device)(options))
    worker = _Worker(options, pool)
    try:
        listeners.listen(options.control_socket, worker.control.connected)
        listeners.listen(options.tokens_socket, worker.tokens.connected)
        status = await worker.run()
        # The sockets go first: whoever connects from here on must find nobody.
        await listeners.close()
        await worker.close()
    finally:
        await listeners.close()
    return status


def open_device(options: Options) -> DeviceMemory:
    """The memory that the options name; of a GPU all but the workspace.

    Raises DeviceError when there is no such device.
    """
    if options.device == "host":
        return HostDevice(
            options.pool_bytes,
            page_bytes=options.page_bytes,
            link_bytes_per_s=options.link_bytes_per_s,
        )
    device = CudaDevice(
        options.pool_bytes, page_bytes=options.page_bytes, keep_mappings=options.keep_mappings
    )
    torch.cuda.init()  # type: ignore[no-untyped-call]
    # What torch allocates for itself must not grow into other partitions' memory on the same GPU.
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, options.workspace_bytes / total_bytes))
    return device


def open_link(options: Options) -> Link:
    """The link that the options name, shared with every worker that was given the same name."""
    if not options.link:
        return OwnLink()
    options.link_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The wait is part of the copying stage, whose deadline must leave time for the copy.
    wait_s = min(options.link_wait_s, options.stage_timeout_s / 2)
    return SharedLink(options.link_file, swap_wait_s=wait_s)


def _end_at_once(error: Exception) -> None:
    """End as if killed: no thread that sticks in the device is waited for, and hotbayd starts a
    worker in this one's place, warm."""
    log.critical("the device does not answer, so that this worker ends: %s", error)
    os._exit(EXIT_CRASHED)


class _Worker:
    """The parts of a worker, connected."""

    def __init__(self, options: Options, pool: PagePool) -> None:
        self._events = asyncio.get_running_loop()
        self._pool = pool
        self._workspace_bytes = options.workspace_bytes
        self._ended = asyncio.Event()
        self._status = 0
        self.control = ControlSide()
        desk = Desk(
            send=lambda link, step: self._later(self.tokens.send, link, step),
            drop=lambda link: self._later(self.tokens.drop, link),
        )
        link = open_link(options)
        failpoints = FailPoints(options.failpoints)
        self.residency = Residency(
            pool,
            desk,
            options.step_tokens,
            options.parking_bytes,
            link,
            make_stepper=partial(
                choose_stepper,
                graphs=CudaGraphs() if pool.device.kind == "cuda" else None,
                workspace=Workspace(),
            ),
            prefix_cache=options.prefix_cache,
            strict=options.strict,
            # A step waits for it, which nothing interrupts: what hangs there fails at once.
            giving_way=lambda: failpoints.reach(FailPoint.GIVING_WAY, lambda: None),
        )
        self.residency.area.open()
        self.residency.link_bytes_per_s = options.link_bytes_per_s or measure_link(
            pool, min(MEASURE_BYTES, options.pool_bytes), link
        )
        self.loop = StepLoop(
            self.residency,
            desk,
            failpoints,
            changed=lambda: self._later(self.control.changed),
            crashed=lambda error: self._later(self._crash),
        )
        self.tokens = TokenSide(self.loop.mailbox, desk, self.residency)
        self.calls = Calls(
            options,
            self.residency,
            self.loop,
            tell=self.control.tell,
            ended=self._ended.set,
            stuck=_end_at_once,
        )
        self.control.calls = self.calls
        self._prefaulting = threading.Thread(target=self._prefault, name="prefault", daemon=True)
        self._stopping = threading.Event()

    async def run(self) -> int:
        """Serve until Shutdown or SIGTERM; returns the exit status."""
        keep_what_is_there()
        self.loop.start()
        self._prefaulting.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._events.add_signal_handler(number, self._terminate)
        log.info(
            "the worker serves %d pages of %d bytes", self._pool.total_pages, self._pool.page_bytes
        )
        await self._ended.wait()
        return self._status

    async def close(self) -> None:
        """End the links and the threads. Memory goes with the process."""
        self._stopping.set()
        await self.control.close()
        await self.tokens.close()
        self.calls.close()
        if not self.loop.join(JOIN_TIMEOUT_S):
            log.error("a step did not end in %g s; it ends with the process", JOIN_TIMEOUT_S)

    def _later(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the event loop call something; from any thread, and after its end too."""
        try:
            self._events.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("the event loop has ended before %s", function)

    def _terminate(self) -> None:
        """SIGTERM: a Shutdown that finishes nothing."""
        self._ending = self._events.create_task(self._end_now())

    async def _end_now(self) -> None:
        try:
            await self.calls.shut_down(0.0)
        except TimeoutError:
            log.error("the step loop is stuck; it ends with the process")
        finally:
            self._ended.set()

    def _crash(self) -> None:
        self._status = EXIT_CRASHED
        self._ended.set()

    def _prefault(self) -> None:
        """Make all memory present and pinned in the background, so that no swap pays for it."""
        try:
            if self._pool.device.kind == "cuda":
                self.residency.area.pin(self._pool.device)
            for page in range(self._pool.total_pages):
                if self._stopping.is_set():
                    return
                self._pool.device.prefault((page,))
            if self._pool.device.kind == "cuda":
                pages_bytes = self._pool.total_pages * self._pool.page_bytes
                check_reserve(process_bytes(os.getpid()), pages_bytes, self._workspace_bytes)
        except SwapError as error:
            # An exchange that needs the page will say the same, and be rolled back.
            log.error("the partition's memory is not all there: %s", error)
