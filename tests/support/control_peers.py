"""Scripted peers of hotbayd: a worker and the gateway, over real Unix sockets on this event loop.

They speak the control links; what they do at each stage of an exchange is scripted. Descriptors
that they are handed are counted.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import msgspec

from daemon.control.notify import boot_id
from engine.link import control, routes
from engine.link.control import EngineState, EngineStatus, ExchangeResult, Ledger, Stage
from engine.link.peer import Peer

PAGE_BYTES = 2 << 20
STAGED_BYTES = 1 << 20
"""Weights of a scripted model, unless a test gives it others."""
STAGES = (Stage.PLANNING, Stage.DRAINING, Stage.EVICTING, Stage.COPYING, Stage.VERIFYING)


def listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    sock.setblocking(False)
    return sock


class Listening:
    """A peer that accepts one connection after the other, the newest counting."""

    def __init__(self, path: Path, messages: Any) -> None:
        self.path = path
        self.peer: Peer[Any] | None = None
        self.received: list[str] = []
        self._messages = messages
        self._sock = listen(path)
        self._task = asyncio.create_task(self._accept())
        self._tasks: set[asyncio.Task[None]] = set()

    async def _accept(self) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
            self.peer = Peer(
                sock,
                self._messages,
                name="hotbayd",
                replies=(),
                handler=self._handle,
                on_close=lambda error: None,
            )

    async def _handle(self, message: Any, descriptors: list[int]) -> None:
        self.received.append(type(message).__name__)
        task = asyncio.create_task(self.answer(message, descriptors))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def answer(self, message: Any, descriptors: list[int]) -> None:
        raise NotImplementedError

    def reply(self, message: Any) -> None:
        if self.peer is not None and not self.peer.closed:
            self.peer.post(message)

    async def hang_up(self) -> None:
        if self.peer is not None:
            await self.peer.close()
            self.peer = None

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, *self._tasks, return_exceptions=True)
        await self.hang_up()
        self._sock.close()


class Worker(Listening):
    """A worker without a device. Scripts: `fail_at`, `die_at`, `pause_at` a stage; `refuse`."""

    def __init__(self, root: Path, partition: str, memory_bytes: int) -> None:
        super().__init__(root / "workers" / partition / "control.sock", control.ToWorker)
        self.partition = partition
        self.engines: dict[str, EngineState] = {}
        self.images: dict[str, int] = {}
        self.pages_total = memory_bytes // PAGE_BYTES
        self.fail_at: Stage | None = None
        self.die_at: Stage | None = None
        self.pause_at: Stage | None = None
        self.paused = asyncio.Event()
        self.go_on = asyncio.Event()
        self.refuse: control.Failed | None = None
        self.measuring: control.Failed | None = None
        """What measuring the link is refused with."""
        self.exchanging = ""
        self.exchanged: ExchangeResult | None = None
        self.abandoned = False
        self.runtime = "scripted"
        self.exchanges: list[control.Exchange] = []
        self.stagings: list[control.StageWeights] = []

    def state(self, call: int = 0) -> control.WorkerState:
        return control.WorkerState(
            call=call,
            protocol=control.PROTOCOL,
            pid=os.getpid(),
            boot_id=boot_id(),
            partition=self.partition,
            generation=1,
            device="host",
            memory_bytes=self.pages_total * PAGE_BYTES,
            page_bytes=PAGE_BYTES,
            pages_total=self.pages_total,
            pages_free=self.pages_total,
            link_bytes_per_s=1e9,
            images=tuple(self.images),
            engines=tuple(self.engines.values()),
            exchanging=self.exchanging,
            exchanged=self.exchanged,
        )

    def active(self) -> list[str]:
        return sorted(
            key for key, each in self.engines.items() if each.status is EngineStatus.ACTIVE
        )

    def become(self, model: str, status: EngineStatus, **changes: Any) -> None:
        before = self.engines.get(model) or EngineState(model, "", status)
        self.engines[model] = msgspec.structs.replace(before, status=status, **changes)

    async def answer(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case control.Describe():
                self.reply(self.state(message.call))
                return
            case control.AttachImage():
                os.close(self.images.pop(message.digest, None) or os.dup(descriptors[0]))
                self.images[message.digest] = descriptors[0]
            case control.DetachImage():
                if message.digest in self.images:
                    os.close(self.images.pop(message.digest))
            case control.Exchange():
                await self._exchange(message)
                return
            case control.StageWeights(operation=operation, incoming=spec):
                self.stagings.append(message)
                self.reply(control.StageReached(operation, Stage.COPYING, 1, 2))
                staged_bytes = message.bytes_max or STAGED_BYTES
                self.become(
                    spec.model,
                    EngineStatus.STAGED,
                    digest=spec.digest,
                    spare=True,
                    staged_bytes=staged_bytes,
                    copy_bytes=STAGED_BYTES - staged_bytes,
                )
                self.reply(self.state())
                ledger = Ledger(copy_ms=2.0, total_ms=3.0, copied_bytes=1000)
                result = ExchangeResult(operation, spec.model, "", ledger=ledger)
                self.reply(control.Exchanged(message.call, result))
                return
            case control.MeasureLink() if self.measuring is not None:
                self.reply(msgspec.structs.replace(self.measuring, call=message.call))
                return
            case control.MeasureLink():
                self.reply(control.LinkMeasured(message.call, 2e9, 1e9))
                return
            case control.Abandon():
                self.abandoned = True
                self.go_on.set()
            case control.Drain():
                self.become(message.model, EngineStatus.STAGED)
            case control.Resume():
                self.become(message.model, EngineStatus.ACTIVE)
        self.reply(self.state())
        self.reply(control.Done(message.call))

    async def _exchange(self, message: control.Exchange) -> None:
        self.exchanges.append(message)
        if self.refuse is not None:
            refusal, self.refuse = self.refuse, None
            self.reply(msgspec.structs.replace(refusal, call=message.call))
            return
        self.exchanging, self.abandoned = message.operation, False
        incoming = message.incoming.model if message.incoming else ""
        outgoing = ",".join(message.outgoing)
        failed: Stage | None = None
        for stage in STAGES:
            self.reply(control.StageReached(message.operation, stage, 1, 2))
            if self.pause_at is stage:
                self.paused.set()
                await self.go_on.wait()
            if self.die_at is stage:
                self.exchanging, self.die_at = "", None
                self.engines.clear()
                await self.hang_up()
                return
            if self.fail_at is stage or self.abandoned:
                failed = stage
                break
        if failed is not None:
            self.reply(control.StageReached(message.operation, Stage.ROLLING_BACK))
            reason = "CANCELLED" if self.abandoned else "TRANSFER_FAILED"
            result = ExchangeResult(
                message.operation, incoming, outgoing, reason, f"it broke at {failed}", True
            )
        else:
            for model in message.outgoing:
                if message.discard:
                    self.engines.pop(model)
                else:
                    self.become(model, EngineStatus.STANDBY)
            if message.incoming is not None:
                self.become(
                    incoming, EngineStatus.ACTIVE, digest=message.incoming.digest, spare=False
                )
            ledger = Ledger(copy_ms=2.0, total_ms=3.0, copied_bytes=1000, link_bytes_per_s=1e6)
            record = None
            if message.canary is not None and self.runtime not in message.canary.expected:
                record = control.CanaryRecord(self.runtime, message.canary.prompt[::-1])
            result = ExchangeResult(
                message.operation, incoming, outgoing, ledger=ledger, canary=record
            )
        self.exchanging, self.exchanged = "", result
        self.reply(self.state())
        self.reply(control.Exchanged(message.call, result))

    async def close(self) -> None:
        await super().close()
        for descriptor in self.images.values():
            os.close(descriptor)
        self.images.clear()


class Gateway(Listening):
    """A gateway without clients: it keeps tables and segments."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "gateway" / "control.sock", routes.ToGateway)
        self.tables: list[routes.SetTable] = []
        self.segments: dict[str, int] = {}
        self.metrics: asyncio.Future[str] | None = None

    async def answer(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case routes.Describe():
                state = routes.GatewayState(
                    call=message.call,
                    protocol=routes.PROTOCOL,
                    pid=os.getpid(),
                    boot_id=boot_id(),
                    generation=1,
                    table_version=self.tables[-1].version if self.tables else 0,
                    http="127.0.0.1:1",
                    grpc="127.0.0.1:2",
                    segments=tuple(self.segments),
                )
                self.reply(state)
                return
            case routes.SetTable():
                self.tables.append(message)
            case routes.KeepSegment():
                if message.digest in self.segments:
                    os.close(self.segments[message.digest])
                self.segments[message.digest] = descriptors[0]
            case routes.FetchSegment():
                assert self.peer is not None
                self.peer.post(routes.Done(message.call), (self.segments[message.digest],))
                return
            case routes.DropSegment():
                if message.digest in self.segments:
                    os.close(self.segments.pop(message.digest))
            case routes.Metrics():
                assert self.metrics is not None
                self.metrics.set_result(message.text)
                return
        self.reply(routes.Done(message.call))

    def want(self, **models: float) -> None:
        """Report demand: `prose=0.5` is a request for prose@1 that has waited half a second."""
        self.reply(
            routes.Demand(
                tuple(routes.ModelDemand(f"{name}@1", 1, age) for name, age in models.items())
            )
        )

    def route(self, model: str) -> routes.Route:
        return next(each for each in self.tables[-1].routes if each.model == model)

    def history(self, model: str) -> list[str]:
        """What became of a model's requests, table by table, repetitions left out."""
        words: list[str] = []
        for table in self.tables:
            for route in table.routes:
                if route.model == model and (not words or words[-1] != route.disposition.value):
                    words.append(route.disposition.value)
        return words

    async def close(self) -> None:
        await super().close()
        for descriptor in self.segments.values():
            os.close(descriptor)
        self.segments.clear()
