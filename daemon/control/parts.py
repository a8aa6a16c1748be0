"""The daemon's parts, made and handed to each other.

It owns the order in which they are made and who is given whom. It starts nothing and decides
nothing: `node` does the one, the parts the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from google.protobuf.message import Message

from daemon.control.actions.after_reboot import Reapplying
from daemon.control.actions.bring_back import BringBack
from daemon.control.actions.conductor import Conductor
from daemon.control.actions.demand_loop import DemandLoop
from daemon.control.actions.disk_cache import DiskCache
from daemon.control.actions.gpu_readings import GpuMonitor
from daemon.control.actions.health import Health
from daemon.control.actions.health_steps import Steps
from daemon.control.actions.images import Builders, Images
from daemon.control.actions.layout_changes import LayoutChanges
from daemon.control.actions.layouts import Layouts
from daemon.control.actions.pulls import Pullers, Pulls
from daemon.control.actions.recovery import Recovery
from daemon.control.actions.routing import Router
from daemon.control.actions.share_watch import ShareWatch
from daemon.control.actions.spare_memory import SpareKeeper
from daemon.control.actions.stage_ahead import StageAhead
from daemon.control.actions.transitions import Transitions
from daemon.control.actions.xid_listener import XidListener
from daemon.control.config import Config
from daemon.control.failpoints import FailPoints, parse_failpoints
from daemon.control.processes.custody import Custody
from daemon.control.processes.holders import Holders, holders_of
from daemon.control.services.metrics import Metrics
from daemon.control.services.watch import Hub
from daemon.control.state.journal import Journal
from daemon.control.state.operations import Operations
from daemon.control.state.records import Operation
from daemon.control.state.world import RunningFleet, World
from partitioner.bounded import BoundedNvml
from partitioner.gpu import Gpu
from partitioner.mps.places import MpsPlaces
from partitioner.simulated.node import SimulatedNode
from partitioner.xid_table import load_xids
from swap.image_cache import ImageCache


class Told(Protocol):
    """Whom the parts tell of what they did."""

    def operation_changed(self, record: Operation) -> None:
        """An operation's record is another one."""

    def health_changed(self) -> None:
        """What is known of a GPU's health is to be shown."""

    def show(self, kinds: Iterable[str]) -> Mapping[str, Mapping[str, Message]]:
        """All that there is, of some kinds, as the API shows it."""

    async def discover(self) -> tuple[Gpu, ...]:
        """The GPUs, as they are now."""


class Parts:
    """Made once, in the order in which one is given to the next."""

    def __init__(
        self,
        config: Config,
        world: World,
        sharing: MpsPlaces,
        fleet: RunningFleet,
        journal: Journal,
        nvml: BoundedNvml,
        custody: Custody,
        builders: Builders,
        pullers: Pullers,
        simulated: SimulatedNode | None,
        told: Told,
    ) -> None:
        self.custody = custody
        self.failpoints = FailPoints(parse_failpoints(config.failpoints))
        self.hub = Hub(told.show, config.limits)
        self.operations = Operations(
            journal,
            config.limits,
            told.operation_changed,
            lambda name: self.hub.removed("operation", name),
        )
        self.router = Router(world)
        self.monitor = GpuMonitor(nvml.readings)
        self._make_model_actions(config, world, journal, builders, pullers, sharing)
        holders = holders_of(simulated)
        self._make_layout_actions(world, sharing, fleet, journal, nvml, holders)
        self._make_health_actions(world, fleet, journal, nvml, told)
        self.recovery = Recovery(
            world,
            journal,
            self.operations,
            self.images,
            self.conductor,
            self.transitions,
            self.router,
            self.pulls,
            self.layout_changes,
        )

    def _make_model_actions(
        self,
        config: Config,
        world: World,
        journal: Journal,
        builders: Builders,
        pullers: Pullers,
        sharing: MpsPlaces,
    ) -> None:
        """What is done about images and models."""
        kept = config.image_cache
        self.disk = DiskCache(
            ImageCache(Path(kept.directory), kept.budget_bytes),
            world.store,
            builders,
            world.warnings.append,
            packed_only=kept.keep == "packed",
        )
        self.metrics = Metrics(world, self.disk, self.monitor, sharing.seen)
        self.spare = SpareKeeper(world, builders)
        self.images = Images(world, builders, self.custody, self.disk, self.spare, self.failpoints)
        self.transitions = Transitions(
            world,
            self.images,
            self.router,
            journal,
            self.failpoints,
            self.metrics.exchanged,
        )
        self.conductor = Conductor(
            world, self.images, self.operations, self.transitions, self.failpoints
        )
        self.returning = BringBack(world, self.operations, self.conductor)
        self.demand = DemandLoop(world, self.conductor, self.operations, self.router)
        self.stage_ahead = StageAhead(world, self.conductor, self.operations)
        self.pulls = Pulls(world, self.operations, self.conductor, self.router, pullers)

    def _make_layout_actions(
        self,
        world: World,
        sharing: MpsPlaces,
        fleet: RunningFleet,
        journal: Journal,
        nvml: BoundedNvml,
        holders: Holders,
    ) -> None:
        """What is done about partitions."""
        self.layouts = Layouts(world, nvml.discover, nvml.geometry, sharing)
        self.layout_changes = LayoutChanges(
            world,
            self.layouts,
            nvml,
            fleet,
            journal,
            self.operations,
            self.conductor,
            self.router,
            self.failpoints,
            holders,
            sharing,
            self.returning,
        )
        self.reapplying = Reapplying(
            world, self.layouts, self.layout_changes, journal, self.operations
        )
        self.share_watch = ShareWatch(world, sharing, fleet.restart)

    def _make_health_actions(
        self, world: World, fleet: RunningFleet, journal: Journal, nvml: BoundedNvml, told: Told
    ) -> None:
        """What is done about GPUs in trouble."""
        self.steps = Steps(
            world,
            journal,
            self.operations,
            self.conductor,
            self.router,
            fleet,
            self.returning,
            told.discover,
        )
        self.health = Health(
            world, nvml, journal, self.router, self.steps, load_xids(), told.health_changed
        )
        self.xids = XidListener(self.health, nvml.gate)
