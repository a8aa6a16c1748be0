"""The marks of what is ours on the GPUs, as a change of layout or a reboot alters them.

It owns what becomes of them in memory, and says what to write. It reads no GPU and writes nothing.
The invariant: an instance is ours only with a mark that was made for it in this boot of the host.
"""

from __future__ import annotations

from daemon.control.notify import boot_id
from daemon.control.state.journal import Drop, Put
from daemon.control.state.world import World
from partitioner.cutting import LayoutChange, Owned, owned_after
from partitioner.gpu import Gpu


def marks_after(
    world: World, change: LayoutChange, gpus: dict[str, Gpu], *, forward: bool
) -> list[Put | Drop]:
    """Mark what is ours on the changed GPUs from now on, in memory, and for the journal."""
    boot = boot_id()
    changed = {each.gpu for each in change.gpus}
    before = tuple(each for each in world.owned if each.gpu in changed)
    after: tuple[Owned, ...] = tuple(
        mark
        for each in change.gpus
        if each.gpu in gpus
        for mark in owned_after(gpus[each.gpu], each, boot, forward=forward)
        # What was to be taken over, and was not, is not ours.
        if forward or any((mark.gpu, mark.place) == (old.gpu, old.place) for old in before)
    )
    world.owned = (*(each for each in world.owned if each.gpu not in changed), *after)
    return [*(Drop(each) for each in before), *(Put(each) for each in after)]


def void_marks(world: World, boot: str) -> tuple[Owned, ...]:
    """Forget, in memory, the marks of another boot; which they were."""
    void = tuple(each for each in world.owned if each.boot_id != boot)
    world.owned = tuple(each for each in world.owned if each.boot_id == boot)
    return void


def owners_after(world: World, change: LayoutChange) -> dict[str, str]:
    """Whom the partitions that are there now are for; the change says so for its GPUs."""
    changed = {each.gpu for each in change.gpus}
    elsewhere = {each.id for each in world.partitions.values() if each.gpu_uuid not in changed}
    kept = {name: owner for name, owner in world.owners.items() if name in elsewhere}
    return kept | {name: owner for name, owner in change.owners if name in world.partitions}
