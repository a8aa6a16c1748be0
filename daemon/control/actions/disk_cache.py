"""hotbayd's side of the image cache: which load is read from disk, and what is written afterwards.

It owns the decisions and the background writing; the directory is `swap.image_cache`'s, the bytes
are a builder's. It never opens an image. Invariants: a load succeeds or fails as it would without
the cache, whatever the disk does; what is being written holds the image's memory only until
somebody needs that memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from daemon.control.errors import CallRefused, ControlError
from engine.link.build import Inspected, Restore
from engine.link.errors import LinkError
from swap.errors import CacheFailed, SwapError
from swap.image_cache import CachedImage, ImageCache
from swap.store import HostStore

SAVES_WAITING_MAX = 64
HOLDER = "image cache"
"""How the store names the cache while it writes an image."""

log = logging.getLogger(__name__)


class Restorer(Protocol):
    """A builder that has inspected a checkpoint."""

    async def restore(
        self, request: Restore, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> None: ...


class Saver(Protocol):
    """A builder that writes an image."""

    async def save(self, descriptor: int, path: Path) -> None: ...


Savers = Callable[[], AbstractAsyncContextManager[Saver]]


class DiskCache:
    """Reads images where they are known, and writes those that are not, one at a time."""

    def __init__(
        self,
        cache: ImageCache,
        store: HostStore,
        savers: Savers,
        warn: Callable[[str], None],
        *,
        packed_only: bool,
    ) -> None:
        self._cache = cache
        self._store = store
        self._savers = savers
        self._warn = warn
        self._packed_only = packed_only
        """An image that is not packed is built about as fast as it is read back."""
        self._wanted: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._saving: tuple[str, asyncio.Task[None]] | None = None
        self.loads = {"cache": 0, "checkpoint": 0}
        self.failures = 0
        self.kept_bytes = 0

    @property
    def budget_bytes(self) -> int:
        return self._cache.budget_bytes

    async def open(self) -> None:
        """Make the directory ready; without one, the node works and says so."""
        try:
            await asyncio.to_thread(self._cache.open)
            await self._count()
        except (CacheFailed, OSError) as error:
            self._cache = ImageCache(self._cache.directory, 0)
            self._trouble(str(error))

    # Reading.

    async def find(self, told: Inspected) -> CachedImage | None:
        """The image on disk of the checkpoint that was inspected."""
        return await asyncio.to_thread(self._cache.find, told.key)

    async def restore(
        self,
        builder: Restorer,
        request: Restore,
        descriptor: int,
        on_progress: Callable[[int, int], None],
    ) -> bool:
        """Have a builder read an image into a segment; False when it must be built after all.

        What cannot be read or is not what was written is removed. Raises what concerns the load
        itself: a builder that died, or no memory.
        """
        try:
            await builder.restore(request, descriptor, on_progress)
        except CallRefused as error:
            if error.reason not in ("CORRUPT_WEIGHTS", "IMAGE_CACHE_FAILED"):
                raise
            self._trouble(f"{error}; it was removed, and the image is built from its checkpoint")
            await asyncio.to_thread(self._remove, request.digest)
            await self._count()
            return False
        return True

    # Writing.

    def save_soon(self, key: str, digest: str) -> None:
        """Write an image of the store in the background, to be found by `key`."""
        if not self._cache.budget_bytes or not key or digest in self._wanted:
            return
        if self._packed_only and not self._store.manifest(digest).packed:
            return
        if len(self._wanted) >= SAVES_WAITING_MAX:
            log.info("%d images wait to be kept on disk: %s is not", len(self._wanted), digest)
            return
        self._wanted[digest] = key
        self._wake.set()

    async def give_up(self, digest: str) -> None:
        """Stop writing an image, because its memory is needed; nothing of the file is left."""
        self._wanted.pop(digest, None)
        if self._saving is not None and self._saving[0] == digest:
            task = self._saving[1]
            task.cancel()
            await asyncio.wait([task])

    async def run(self) -> None:
        """Write what is wanted, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanted:
                digest = next(iter(self._wanted))
                key = self._wanted.pop(digest)
                task = asyncio.create_task(self._save(key, digest), name=f"save {digest[:12]}")
                self._saving = (digest, task)
                try:
                    await asyncio.wait([task])
                finally:
                    self._saving = None
                    task.cancel()
                    await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error  # a bug: expected failures were told

    async def _save(self, key: str, digest: str) -> None:
        if digest not in self._store:
            return
        self._store.acquire(digest, HOLDER)
        path = self._cache.path_of(digest)
        try:
            if not await asyncio.to_thread(path.exists):
                size_bytes = self._store.size_bytes(digest)
                await asyncio.to_thread(self._cache.make_room, size_bytes)
                async with self._savers() as saver:
                    await saver.save(self._store.descriptor(digest), path)
            await asyncio.to_thread(self._cache.assign, key, digest)
        except (ControlError, LinkError, SwapError, OSError) as error:
            self._trouble(f"image {digest[:12]} is not kept on disk: {error}")
        finally:
            if digest in self._store:
                self._store.release(digest, HOLDER)
        await self._count()

    def _remove(self, digest: str) -> None:
        try:
            self._cache.remove(digest)
        except OSError as error:
            log.warning("the cached image %s cannot be removed: %s", digest, error)

    async def _count(self) -> None:
        images = await asyncio.to_thread(self._cache.images)
        self.kept_bytes = sum(image.size_bytes for image in images)

    def _trouble(self, message: str) -> None:
        self.failures += 1
        log.warning("%s", message)
        self._warn(message)
