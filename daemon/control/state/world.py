"""What hotbayd believes of its node: partitions, models, who is placed and who serves where.

It owns the memory that all other parts share, and answers questions about it; it never waits and
never talks to a process. `placements` is what is meant and journalled; `serving` is what the
gateway is told. The invariant: a model in `serving` is ACTIVE on that partition, or its weights are
landing there and its worker takes requests for it; it is taken out before that ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from daemon.control.config import Config
from daemon.control.errors import Refused
from daemon.control.processes.child import ProcessInfo
from daemon.control.processes.worker_client import WorkerClient
from daemon.control.state.closures import Closures
from daemon.control.state.health_book import HealthBook
from daemon.control.state.history import History
from daemon.control.state.parking import Holdings
from daemon.control.state.planning import PartitionView, Resident, Staged, resident
from daemon.control.state.records import Failure, LinkRate, Placement, Version
from daemon.control.state.registry import Registry
from engine.link.build import PACKED_DTYPE
from engine.link.control import EngineState, EngineStatus
from engine.link.routes import ModelDemand, WorkerAddress
from partitioner.cutting import Owned
from partitioner.gpu import Gpu
from partitioner.partition import Partition
from swap.spare import SpareMemory
from swap.store import HostStore

ON_DEVICE = frozenset({EngineStatus.ACTIVE, EngineStatus.DRAINING, EngineStatus.STAGED})
LINK_BYTES_PER_S_UNMEASURED = 10e9
WARNINGS_MAX = 20


class Processes(Protocol):
    """The running processes; the fleet."""

    @property
    def workers(self) -> Mapping[str, WorkerClient]: ...
    def failure(self, partition: str) -> str: ...
    def addresses(self) -> tuple[WorkerAddress, ...]: ...
    def processes(self) -> list[ProcessInfo]: ...


class RunningFleet(Processes, Protocol):
    """The fleet, as its node starts, changes and ends it."""

    async def start(self) -> None: ...
    def add(self, partition: str) -> None: ...
    async def settled(self, partition: str) -> None: ...
    async def remove(self, partition: str, drain_timeout_s: float) -> None: ...
    async def restart(self, partition: str) -> None: ...
    async def stop(self, drain_timeout_s: float) -> None: ...
    async def kill(self) -> None: ...
    async def detach(self) -> None: ...


@dataclass(frozen=True)
class Refusal:
    """Requests for a model are refused until then (monotonic), since it could not be brought up."""

    failure: Failure
    until_s: float


def on_device(engine: EngineState) -> bool:
    """Whether an engine has device memory that is its own, and not only until it is needed."""
    return engine.status in ON_DEVICE and not engine.spare


def staged(engine: EngineState) -> bool:
    """Whether an engine has weights, or the first of them, until their memory is needed."""
    return engine.spare and engine.status is EngineStatus.STAGED


class World:
    """See the module's text. Not thread-safe: for the daemon's event loop."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        store: HostStore,
        partitions: tuple[Partition, ...],
        gpus: tuple[Gpu, ...],
        links: tuple[LinkRate, ...] = (),
    ) -> None:
        self.config = config
        self.registry = registry
        self.store = store
        self.spare = SpareMemory()
        """Within what the store's budget leaves free."""
        self.partitions = {each.id: each for each in partitions}
        self.gpus = gpus
        self.owned: tuple[Owned, ...] = ()
        """The GPU instances that are ours."""
        self.owners: dict[str, str] = {}
        """Whom partitions are for, as far as a layout file has said."""
        self.closures = Closures()
        """What takes nothing new now."""
        self.health = HealthBook()
        """What is known of the health of GPUs and GPU instances."""
        self.processes: Processes
        self.became_ready = asyncio.Event()
        self.stopping = False
        self.warnings: deque[str] = deque(maxlen=WARNINGS_MAX)
        self.placements: dict[str, Placement] = {}
        self.serving: dict[str, str] = {}
        self.active_since_s: dict[str, float] = {}
        self.refusals: dict[str, Refusal] = {}
        self.held: dict[str, ModelDemand] = {}
        self.copying: dict[str, int] = {}
        """Bytes still to be copied, by partition, of the exchanges under way."""
        self.history = History(links)
        self.started_s = time.monotonic()
        self.exchanged_s: dict[str, float] = {}
        self.left_s: dict[str, float] = {}

    @property
    def ready(self) -> bool:
        """Whether recovery is through."""
        return self.became_ready.is_set()

    def repartition(self, partitions: Iterable[Partition]) -> None:
        """From now on these are the partitions; whoever holds the mapping sees the change."""
        wanted = {each.id: each for each in partitions}
        self.partitions.clear()
        self.partitions.update(wanted)

    # Workers.

    def worker(self, partition: str) -> WorkerClient:
        """A partition's connected worker. Raises Refused (…_NOT_FOUND, WORKER_UNAVAILABLE)."""
        if partition not in self.partitions:
            raise Refused(
                f"there is no partition {partition!r}; there are {', '.join(self.partitions)}",
                reason="PARTITION_NOT_FOUND",
                metadata={"partition": partition},
            )
        client = self.processes.workers.get(partition)
        if client is None:
            why = self.processes.failure(partition) or "it is being started"
            raise Refused(
                f"the worker of {partition} is not up: {why}",
                reason="WORKER_UNAVAILABLE",
                metadata={"partition": partition},
            )
        return client

    def engine(self, key: str, partition: str = "") -> EngineState | None:
        """What a worker says of a model; empty `partition`: where it is placed."""
        if not partition and key in self.placements:
            partition = self.placements[key].partition
        client = self.processes.workers.get(partition)
        if client is None:
            return None
        return next((each for each in client.state.engines if each.model == key), None)

    def images_on_devices(self) -> set[str]:
        """Digests that some worker's engine still needs: on the device, or with requests kept."""
        return {
            engine.digest
            for client in self.processes.workers.values()
            for engine in client.state.engines
            if on_device(engine) or engine.running or engine.waiting
        }

    def outdated(self, digest: str) -> bool:
        """Whether an image in the store has another dtype than builders make now."""
        if digest not in self.store:
            return False
        manifest = self.store.manifest(digest)
        made = PACKED_DTYPE if manifest.packed else manifest.dtype
        return made != self.config.image_dtype

    # Models.

    def residents(self, partition: str) -> list[str]:
        """Keys of the models that are meant to be on a partition."""
        return [key for key, each in self.placements.items() if each.partition == partition]

    def incoming(self, version: Version) -> Resident:
        """A version as something to be brought in, by the image there is of it, if any."""
        stored = None
        if version.digest and version.digest in self.store:
            stored = self.store.manifest(version.digest).stored_bytes
        return resident(version, self.config.worker, stored)

    def first_bytes(self, version: Version, layers: int) -> int:
        """Bytes of weights up to the end of a layer, counted from 1, by the image there is of it;
        0 for none. Raises Refused (INVALID_ARGUMENT) for one that the model does not have."""
        if not version.digest or version.digest not in self.store or not layers:
            return 0
        spans = self.store.manifest(version.digest).layers
        found = [span.offset_bytes + span.bytes for span in spans if span.layer == layers - 1]
        if not found:
            last = max(span.layer for span in spans)
            raise Refused(
                f"{version.key} has {last + 1} layers: it cannot be staged up to layer {layers}",
                reason="INVALID_ARGUMENT",
                metadata={"model": version.key},
            )
        return found[0]

    def view(self, partition: str, without: str = "") -> PartitionView:
        """A partition as plans see it, as if `without` were not there.

        Raises Refused when its worker is not up.
        """
        state = self.worker(partition).state
        keys = set(self.residents(partition))
        keys |= {each.model for each in state.engines if on_device(each)}
        keys.discard(without)
        versions = [self.registry.get(key) for key in sorted(keys)]
        past = self.history.past(partition, state.link_bytes_per_s or LINK_BYTES_PER_S_UNMEASURED)
        return PartitionView(
            id=partition,
            page_bytes=state.page_bytes,
            pages_total=state.pages_total,
            link_bytes_per_s=past.link_bytes_per_s,
            residents=tuple(
                resident(each, self.config.worker)
                for each in versions
                if each is not None and each.facts is not None and each.failure is None
            ),
            link_wait_ms=self._link_wait_ms(partition),
            staged={
                each.model: Staged(each.staged_bytes, each.copy_bytes)
                for each in state.engines
                if staged(each)
            },
            busy=frozenset(each.model for each in state.engines if each.running),
            past=past,
            holdings=Holdings(
                state.page_bytes,
                state.pages_free,
                self.config.worker.parking_bytes - sum(each.parked_bytes for each in state.engines),
                state.engines,
            ),
        )

    def _link_wait_ms(self, partition: str) -> float:
        """How long the copies that now use the partition's link will still take."""
        link, workers = self.partitions[partition].link, self.processes.workers
        return sum(
            left / (workers[other].state.link_bytes_per_s or LINK_BYTES_PER_S_UNMEASURED) * 1000
            for other, left in self.copying.items()
            if link and other != partition and other in workers
            if self.partitions[other].link == link
        )

    def views(self, without: str = "") -> list[PartitionView]:
        """Every partition whose worker is up and that takes new models."""
        workers = self.processes.workers
        return [self.view(each, without) for each in workers if self.is_open(each)]

    def is_open(self, partition: str) -> bool:
        """Whether a partition takes new models."""
        found = self.partitions.get(partition)
        return found is not None and self.closures.closed(found) is None

    def require_any_open(self) -> None:
        """Raises Refused where every partition that has a worker is closed."""
        workers = self.processes.workers
        if workers and not any(map(self.is_open, workers)):
            self.require_open(next(iter(workers)))

    def require_open(self, partition: str) -> None:
        """Raises Refused (GPU_CORDONED, PARTITION_TAINTED) where nothing new may come."""
        found = self.partitions.get(partition)
        refusal = self.closures.closed(found) if found is not None else None
        if refusal is not None:
            raise refusal

    def state(self, version: Version) -> tuple[str, str, str]:
        """A version's state, the reason for it if there is one, and its partition."""
        placement = self.placements.get(version.key)
        if version.key in self.serving:
            state = "ACTIVE" if placement is not None else "STAGED"
            return state, "", self.serving[version.key]
        if placement is not None:
            engine = self.engine(version.key)
            if engine is not None and engine.status is not EngineStatus.ACTIVE:
                return engine.status.value, engine.reason, placement.partition
            return "STANDBY", "", placement.partition
        partition = self.staged_on(version.key)
        if partition:
            return "STAGED", "", partition
        if version.digest and version.digest in self.store:
            return "STANDBY", "", ""
        if version.failure is not None:
            return "FAILED", version.failure.message, ""
        return "COLD", "", ""

    def staged_on(self, key: str) -> str:
        """The partition whose spare memory holds most of a model's weights; empty: none does."""
        found = self._staged(key)
        return found[1] if found is not None else ""

    def staged_bytes(self, key: str) -> int:
        """How much of a model's weights that is."""
        found = self._staged(key)
        return found[0] if found is not None else 0

    def _staged(self, key: str) -> tuple[int, str] | None:
        return max(
            (
                (each.staged_bytes, partition)
                for partition, client in self.processes.workers.items()
                for each in client.state.engines
                if each.model == key and staged(each)
            ),
            default=None,
        )

    def kept_on(self, key: str) -> str:
        """The partition whose worker keeps requests of a model; empty when none does."""
        for partition, client in self.processes.workers.items():
            if any(each.model == key and each.waiting for each in client.state.engines):
                return partition
        return ""

    # Who serves.

    def serve(self, key: str, partition: str) -> None:
        """From now on the gateway may be told to send requests there."""
        self.serving[key] = partition
        self.refusals.pop(key, None)

    def withhold(self, key: str) -> None:
        """From now on the gateway is told to hold a model's requests."""
        self.serving.pop(key, None)

    def placed(self, placement: Placement) -> None:
        """A model is on a partition to stay."""
        before = self.placements.get(placement.model)
        self.placements[placement.model] = placement
        if before is None or before.partition != placement.partition or before.drained:
            self.active_since_s[placement.model] = time.monotonic()

    def displaced(self, key: str) -> None:
        """A model is on no partition any more."""
        self.withhold(key)
        if self.placements.pop(key, None) is not None:
            self.left_s[key] = time.monotonic()
        self.active_since_s.pop(key, None)

    def refusal(self, key: str) -> Failure | None:
        """Why requests for a model are refused for now."""
        found = self.refusals.get(key)
        return found.failure if found is not None else None
