"""A stage for hotbayd: the whole node in this process, with scripted peers over real sockets.

Journal, operations, images (real sealed segments), watch and the gRPC server are the real ones. The
workers and the gateway listen on Unix sockets on the same event loop and speak the control links;
what they do at each stage of an exchange is scripted. Descriptors that they are handed are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from daemon.control.config import Config, load
from daemon.control.errors import CallRefused
from daemon.control.node import Node
from daemon.control.notify import Notifier, boot_id
from daemon.control.processes.child import ProcessInfo
from daemon.control.processes.gateway_client import GatewayClient
from daemon.control.processes.place import Commands, FleetEvents
from daemon.control.processes.worker_client import WorkerClient
from daemon.control.state.journal import Journal
from engine.link import control, routes
from engine.link.build import Build, Built, Inspected, Restore, Touch
from engine.link.control import EngineState, EngineStatus, ExchangeResult, Ledger, Stage
from engine.link.peer import Peer
from partitioner.bounded import BoundedNvml
from partitioner.nvml import PynvmlReader
from partitioner.resetting import SimulatedResetter
from partitioner.simulated.install import installed
from partitioner.simulated.node import SimulatedNode
from partitioner.simulation import parse_simulate
from swap.cached_image import restore_image, save_image
from swap.checksum import checksum_of
from swap.errors import SwapError
from swap.image import TensorRecipe, complete, plan_image, segment_bytes
from swap.segment import Segment
from swap.writing import write_manifest
from tests.support.pullers import Pullers

PAGE_BYTES = 2 << 20
STAGED_BYTES = 1 << 20
"""Weights of a scripted model, unless a test gives it others."""
STAGES = (Stage.PLANNING, Stage.DRAINING, Stage.EVICTING, Stage.COPYING, Stage.VERIFYING)


async def until(condition: Callable[[], object]) -> None:
    """Let everything else run until the condition holds; the caller bounds it in time."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (what is awaited happens behind sockets)
            await asyncio.sleep(0.001)


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


