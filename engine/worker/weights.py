"""A model's weights on this worker: their addresses, the pages they have, and how much has landed.

Owns the weights' region and the copy that fills it. It never decides when anything is copied, and
never touches KV or the engine. Invariants: what is counted as there are the first bytes, and they
stay until their pages go, which they do from the last one on; all of them count only once they were
verified, or were staged whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from engine.unpackers import open_unpacker
from engine.worker.images import Image
from engine.worker.measures import weight_views
from swap.arena import PagePool, Region
from swap.errors import SwapError
from swap.image import Manifest
from swap.packed_transfer import PackedTransfer
from swap.pieces import device_bytes, run_of, stored_bytes_behind, whole_pieces_bytes
from swap.shared_link import Turn
from swap.transfer import Reached, Transfer

STAGING_COPY_BYTES_MAX = 4 << 20
"""Copied per call while staging: about what an exchange, or a request's KV, may wait for."""


def room_bytes(manifest: Manifest, there_bytes: int, wanted_bytes: int) -> int:
    """Memory in which the first `wanted_bytes` of an image's weights can be brought in, while the
    first `there_bytes` are there."""
    if not manifest.packed:
        return wanted_bytes
    run = run_of(manifest, there_bytes, wanted_bytes)
    return max(run.room_bytes, min(wanted_bytes, there_bytes))


class ResidentWeights:
    """The weights of one image in a range of addresses that never changes. On the step thread."""

    def __init__(self, model: str, image: Image, pool: PagePool) -> None:
        self.manifest = image.manifest
        self.transfer: Transfer | None = None
        """The copy that fills the pages, until what it brought is verified."""
        self._image = image
        self._pool = pool
        self._region = Region(pool, f"{model} weights", device_bytes(image.manifest))
        self._there_bytes = 0
        try:
            self.tensors = weight_views(image.manifest, self._region)
        except BaseException:
            self._region.release()
            raise

    @property
    def address(self) -> int:
        return self._region.address

    @property
    def size_bytes(self) -> int:
        """All of the weights, unpacked."""
        return self.manifest.weights_bytes

    @property
    def pages(self) -> int:
        """Pages they have now."""
        return self._region.mapped_pages

    @property
    def pages_max(self) -> int:
        """Pages they need."""
        return self._region.pages_max

    @property
    def pages_missing(self) -> int:
        return self.pages_max - self.pages

    @property
    def mapped_bytes(self) -> int:
        """Of the weights, what there is memory for."""
        return min(self.size_bytes, self._region.mapped_bytes)

    @property
    def staged_bytes(self) -> int:
        """The first bytes that are there."""
        return self._there_bytes

    @property
    def whole(self) -> bool:
        """Whether all are there, verified."""
        return self._there_bytes == self.size_bytes

    @property
    def copy_bytes(self) -> int:
        """What has to be copied before they are whole."""
        if self.whole or not self.manifest.packed:
            return self.size_bytes - self._there_bytes
        return stored_bytes_behind(self.manifest, self._there_bytes)

    @property
    def landing(self) -> bool:
        """Whether a step may have to wait for some of them."""
        return self.transfer is not None and not self.transfer.complete

    def grow(self, pages: int) -> None:
        """Have so many pages more. Raises InsufficientDeviceMemory, changing nothing."""
        self._region.grow(pages)
        if self.transfer is not None:
            self.transfer.backed(self._region.mapped_bytes)

    def shrink(self, pages: int) -> int:
        """Give the last pages back; returns bytes of weights. Nothing may be copying into them."""
        before = self.mapped_bytes
        self._region.shrink(pages)
        self._keep(self._region.mapped_bytes)
        return before - self.mapped_bytes

    def pages_for(self, wanted_bytes: int) -> int:
        """Pages in which the first `wanted_bytes` can be brought in, with what is there."""
        return self._pool.pages_for(room_bytes(self.manifest, self._there_bytes, wanted_bytes))

    def load(
        self,
        turn: Turn,
        under_way: Callable[[], None],
        reached: Reached,
        *,
        staging: bool,
        growing: bool,
    ) -> Transfer:
        """Begin to copy what is not there yet; for `staging` into the pages there are, in short
        calls. With `growing` pages may still come. `reached` is the transfer's."""
        device, image = self._pool.device, self._image
        copy_bytes_max = STAGING_COPY_BYTES_MAX if staging else None
        if self.manifest.packed:
            unpacker = open_unpacker(device.kind, self.address, device_bytes(self.manifest))
            self.transfer = PackedTransfer(
                device,
                self.manifest,
                image.source,
                self._region,
                unpacker,
                growing=growing,
                copy_bytes_max=copy_bytes_max,
                there_bytes=self._there_bytes,
                room_bytes=self._region.mapped_bytes if staging else None,
                turn=turn,
                under_way=under_way,
                reached=reached,
            )
        else:
            self.transfer = Transfer(
                device,
                self.manifest,
                image.source,
                self._region,
                growing=growing,
                copy_bytes_max=copy_bytes_max,
                start_bytes=self._there_bytes,
                end_bytes=self.mapped_bytes if staging else None,
                turn=turn,
                under_way=under_way,
                reached=reached,
            )
        self.transfer.start()
        return self.transfer

    def landed(self) -> None:
        """What was copied is there, and verified if those are all."""
        assert self.transfer is not None
        complete = self.transfer.complete
        self._there_bytes = self.size_bytes if complete else self.transfer.landed_bytes

    def settle(self) -> None:
        """End the copy under way, which takes one call at most: what has landed stays.

        The last page does not count: what is whole counts as verified, and this is not.
        """
        transfer, self.transfer = self.transfer, None
        if transfer is None:
            return
        transfer.cancel()
        with contextlib.suppress(SwapError):  # whoever waits for it hears of it
            transfer.join()
        self._there_bytes = transfer.landed_bytes
        self._keep(min((self.pages_max - 1) * self._pool.page_bytes, self.size_bytes - 1))

    def _keep(self, most_bytes: int) -> None:
        """Of what is there at most so many bytes go on counting, and only whole pieces."""
        if self._there_bytes > most_bytes:
            packed = self.manifest.packed
            kept = whole_pieces_bytes(self.manifest, most_bytes) if packed else most_bytes
            self._there_bytes = kept

    def release(self) -> None:
        """Give pages and addresses back."""
        self._region.release()
