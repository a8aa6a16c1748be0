"""Images in the host store: built when missing, kept by others too, mapped by workers, dropped.

It owns the way of an image from a checkpoint to every worker and out again; the store itself counts
bytes, custody keeps copies of descriptors, builders read files. It never puts weights on a device.
The invariant: whatever fails, host memory, descriptors and reservations are as they were before,
and an image that an engine needs is never dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from daemon.control.actions.disk_cache import HOLDER, DiskCache
from daemon.control.actions.spare_memory import SpareKeeper
from daemon.control.errors import ControlError, Refused
from daemon.control.failpoints import FailPoint, FailPoints
from daemon.control.processes.worker_client import WorkerClient
from daemon.control.state.failures import Failed
from daemon.control.state.planning import facts_of
from daemon.control.state.records import Facts, Failure, Stage, Version
from daemon.control.state.running import Handle
from daemon.control.state.world import World
from engine.link.build import Build, Built, Inspected, Restore, Touch
from engine.link.errors import LinkError
from swap.errors import CorruptWeights, ImageInUse, SwapError
from swap.segment import Segment
from swap.store import Reservation

log = logging.getLogger(__name__)
OPERATION = "operation"
"""How the store names operations that need an image."""


class ImageBuilder(Protocol):
    """One image builder process."""

    async def inspect(self, directory: Path, dtype: str) -> Inspected: ...
    async def build(
        self, request: Build, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> Built: ...
    async def restore(
        self, request: Restore, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> None: ...
    async def save(self, descriptor: int, path: Path) -> None: ...
    async def touch(self, request: Touch, descriptor: int) -> None: ...
    async def tokenize(self, directory: Path, text: str) -> tuple[int, ...]: ...


class Keepers(Protocol):
    """Who else holds the descriptors; custody."""

    async def keep(self, digest: str, descriptor: int) -> None: ...
    async def drop(self, digest: str) -> None: ...


Builders = Callable[[], AbstractAsyncContextManager[ImageBuilder]]


def holder(partition: str) -> str:
    """How the store names a worker that maps an image."""
    return f"worker:{partition}"


class Images:
    """Brings images into memory and workers, and out of them."""

    def __init__(
        self,
        world: World,
        builders: Builders,
        custody: Keepers,
        disk: DiskCache,
        spare: SpareKeeper,
        failpoints: FailPoints,
    ) -> None:
        self._world = world
        self._builders = builders
        self._custody = custody
        self._disk = disk
        self._spare = spare
        self._failpoints = failpoints
        # Several loads share the disk and the cores: the first come are served first.
        self._turns = asyncio.Semaphore(world.config.limits.builds_max)
        self._in_use: dict[str, int] = {}
        # On their way out: whoever wants one waits, and has it built again if it has left.
        self._leaving: set[str] = set()
        self._spread = asyncio.Event()
        # Held while images are mapped in the background, and while others are made to leave.
        self._mapping = asyncio.Lock()

    # In.

    def present(self, version: Version) -> bool:
        return bool(version.digest) and version.digest in self._world.store

    async def tokenize(self, version: Version, text: str) -> tuple[int, ...]:
        """A text in a version's tokens. Raises CallRefused where it has no usable tokenizer."""
        async with self._builders() as builder:
            return await builder.tokenize(Path(version.directory), text)

    async def ensure(self, version: Version, handle: Handle) -> tuple[str, bool]:
        """The digest of a version's image, built if it is not in the store; and whether it was.

        It is in use from then on: say `unuse`. Raises ControlError or SwapError; nothing is kept
        of a build that failed.
        """
        while version.digest in self._leaving:
            async with self._mapping:
                pass  # held until it has left, or stays after all
        if self.present(version):
            self.use(version.digest)
            return version.digest, False
        facts = facts_of(version)
        handle.update(stage=Stage.BUILDING, bytes_done=0, bytes_total=facts.weights_bytes)
        async with self._turns:
            with self._spare.loading():
                return await self._make(version, facts, handle), True

    async def _make(self, version: Version, facts: Facts, handle: Handle) -> str:
        store = self._world.store
        node = self._numa_node(handle.record.intent.partition)
        reserved_bytes = self._spare.largest_bytes(facts.segment_bytes)
        segment: Segment | None = None
        reservation, evicted = await self._make_room(reserved_bytes)
        try:
            try:
                # With the reservation: what is spare beyond it must go before anything else waits.
                segment = self._spare.segment(facts.segment_bytes, version.key, node)
            finally:
                for each in evicted:
                    await self._custody.drop(each)
            await self._failpoints.reach(FailPoint.RESERVED)
            empty, segment = segment, None  # it is filled, or closed
            segment, digest, key = await self._fill(version, facts, handle, empty, node)
            await self._failpoints.reach(FailPoint.BUILT)
            held, segment = segment, None  # the store owns it from here on, or closes it
            manifest = store.commit(reservation, held)
        finally:
            reservation.give_up()
            if segment is not None:
                segment.close()
        if manifest.digest != digest:
            store.drop(manifest.digest)
            raise CorruptWeights(
                f"the image of {version.key} says it is {manifest.digest[:12]}, and its builder "
                f"says {digest[:12]}: build it again"
            )
        # At once: whoever makes room meanwhile must not find it unused.
        self.use(digest)
        try:
            await self._custody.keep(digest, store.descriptor(digest))
            await self._failpoints.reach(FailPoint.STORED)
        except BaseException:
            self.unuse(digest)
            raise
        self._disk.save_soon(key, digest)
        return digest

    async def _make_room(self, needed_bytes: int) -> tuple[Reservation, list[str]]:
        """Reserve memory, having made those images leave that `evictions` names, and no others."""
        store = self._world.store
        async with self._mapping:
            leaving = self.evictions(needed_bytes)
            self._leaving.update(leaving)
            try:
                for digest in leaving:
                    await self._detach(digest)
                for digest in leaving:
                    store.drop(digest)
                return store.reserve(needed_bytes), leaving
            finally:
                self._leaving.difference_update(leaving)

    async def _fill(
        self, version: Version, facts: Facts, handle: Handle, segment: Segment, node: int
    ) -> tuple[Segment, str, str]:
        """A sealed segment, the caller's; its image's digest, and the key to keep it by, if any.

        The one that is given is used or closed.
        """

        def tell(done: int, total: int) -> None:
            handle.update(bytes_done=done, bytes_total=total)

        config, size_bytes = self._world.config, facts.segment_bytes
        threads = config.limits.build_threads
        try:
            async with self._builders() as builder:
                told = await builder.inspect(Path(version.directory), config.image_dtype)
                if told.segment_bytes != size_bytes:
                    raise Failed(_changed(version, size_bytes, told.segment_bytes))
                if (cached := await self._disk.find(told)) is not None:
                    path, digest = str(cached.path), cached.digest
                    request = Restore(path=path, digest=digest, threads=threads, numa_node=node)
                    if await self._disk.restore(builder, request, segment.descriptor, tell):
                        handle.update(message="its image was read from the image cache")
                        self._disk.loads["cache"] += 1
                        return segment.move(), digest, ""
                    segment.close()  # what is in it now means nothing
                    segment = self._spare.segment(size_bytes, version.key, node)
                build = Build(threads=threads, numa_node=node)
                built = await builder.build(build, segment.descriptor, tell)
                self._disk.loads["checkpoint"] += 1
                return segment.move(), built.digest, built.key
        finally:
            segment.close()

    def _numa_node(self, partition: str) -> int:
        """Of the partition's GPU; -1 where there is no partition, or its GPU does not say."""
        uuid = self._world.partitions[partition].gpu_uuid if partition else ""
        found = (gpu.numa_node for gpu in self._world.gpus if gpu.uuid == uuid)
        node = next(found, None)
        return -1 if node is None else node

    async def attach(self, digest: str, client: WorkerClient) -> None:
        """Have a worker map an image, unless it does already."""
        store = self._world.store
        store.acquire(digest, holder(client.partition))
        if digest in client.state.images:
            return
        try:
            await client.attach(digest, store.descriptor(digest))
        except BaseException:
            if digest not in client.state.images and digest in store:
                store.release(digest, holder(client.partition))
            raise

    def spread_soon(self) -> None:
        """Have every worker map every image, in the background."""
        self._spread.set()

    async def spread(self) -> None:
        """Map images wherever they are not mapped yet, for ever: a swap must not wait for it."""
        while True:
            await self._spread.wait()
            self._spread.clear()
            for client in list(self._world.processes.workers.values()):
                for image in self._world.store.images():
                    if holder(client.partition) in image.holders or client.closed:
                        continue
                    try:
                        async with self._mapping:
                            if image.digest in self._world.store:
                                await self.attach(image.digest, client)
                    except (ControlError, LinkError) as error:
                        log.warning("%s does not map an image: %s", client.partition, error)

    # Out.

    def use(self, digest: str) -> None:
        """Keep an image while an operation needs it; `unuse` when it does no longer."""
        self._world.store.acquire(digest, OPERATION)
        self._in_use[digest] = self._in_use.get(digest, 0) + 1

    def unuse(self, digest: str) -> None:
        self._in_use[digest] -= 1
        if not self._in_use[digest]:
            del self._in_use[digest]
            if digest in self._world.store:
                self._world.store.release(digest, OPERATION)

    async def drop(self, digest: str) -> None:
        """Take an image out of every worker, every keeper and the store.

        Raises CallRefused or ImageInUse when somebody needs it; it then stays in the store.
        """
        store = self._world.store
        async with self._mapping:
            if digest in self._in_use:
                raise ImageInUse(
                    f"image {digest[:12]} is needed by an operation that is under way: wait for it "
                    "(gpuctl op ls --running)",
                    digest=digest,
                )
            self._leaving.add(digest)
            try:
                await self._detach(digest)
                store.drop(digest)
            finally:
                self._leaving.discard(digest)
        await self._custody.drop(digest)

    async def discard(self, digest: str) -> None:
        """`drop`, for cleaning up: what cannot be dropped stays, and is the store's to evict."""
        try:
            await self.drop(digest)
        except (ControlError, LinkError, SwapError) as error:
            log.warning("image %s stays: %s", digest[:12], error)

    def evictions(self, needed_bytes: int) -> list[str]:
        """Digests that would leave to make room for a new image, oldest first.

        Raises Refused (INSUFFICIENT_HOST_MEMORY) with the figure that would have to change.
        """
        store = self._world.store
        needed_by = self._world.images_on_devices() | set(self._in_use)
        needed_by |= {
            version.digest
            for key in self._world.placements
            if (version := self._world.registry.get(key)) is not None
        }
        excess = store.used_bytes + needed_bytes - store.budget_bytes
        leaving: list[str] = []
        evictable_bytes = 0
        for image in store.images():
            yielding = all(name.startswith("worker:") or name == HOLDER for name in image.holders)
            if image.pinned or image.digest in needed_by or not yielding:
                continue
            if evictable_bytes < excess:
                leaving.append(image.digest)
            evictable_bytes += image.size_bytes
        if excess > evictable_bytes:
            raise Refused(
                f"an image needs {needed_bytes} bytes of host memory; of the budget of "
                f"{store.budget_bytes} (host_store.budget_bytes), {store.free_bytes} are free and "
                f"{evictable_bytes} can be evicted: raise the budget by "
                f"{excess - evictable_bytes} bytes, or unload other models",
                reason="INSUFFICIENT_HOST_MEMORY",
                metadata={
                    "needed_bytes": str(needed_bytes),
                    "free_bytes": str(store.free_bytes),
                    "evictable_bytes": str(evictable_bytes),
                    "budget_bytes": str(store.budget_bytes),
                },
            )
        return leaving

    async def _detach(self, digest: str) -> None:
        await self._disk.give_up(digest)
        held_by = {
            name
            for image in self._world.store.images()
            if image.digest == digest
            for name in image.holders
        }
        for client in list(self._world.processes.workers.values()):
            if holder(client.partition) in held_by:
                await client.detach(digest)
                if digest in self._world.store:
                    self._world.store.release(digest, holder(client.partition))

    # Coming and going of processes.

    def worker_up(self, client: WorkerClient) -> None:
        """Note what a worker maps already."""
        for digest in client.state.images:
            if digest in self._world.store:
                self._world.store.acquire(digest, holder(client.partition))
        self.apply_pins()
        self.spread_soon()

    def worker_down(self, partition: str) -> None:
        self._world.store.release_all(holder(partition))

    async def keep_all(self) -> None:
        """Give copies of every descriptor away again, to a keeper that is new."""
        for image in self._world.store.images():
            if image.digest in self._world.store:
                await self._custody.keep(image.digest, self._world.store.descriptor(image.digest))

    def adopt(self, found: dict[str, int]) -> list[str]:
        """Take in what survived elsewhere; returns digests to be dropped there, being unusable."""
        bad = []
        for digest, descriptor in found.items():
            try:
                manifest = self._world.store.adopt(descriptor)
            except CorruptWeights as error:
                log.warning("the image kept as %s is unusable: %s", digest[:12], error)
                bad.append(digest)
                continue
            if manifest.digest != digest:
                log.warning("the image kept as %s is %s", digest[:12], manifest.digest[:12])
        self.apply_pins()
        return bad

    def apply_pins(self) -> None:
        """Have the store pin what the registry says, and nothing else."""
        versions = self._world.registry.versions()
        pinned = {version.digest for version in versions if version.pinned}
        for image in self._world.store.images():
            if image.digest in pinned:
                self._world.store.pin(image.digest)
            else:
                self._world.store.unpin(image.digest)


def _changed(version: Version, before: int, now: int) -> Failure:
    return Failure(
        "CHECKPOINT_INVALID",
        f"{version.directory} has changed since it was registered (its image took {before} bytes "
        f"and would take {now}): register it as a new version",
        {"model": version.key, "directory": version.directory},
    )
