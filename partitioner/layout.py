"""Layouts as values: what a node's GPUs are cut into now, what is wanted, and what a plan would do.

It owns the words between the layout file, the planner and whoever shows or carries out a plan. It
decides nothing. The invariant: the name of a partition says where it is (`gpu0` the whole GPU,
`gpu0/3g.71gb@4` the instance from memory slot 4, `gpu0/3g.71gb@4/mps0` its first share), so that
the same layout has the same names whoever reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from partitioner.geometry import Geometry, Instance


class Found(StrEnum):
    """What becomes of instances that were there before: kept out of it, or treated as ours.

    DESTROY is ADOPT of what nobody uses: no process of others is left, on those that stay neither.
    """

    IGNORE = "ignore"
    ADOPT = "adopt"
    DESTROY = "destroy"


class MigChange(StrEnum):
    """What must happen to a GPU's MIG mode."""

    NONE = ""
    ENABLE = "enable"
    DISABLE = "disable"


@dataclass(frozen=True)
class Share:
    """An MPS share of a GPU or instance. None: no limit. `thread_percent` is a ceiling.

    One with `sm_count` has so many multiprocessors to itself: a static SM partition.
    """

    memory_bytes: int | None = None
    thread_percent: int | None = None
    owner: str = ""
    sm_count: int | None = None


@dataclass(frozen=True)
class GpuState:
    """One GPU as it is cut now. `foreign` instances are not ours: nothing may be done to them.
    `cleared` ones are not ours either, but are to become so once nobody uses them.

    `shares` are the MPS shares under the whole GPU (None) or under an instance. `sm_chunk` is how
    many of its `sm_count` multiprocessors are given to static shares at a time; 0: none ever.
    """

    uuid: str
    index: int
    product: str
    pci_id: str
    geometry: Geometry
    memory_bytes: int
    mig_enabled: bool = False
    mig_toggle_needs_reset: bool = False
    instances: tuple[Instance, ...] = ()
    foreign: frozenset[Instance] = frozenset()
    cleared: frozenset[Instance] = frozenset()
    shares: Mapping[Instance | None, tuple[Share, ...]] = field(default_factory=dict)
    sm_count: int = 0
    sm_chunk: int = 0

    def partition_id(self, instance: Instance | None) -> str:
        """The name of the whole GPU (None) or of one of its instances."""
        return f"gpu{self.index}" if instance is None else f"gpu{self.index}/{instance}"

    def partition_ids(self, instance: Instance | None) -> tuple[str, ...]:
        """The names of what serves there: the place itself, or the shares it is divided into."""
        return share_ids(self.partition_id(instance), self.shares.get(instance, ()))


def share_ids(parent: str, shares: tuple[Share, ...]) -> tuple[str, ...]:
    """The partitions under a GPU or instance: itself when it is not shared."""
    if not shares:
        return (parent,)
    return tuple(f"{parent}/mps{index}" for index in range(len(shares)))


def share_identities(parent: str, shares: tuple[Share, ...]) -> dict[str, tuple[Share | None, ...]]:
    """What each partition there is: the same in two layouts, it can be kept.

    A static share is one of all the shares of its place, since none can be made among clients.
    """
    values: tuple[Share | None, ...] = shares or (None,)
    others = shares if any(each.sm_count for each in shares) else ()
    pairs = zip(share_ids(parent, shares), values, strict=True)
    return {name: (value, *others) for name, value in pairs}


@dataclass(frozen=True)
class Wanted:
    """One GPU instance that is wanted: any of `options` will do. `line` is the file's, for errors.

    `memory_bytes` and `sm_count` are the need it was written with, 0 where a profile was named.
    """

    options: tuple[Instance, ...]
    what: str
    owner: str = ""
    shares: tuple[Share, ...] = ()
    line: int = 0


@dataclass(frozen=True)
class GpuWanted:
    """What one GPU is to be cut into: `instances`, or with None the whole GPU, perhaps `shares`."""

    uuid: str
    instances: tuple[Wanted, ...] | None = None
    shares: tuple[Share, ...] = ()
    owner: str = ""
    line: int = 0


@dataclass(frozen=True)
class Costs:
    """What a change costs, in milliseconds. `move_ms` is per partition, for the models on it."""

    create_ms: float = 200.0
    destroy_ms: float = 1000.0
    mode_ms: float = 2000.0
    reset_ms: float = 10000.0
    move_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuPlan:
    """What would be done to one GPU. Names are of partitions; `chosen` goes with the wanted order.

    `downtime_ms` is how long a model of this GPU is away; 0 when none must move.
    """

    uuid: str
    index: int
    mig_change: MigChange
    reset: bool
    kept_instances: tuple[Instance, ...]
    created_instances: tuple[Instance, ...]
    destroyed_instances: tuple[Instance, ...]
    foreign_instances: tuple[Instance, ...]
    chosen: tuple[Instance, ...]
    keep: tuple[str, ...]
    create: tuple[str, ...]
    destroy: tuple[str, ...]
    move: tuple[str, ...]
    foreign: tuple[str, ...]
    cleared: tuple[Instance, ...]
    fragmentation_before: float
    fragmentation_after: float
    downtime_ms: float
    shares: Mapping[Instance | None, tuple[Share, ...]] = field(default_factory=dict)
    """What the whole GPU (None) or its instances are to be divided into."""
    owners: Mapping[str, str] = field(default_factory=dict)
    """Whom the wanted partitions are for, as far as the file says."""

    @property
    def changes(self) -> bool:
        """Whether anything would be done."""
        return bool(self.create or self.destroy or self.mig_change or self.cleared)


@dataclass(frozen=True)
class Plan:
    """What would be done to a node. `id` names exactly this current and this wanted layout."""

    id: str
    gpus: tuple[GpuPlan, ...]

    @property
    def changes(self) -> bool:
        """Whether anything would be done."""
        return any(gpu.changes for gpu in self.gpus)

    @property
    def downtime_ms(self) -> float:
        """The longest that a model is away; GPUs are changed one beside the other."""
        return max((gpu.downtime_ms for gpu in self.gpus), default=0.0)
