"""What hotbayd can ask a worker to do, call by call.

Owns the translation of each call into work for the step thread or a background thread, and the
answer. It never touches an engine itself and never speaks on a link. Invariant: a call that raises
has changed nothing.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.link import control
from engine.worker.errors import Abandoned, Displaced, InvalidState, OperationInProgress
from engine.worker.images import Image
from engine.worker.loop import StepLoop
from engine.worker.options import Options
from engine.worker.order import Order
from engine.worker.residency import Residency
from engine.worker.supervision import PROGRESS_INTERVAL_S, supervise
from swap.transfer import measure_link

SHUTDOWN_MARGIN_S = 2.0
"""How long an ending worker waits for a step or a stage under way, after the drain."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Calls:
    """The calls of one worker, on the event loop.

    `tell(stage)` passes on an exchange's progress, `ended()` is called once a Shutdown is done,
    `stuck(error)` when a call to the device does not return, which must end the process.
    """

    def __init__(
        self,
        options: Options,
        residency: Residency,
        loop: StepLoop,
        *,
        tell: Callable[[control.StageReached], None],
        ended: Callable[[], None],
        stuck: Callable[[Exception], None],
    ) -> None:
        self._options = options
        self._residency = residency
        self._pool = residency.pool
        self._loop = loop
        self._tell = tell
        self._ended = ended
        self._stuck = stuck
        self._order: Order | None = None
        self._staging: Order | None = None
        self._boot_id = BOOT_ID.read_text(encoding="ascii").strip()
        self._measuring = asyncio.Lock()
        # One thread: attaching maps and faults gigabytes, which is no faster on several.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="background")

    async def serve(self, message: Any, descriptors: list[int]) -> Any:
        """Carry a call out and return its reply. The descriptors are this call's to close."""
        try:
            if isinstance(message, control.AttachImage):
                await self._attach(message, descriptors)
                return control.Done(message.call)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if isinstance(message, control.Describe):
            return self.state(message.call)
        if isinstance(message, control.Exchange):
            return control.Exchanged(message.call, await self._exchange(message))
        if isinstance(message, control.StageWeights):
            return control.Exchanged(message.call, await self._stage(message))
        if isinstance(message, control.MeasureLink):
            return control.LinkMeasured(message.call, *await self._measure(message.copy_bytes))
        if isinstance(message, control.DetachImage):
            await self._detach(message.digest)
        elif isinstance(message, control.Abandon):
            self._abandon(message.operation)
        elif isinstance(message, control.Drain):
            drained = await self._ask(lambda: self._loop.drain(message))
            await asyncio.wrap_future(drained)
        elif isinstance(message, control.Resume):
            await self._ask(lambda: self._residency.resume(message.model))
        else:
            assert isinstance(message, control.Shutdown), message
            try:
                await self.shut_down(message.drain_timeout_s)
            finally:
                self._ended()
        return control.Done(message.call)

    def state(self, call: int = 0) -> control.WorkerState:
        """Who and what the worker is, as of the step thread's last word."""
        options, snapshot = self._options, self._loop.snapshot
        return control.WorkerState(
            call=call,
            protocol=control.PROTOCOL,
            pid=os.getpid(),
            boot_id=self._boot_id,
            partition=options.partition,
            generation=options.generation,
            device=self._pool.device.kind,
            memory_bytes=self._pool.total_pages * self._pool.page_bytes,
            page_bytes=self._pool.page_bytes,
            pages_total=self._pool.total_pages,
            pages_free=snapshot.pages_free,
            link_bytes_per_s=self._residency.link_bytes_per_s,
            images=snapshot.images,
            engines=snapshot.engines,
            exchanging=snapshot.exchanging,
            exchanged=snapshot.exchanged,
        )

    async def shut_down(self, drain_timeout_s: float) -> None:
        """Finish what runs, answer the rest, and end the step loop.

        Raises TimeoutError when the loop is stuck; the process should end all the same.
        """
        async with asyncio.timeout(drain_timeout_s + SHUTDOWN_MARGIN_S):
            done = await self._ask(lambda: self._loop.shut_down(drain_timeout_s))
            await asyncio.wrap_future(done)

    async def _ask(self, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._loop.call(function))

    async def _attach(self, message: control.AttachImage, descriptors: list[int]) -> None:
        if len(descriptors) != 1:
            raise InvalidState(f"AttachImage came with {len(descriptors)} descriptors, not one")
        if message.digest in self._loop.snapshot.images:
            return
        descriptor = descriptors.pop()
        device = self._pool.device
        running = asyncio.get_running_loop()
        attach = functools.partial(
            Image.attach,
            device,
            descriptor,
            message.digest,
            must_be_pinned=self._options.must_be_pinned,
        )
        image = await running.run_in_executor(self._background, attach)
        if not await self._ask(lambda: self._residency.attach(image)):
            image.close()

    async def _detach(self, digest: str) -> None:
        image = await self._ask(lambda: self._residency.detach(digest))
        if image is not None:
            await asyncio.get_running_loop().run_in_executor(self._background, image.close)

    async def _exchange(self, request: control.Exchange) -> control.ExchangeResult:
        order, last = self._order, self._loop.snapshot.exchanged
        if order is not None:
            if order.request.operation != request.operation:
                raise OperationInProgress(
                    f"exchange {order.request.operation} is under way; wait for its end",
                    operation=order.request.operation,
                )
            # Asked again, by a hotbayd that has restarted: it gets the same answer.
            return await asyncio.wrap_future(order.done)
        if last is not None and last.operation == request.operation:
            return last
        running = asyncio.get_running_loop()
        order = self._order = Order(
            request, lambda stage: running.call_soon_threadsafe(self._tell, stage)
        )
        try:
            async with self._measuring:
                self._loop.mailbox.post(lambda: self._loop.exchange(order))
            await supervise(
                order,
                self._options.stage_timeout_s,
                self._residency.link_bytes_per_s,
                self._tell,
                self._loop.mailbox.wake,
                self._stuck,
            )
        finally:
            self._order = None
        return order.done.result()

    async def _stage(self, message: control.StageWeights) -> control.ExchangeResult:
        running = asyncio.get_running_loop()
        request = control.Exchange(operation=message.operation, incoming=message.incoming)
        order = Order(request, lambda stage: running.call_soon_threadsafe(self._tell, stage))
        # Posted as soon as it is known: a measurement waits for the end of what it finds here.
        async with self._measuring:
            if self._staging is not None:
                raise OperationInProgress(
                    f"{self._staging.request.operation} is staging a model; wait for it",
                    operation=self._staging.request.operation,
                )
            self._staging = order
            self._loop.mailbox.post(
                lambda: self._loop.stage(order, message.displace, message.bytes_max)
            )
        try:
            done = asyncio.wrap_future(order.done)
            told = order.progress()
            # No deadline: it may stand still for as long as exchanges run, and holds up nobody.
            while not (await asyncio.wait({done}, timeout=PROGRESS_INTERVAL_S))[0]:
                if order.progress() != told:
                    told = order.progress()
                    self._tell(told)
        finally:
            self._staging = None
        return order.done.result()

    def _abandon(self, operation: str) -> None:
        orders = [self._order, self._staging]
        order = next((one for one in orders if one and one.request.operation == operation), None)
        if order is None:
            raise InvalidState(f"exchange {operation} is not under way", operation=operation)
        if order.stage is control.Stage.ROLLING_BACK:
            return
        if not order.interrupt(Abandoned(f"exchange {operation} was abandoned on request")):
            raise InvalidState(f"exchange {operation} is committed already", operation=operation)
        self._loop.mailbox.wake()

    async def _measure(self, copy_bytes: int) -> tuple[float, float]:
        """The rates to the device and from it.

        Measuring takes free pages, so that no exchange may begin meanwhile.
        """
        async with self._measuring:
            if self._order is not None:
                raise OperationInProgress("an exchange is under way; measure the link afterwards")
            if self._staging is not None:
                self._staging.interrupt(Displaced("staging was given up to measure the link"))
                self._loop.mailbox.wake()
                await asyncio.wait({asyncio.wrap_future(self._staging.done)})
            await self._ask(lambda: self._residency.room.free_for_measuring(copy_bytes))
            measure = functools.partial(measure_link, self._pool, copy_bytes, self._residency.link)
            run = asyncio.get_running_loop().run_in_executor
            rate = await run(self._background, measure)
            out_rate = await run(self._background, functools.partial(measure, outward=True))
            # On the step thread, so that what is told next is of after the measurement.
            await self._ask(lambda: self._residency.linked(rate))
        return rate, out_rate

    def close(self) -> None:
        """End the background thread once it is idle."""
        self._background.shutdown(wait=False, cancel_futures=True)
