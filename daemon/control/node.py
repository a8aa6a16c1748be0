"""The daemon's parts put together, and what happens when processes come and go.

It owns the order of starting and stopping and hands the fleet's events to the parts they concern.
It decides nothing itself. The invariant: nothing about models is changed before recovery is
through, and a daemon that is killed at any point leaves gateway and workers serving.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from google.protobuf.message import Message

from daemon.control.actions.cordons import Cordons
from daemon.control.actions.images import Builders
from daemon.control.actions.pulls import Pullers
from daemon.control.config import Config
from daemon.control.notify import Notifier
from daemon.control.parts import Parts
from daemon.control.processes.builder_client import Builder
from daemon.control.processes.commands import commands
from daemon.control.processes.custody import Custody
from daemon.control.processes.fleet import Fleet
from daemon.control.processes.gateway_client import GatewayClient
from daemon.control.processes.place import Commands, FleetEvents
from daemon.control.processes.puller_client import Puller
from daemon.control.processes.share_places import share_places
from daemon.control.processes.worker_client import WorkerClient
from daemon.control.services import answers
from daemon.control.services.api import make_server, snapshot
from daemon.control.services.doctor import DoctorService
from daemon.control.services.nodes import NodeService
from daemon.control.services.server import Server
from daemon.control.services.simulation import SimulationService
from daemon.control.state.journal import Contents, Drop, Journal
from daemon.control.state.records import Operation
from daemon.control.state.remembered_world import make_world
from daemon.control.state.world import RunningFleet
from engine.link.control import WorkerState
from engine.link.routes import Demand
from partitioner.bounded import BoundedNvml
from partitioner.errors import PartitionerError
from partitioner.gpu import Gpu
from partitioner.simulated.node import SimulatedNode

log = logging.getLogger(__name__)

FleetMaker = Callable[[Commands, tuple[str, ...], FleetEvents], RunningFleet]


class Node:
    """One hotbayd, from `start` to `stop`; also what the fleet reports to."""

    def __init__(
        self,
        config: Config,
        notifier: Notifier,
        nvml: BoundedNvml,
        gpus: tuple[Gpu, ...],
        journal: Journal,
        contents: Contents,
        version: str,
        *,
        make_fleet: FleetMaker = Fleet,
        builders: Builders = Builder.start,
        pullers: Pullers = Puller.start,
        simulated: SimulatedNode | None = None,
    ) -> None:
        self._config = config
        self._notifier = notifier
        self._nvml = nvml
        self._contents = contents
        self._journal = journal
        self.sharing = share_places(config, gpus)
        self.world = world = make_world(config, contents, gpus, builders, self.sharing)
        self._listening = ("", "")
        log_dir = config.state_dir / "log"
        log_dir.mkdir(mode=0o700, exist_ok=True)
        argument_lists = commands(
            config, world.partitions, lambda: self._listening, log_dir, self.sharing
        )
        self.fleet = make_fleet(argument_lists, tuple(world.partitions), self)
        world.processes = self.fleet
        self.parts = Parts(
            config,
            world,
            self.sharing,
            self.fleet,
            journal,
            nvml,
            Custody(notifier),
            builders,
            pullers,
            simulated,
            self,
        )
        self._server = self._make_server(version, simulated)
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when one of the daemon's own loops does."""
        self._tasks: list[asyncio.Task[None]] = []
        self._statuses: dict[str, tuple[object, ...]] = {}

    def _make_server(self, version: str, simulated: SimulatedNode | None) -> Server:
        nodes = NodeService(
            self.world,
            self.parts.operations,
            self.parts.conductor,
            version,
            self.discover,
            lambda: self._listening,
            Cordons(self.world, self.parts.operations, self.parts.health.uncordoned),
        )
        return make_server(
            self.world,
            self.parts.operations,
            self.parts.conductor,
            self.parts.router,
            self.parts.hub,
            nodes,
            self.parts.images,
            self.parts.layouts,
            self.parts.layout_changes,
            self.parts.pulls,
            DoctorService(self._config, self._nvml, self._notifier.stored_max, version),
            SimulationService(simulated, self.parts.health.look_soon) if simulated else None,
        )

    # Starting and stopping.

    async def start(self) -> None:
        """Serve the API, find or start every process, recover, and open for business."""
        world, config = self.world, self._config
        open_operations = self.parts.operations.restore(self._contents.operations)
        await self._server.start()
        await self.parts.layout_changes.settle(self._contents.layout_change, open_operations)
        world.warnings.extend(await self.sharing.restore())
        void = [each for each in self._contents.units if each.unit not in world.health.records]
        await self._journal.commit(Drop(each) for each in void)
        await self.parts.disk.open()
        scan = asyncio.create_task(self._scan(), name="scan")
        try:
            await self.fleet.start()
            await scan
        finally:
            scan.cancel()
        for digest in self.parts.images.adopt(await self.parts.custody.recover()):
            await self.parts.custody.drop(digest)
        for digest in world.store.trim():
            await self.parts.custody.drop(digest)
        await self.parts.recovery.settle(open_operations)
        self.parts.router.enabled = True
        await self.parts.router.publish()
        self._tasks = [
            asyncio.create_task(self.parts.images.spread(), name="spread"),
            asyncio.create_task(self.parts.demand.run(), name="demand"),
            asyncio.create_task(self.parts.disk.run(), name="image cache"),
            asyncio.create_task(self.parts.spare.run(), name="spare memory"),
            asyncio.create_task(self.parts.monitor.run(), name="GPU readings"),
            asyncio.create_task(self.parts.stage_ahead.run(), name="stage ahead"),
            asyncio.create_task(self.parts.share_watch.run(), name="shares"),
            asyncio.create_task(self.parts.health.run(), name="health"),
            asyncio.create_task(self.parts.xids.run(), name="XIDs"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._loop_ended)
        world.became_ready.set()
        self.parts.spare.wake()
        kept, policy = self._contents.kept_layout, config.partitions.after_reboot
        again = self.parts.reapplying.run(kept, policy)
        self._tasks.append(asyncio.create_task(again, name="layout after a reboot"))
        for client in list(self.fleet.workers.values()):
            self.parts.recovery.restore(client)
        await self.parts.images.keep_all()
        await self._server.set_serving(True)
        self.parts.hub.refresh_soon()
        self._notifier.ready(self._status())
        log.info("ready on %s; HTTP on %s", config.control_socket, self._listening[0])

    async def stop(self, drain_timeout_s: float) -> None:
        """Take nothing new, let requests end, end every process, and close up."""
        self._notifier.stopping()
        self.world.stopping = True
        await self._server.set_serving(False)
        await self._close_parts()
        await self.fleet.stop(drain_timeout_s)
        await self.sharing.stop()
        await self._close_files()

    async def kill(self) -> None:
        """End every process at once; what was journalled is enough for the next start."""
        await self.fleet.kill()
        await self.sharing.stop()
        await self._close_files()

    async def detach(self) -> None:
        """Close up and leave every process serving, unless this daemon itself started them all."""
        self.world.stopping = True
        await self._close_parts()
        children = [each for each in self.fleet.processes() if each.role != "hotbayd"]
        if self.world.ready or any(each.adopted for each in children):
            await self.fleet.detach()
        else:
            await self.fleet.stop(0.0)
            await self.sharing.stop()
        await self._close_files()

    async def _close_parts(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.parts.returning.close()
        self.parts.hub.close()
        await self.parts.operations.stop()

    async def _close_files(self) -> None:
        await self._server.stop()
        await self._journal.close()
        await self._nvml.close()
        self.world.store.close()

    async def _scan(self) -> None:
        repository = self._config.node.repository
        changes = await self.world.registry.scan(Path(repository) if repository else None)
        await self._journal.commit(changes)

    async def discover(self) -> tuple[Gpu, ...]:
        try:
            return await self._nvml.discover()
        except PartitionerError as error:
            log.warning("GPUs cannot be read: %s", error)
            return self.world.gpus

    def health_changed(self) -> None:
        """What is known of a GPU's health is to be shown."""
        self.parts.hub.refresh_soon(("gpu", "partition"))

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        """A loop only ends by a bug; a fresh start that adopts everything beats a deaf daemon."""
        if not task.cancelled() and not self.broken.done():
            self.broken.set_exception(task.exception() or RuntimeError(f"{task} ended"))

    def show(self, kinds: Iterable[str]) -> Mapping[str, Mapping[str, Message]]:
        return snapshot(self.world, self.parts.operations, kinds)

    def operation_changed(self, record: Operation) -> None:
        if record.done:
            self.parts.metrics.operation_ended(record)
            self.parts.demand.wake()
            self.parts.spare.wake()
            self._notifier.status(self._status())
        self.parts.hub.changed("operation", record.name, answers.operation(record))
        self.parts.hub.refresh_soon()

    def _status(self) -> str:
        """One line for `systemctl status`."""
        world = self.world
        versions = len(world.registry.versions())
        active = ", ".join(f"{key} on {where}" for key, where in sorted(world.serving.items()))
        return f"{len(world.partitions)} partitions, {versions} models; ACTIVE: {active or 'none'}"

    # What the fleet tells.

    async def worker_up(self, client: WorkerClient, adopted: bool) -> None:
        """A worker is connected; before recovery this is only noted, by the fleet itself."""
        if self.world.ready and not self.world.stopping:
            await self.parts.recovery.adopt(client)
            self.parts.recovery.restore(client)
            self.parts.router.publish_soon()
        self.parts.hub.refresh_soon()

    async def worker_down(self, partition: str, reason: str) -> None:
        """A worker is gone: its models' requests are held until they are back."""
        world = self.world
        for key in [key for key, where in world.serving.items() if where == partition]:
            world.withhold(key)
        self.parts.images.worker_down(partition)
        self.parts.share_watch.wake()
        self.parts.router.publish_soon()
        self.parts.hub.refresh_soon()

    async def worker_state(self, state: WorkerState) -> None:
        """A worker reported: every second, and after each change."""
        statuses = tuple(
            (each.model, each.status, each.spare, each.reason) for each in state.engines
        )
        changed = self._statuses.get(state.partition) != statuses
        self._statuses[state.partition] = statuses
        self.parts.demand.wake()
        if state.exchanged is not None:
            ledger = state.exchanged.ledger
            record = await self.parts.operations.complete_ledger(state.exchanged.operation, ledger)
            if record is not None:
                self.parts.metrics.first_token(ledger)
                self.parts.hub.changed("operation", record.name, answers.operation(record))
        self.parts.hub.refresh_soon(("partition", "model") if changed else ("partition",))

    async def gateway_up(self, client: GatewayClient, adopted: bool) -> None:
        """A gateway is connected; a new one gets the table and every descriptor."""
        self._listening = (client.state.http, client.state.grpc)
        self.parts.custody.gateway = client
        self.parts.router.connect(client)
        if self.world.ready:
            await self.parts.router.publish()
            await self.parts.images.keep_all()
        self.parts.hub.refresh_soon()

    async def gateway_down(self, reason: str) -> None:
        """The gateway is gone, and what it held with it."""
        self.parts.custody.gateway = None
        self.parts.router.connect(None)
        self.world.held = {}
        self.parts.hub.refresh_soon()

    async def demand(self, demand: Demand) -> None:
        """The gateway says what it holds."""
        self.parts.demand.held(demand)

    async def metrics(self) -> str:
        """What the gateway shows beside its own."""
        return self.parts.metrics.text()
