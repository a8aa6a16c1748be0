"""A stage for hotbayd: the whole node in this process, with scripted peers over real sockets.

Journal, operations, images (real sealed segments), watch and the gRPC server are the real ones;
workers, gateway and image builders are those of `control_peers` and `control_builders`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Literal

from daemon.control.config import Config
from daemon.control.config_file import load
from daemon.control.node import Node
from daemon.control.notify import Notifier
from daemon.control.processes.child import ProcessInfo
from daemon.control.processes.gateway_client import GatewayClient
from daemon.control.processes.place import Commands, FleetEvents
from daemon.control.processes.worker_client import WorkerClient
from daemon.control.state.journal import Journal
from engine.link import routes
from partitioner.bounded import BoundedNvml
from partitioner.nvml import PynvmlReader
from partitioner.nvml_gate import NvmlGate
from partitioner.resetting import SimulatedResetter
from partitioner.simulated.install import installed
from partitioner.simulated.node import SimulatedNode
from partitioner.simulation import parse_simulate
from tests.support.control_builders import Builders
from tests.support.control_peers import Gateway, Worker
from tests.support.pullers import Pullers


async def until(condition: Callable[[], object]) -> None:
    """Let everything else run until the condition holds; the caller bounds it in time."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 (what is awaited happens behind sockets)
            await asyncio.sleep(0.001)


class StageFleet:
    """The fleet's face, over peers that run in this process and are never started or ended."""

    def __init__(self, root: Path, partitions: tuple[str, ...], events: FleetEvents) -> None:
        self._root = root
        self._partitions = list(partitions)
        self._started = False
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self.removed: list[str] = []
        self.restarted: list[str] = []
        self.restarting: Callable[[str], Awaitable[None]] | None = None
        """What becomes of one that is started again; None: nothing."""
        self._events = events
        self._clients: dict[str, WorkerClient] = {}
        self._gateway: GatewayClient | None = None
        self.reasons: dict[str, str] = {}

    @property
    def workers(self) -> dict[str, WorkerClient]:
        return {key: each for key, each in self._clients.items() if not each.closed}

    async def restart(self, partition: str) -> None:
        self.restarted.append(partition)
        if self.restarting is not None:
            await self.restarting(partition)

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
        self.dtype: Literal["float32", "bfloat16"] = "float32"
        """By default it would be what suits the processor that tests run on."""
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
        config = load(path, overrides, {})
        worker = config.worker.model_copy(update={"dtype": self.dtype})
        return config.model_copy(update={"worker": worker})

    async def start(self) -> Node:
        config = self.config()
        config.state_dir.mkdir(exist_ok=True)
        journal, contents = await Journal.open(config.state_dir)
        gate = NvmlGate()
        resetter = SimulatedResetter(self.board)
        self._nvml = BoundedNvml(lambda: PynvmlReader(resetter, gate), gate=gate)

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