@dataclass
class Builders:
    """Image builders that write zeros: a real, sealed image of `weights_bytes` for each model."""

    weights_bytes: int = 1 << 20
    builds: list[str] = field(default_factory=list)
    inspections: list[str] = field(default_factory=list)
    refuse: CallRefused | None = None
    pause: asyncio.Event | None = None
    key: Callable[[Path], str] = lambda directory: ""
    restores: list[str] = field(default_factory=list)
    saves: list[Path] = field(default_factory=list)
    pause_save: asyncio.Event | None = None
    touches: list[int] = field(default_factory=list)
    pause_touch: asyncio.Event | None = None
    refuse_touch: CallRefused | None = None

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[Builders]:
        yield copy.copy(self)  # each knows its own checkpoint; what is noted is shared

    def layout(self, directory: Path) -> Any:
        size_path = directory / "bytes"
        count = int(size_path.read_text()) if size_path.exists() else self.weights_bytes
        recipe = TensorRecipe("w", 0, (), (count // 4,))
        return plan_image([recipe], "float32", {"directory": str(directory)})

    async def inspect(self, directory: Path, dtype: str) -> Inspected:
        self.inspections.append(directory.parent.name)
        if (directory / "bad").exists():
            raise CallRefused("tensor x is missing", reason="CHECKPOINT_INVALID")
        self._directory = directory
        layout = self.layout(directory)
        return Inspected(
            call=0,
            family="llama",
            parameters=layout.weights_bytes // 4,
            vocabulary=10,
            layers=1,
            context_tokens=64,
            checkpoint_bytes=layout.weights_bytes,
            segment_bytes=segment_bytes(layout),
            weights_bytes=layout.weights_bytes,
            kv_bytes_per_token=1024,
            key=self.key(directory),
        )

    async def restore(
        self, request: Restore, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> None:
        self.restores.append(self._directory.parent.name)
        layout = self.layout(self._directory)
        segment = Segment(descriptor)  # the caller's
        try:
            restore_image(Path(request.path), layout, segment, digest=request.digest)
        except SwapError as error:
            raise CallRefused(str(error), reason=error.reason) from error

    async def save(self, descriptor: int, path: Path) -> None:
        self.saves.append(path)
        if self.pause_save is not None:
            await self.pause_save.wait()
        save_image(Segment(descriptor), path)

    async def tokenize(self, directory: Path, text: str) -> tuple[int, ...]:
        return tuple(len(word) for word in text.split())

    async def touch(self, request: Touch, descriptor: int) -> None:
        size_bytes = os.fstat(descriptor).st_size
        self.touches.append(size_bytes)
        if self.pause_touch is not None:
            await self.pause_touch.wait()
        if self.refuse_touch is not None:
            raise self.refuse_touch
        os.pwrite(descriptor, bytes(size_bytes), 0)

    async def build(
        self, request: Build, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> Built:
        directory = self._directory
        self.builds.append(directory.parent.name)
        on_progress(1, 2)
        if self.pause is not None:
            await self.pause.wait()
        if self.refuse is not None:
            raise self.refuse
        layout = self.layout(directory)
        zeros = checksum_of(bytes(layout.weights_bytes))
        manifest = complete(layout, {"w": zeros})
        write_manifest(descriptor, manifest)
        segment = Segment(descriptor)
        segment.seal()
        return Built(0, manifest.digest, self.key(directory))


class StageFleet:
    """The fleet's face, over peers that run in this process and are never started or ended."""

    def __init__(self, root: Path, partitions: tuple[str, ...], events: FleetEvents) -> None:
        self._root = root
        self._partitions = list(partitions)
        self._started = False
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self.removed: list[str] = []
        self._events = events
        self._clients: dict[str, WorkerClient] = {}
        self._gateway: GatewayClient | None = None
        self.reasons: dict[str, str] = {}

    @property
    def workers(self) -> dict[str, WorkerClient]:
        return {key: each for key, each in self._clients.items() if not each.closed}

    def failure(self, partition: str) -> str:
        return self.reasons.get(partition, "")

    def addresses(self) -> tuple[routes.WorkerAddress, ...]:
        return tuple(routes.WorkerAddress(each, "tokens.sock", 1) for each in self.workers)

    def processes(self) -> list[ProcessInfo]:
        return [ProcessInfo("hotbayd", "", os.getpid(), 0, 0, False, 1)]

    async def start(self) -> None:
        self._gateway = await GatewayClient.connect(
            self._root / "gateway" / "control.sock",
            on_demand=self._events.demand,
            on_metrics=self._events.metrics,
            on_closed=lambda error: None,
        )
        await self._events.gateway_up(self._gateway, True)
        self._started = True
        for partition in self._partitions:
            await self.connect(partition)

    async def connect(self, partition: str) -> None:
        client = await WorkerClient.connect(
            self._root / "workers" / partition / "control.sock",
            partition,
            on_state=self._events.worker_state,
            on_closed=lambda error: None,
        )
        self._clients[partition] = client
        await self._events.worker_up(client, True)

    def add(self, partition: str) -> None:
        if partition not in self._partitions:
            self._partitions.append(partition)
            if self._started:
                self._connecting[partition] = asyncio.create_task(self.connect(partition))

    async def settled(self, partition: str) -> None:
        if partition in self._connecting:
            await self._connecting[partition]

    async def remove(self, partition: str, drain_timeout_s: float) -> None:
        self.removed.append(partition)
        self._partitions.remove(partition)
        if partition in self._clients:
            await self.lose(partition)
            del self._clients[partition]

    async def lose(self, partition: str) -> None:
        await self._clients[partition].close()
        await self._events.worker_down(partition, "it was ended by SIGKILL")

    async def stop(self, drain_timeout_s: float) -> None:
        await self.detach()

    async def kill(self) -> None:
        await self.detach()

    async def detach(self) -> None:
        for client in self._clients.values():
            await client.close()
        if self._gateway is not None:
            await self._gateway.close()


class Theatre:
    """Everything on the stage. `start` and `kill` a node as often as you like; peers stay."""

    def __init__(self, root: Path, gpus: int, worker_bytes: int, settings: str) -> None:
        self.root = root
        self.gateway = Gateway(root / "run")
        self.workers = {
            f"gpu{index}": Worker(root / "run", f"gpu{index}", worker_bytes)
            for index in range(gpus)
        }
        self.builders = Builders()
        self.pullers = Pullers()
        self.repository = root / "repository"
        self.repository.mkdir()
        self.settings = settings
        self.node: Node
        self.board = SimulatedNode(parse_simulate(f"h200x{gpus}"))
        """Outlives the node, as a real board does."""
        self.offers_simulation = True
        self._simulated = installed(self.board)
        self._simulated.__enter__()
        self._nvml: BoundedNvml

    @property
    def worker(self) -> Worker:
        return self.workers["gpu0"]

    @property
    def fleet(self) -> StageFleet:
        fleet = self.node.fleet
        assert isinstance(fleet, StageFleet)
        return fleet

    def model(self, name: str, version: int = 1, **files: str) -> Path:
        """A checkpoint in the repository; `bytes="4096"` is its size, `bad="1"` breaks it."""
        directory = self.repository / name / str(version)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        for file, text in files.items():
            (directory / file).write_text(text)
        return directory

    def config(self) -> Config:
        path = self.root / "hotbayd.toml"
        path.write_text(self.settings)
        overrides = {
            "state_dir": str(self.root / "state"),
            "runtime_dir": str(self.root / "run"),
            "repository": str(self.repository),
            "simulate": f"h200x{len(self.board.gpus)}",
        }
        return load(path, overrides, {})

    async def start(self) -> Node:
        config = self.config()
        config.state_dir.mkdir(exist_ok=True)
        journal, contents = await Journal.open(config.state_dir)
        self._nvml = BoundedNvml(lambda: PynvmlReader(SimulatedResetter(self.board)))

        def make_fleet(
            commands: Commands, partitions: tuple[str, ...], events: FleetEvents
        ) -> StageFleet:
            return StageFleet(commands.runtime_dir, partitions, events)

        self.node = Node(
            config,
            Notifier({}),
            self._nvml,
            await self._nvml.discover(),
            journal,
            contents,
            "test",
            make_fleet=make_fleet,
            builders=self.builders,
            pullers=self.pullers,
            simulated=self.board if self.offers_simulation else None,
        )
        await self.node.start()
        return self.node

    async def kill(self) -> None:
        """End the node as SIGKILL would: nothing is said, nothing is settled."""
        await self.node.detach()

    async def close(self) -> None:
        with contextlib.suppress(AttributeError):
            await self.node.detach()
        for worker in self.workers.values():
            await worker.close()
        await self.gateway.close()
        self._simulated.__exit__(None, None, None)


@contextlib.asynccontextmanager
async def staged(
    root: Path,
    *models: str,
    gpus: int = 1,
    worker_bytes: int = 64 << 20,
    settings: str = "",
    start: bool = True,
) -> AsyncIterator[Theatre]:
    """A stage with these models in its repository and, unless told otherwise, a started node."""
    stage = Theatre(root, gpus, worker_bytes, settings)
    try:
        for name in models:
            stage.model(name)
        if start:
            await stage.start()
        yield stage
    finally:
        await stage.close()
