"""The world as a starting daemon knows it: what the journal remembers, and the GPUs that are there.

It owns nothing but the putting together. The invariant: what an earlier boot of the host voids is
left out, and said where it matters.
"""

from __future__ import annotations

from daemon.control.config import Config
from daemon.control.notify import boot_id
from daemon.control.state.closures import Closures
from daemon.control.state.health_book import HealthBook
from daemon.control.state.journal import Contents
from daemon.control.state.registry import Inspectors, Registry
from daemon.control.state.world import World
from partitioner.gpu import Gpu
from partitioner.mps.places import MpsPlaces
from partitioner.partition import partitions_of
from swap.store import HostStore


def make_world(
    config: Config,
    contents: Contents,
    gpus: tuple[Gpu, ...],
    inspectors: Inspectors,
    places: MpsPlaces,
) -> World:
    """What the journal remembers, and the GPUs that were found."""
    registry = Registry(inspectors, config.image_dtype, config.limits.models_max)
    registry.restore(contents)
    store = HostStore(config.host_store.budget_bytes)
    partitions = partitions_of(gpus, contents.owned, boot_id(), places.noted())
    world = World(config, registry, store, partitions, gpus, contents.links)
    world.owned = contents.owned
    world.closures = Closures(contents.cordons)
    # A reboot resets every GPU: what was wrong before it is told again if it still is.
    world.health = HealthBook(each for each in contents.units if each.boot_id == boot_id())
    world.closures.taints = world.health.taints(partitions)
    for placement in contents.placements:
        world.placed(placement)
    if contents.warning:
        world.warnings.append(contents.warning)
    return world
