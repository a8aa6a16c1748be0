"""The host store: which images are in memory, who needs them, and what makes room for more.

It owns the descriptors of all images on the node, within one budget of bytes, and counts exactly:
bytes of images plus bytes of open reservations. It never maps an image and never builds one.
Images nobody holds and no user pinned make room, least recently used first. Invariant: a reserve
that cannot be met evicts nothing; an image somebody holds is never evicted. For one thread (the
daemon's event loop); no call waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from swap.errors import ImageInUse, ImageUnknown, InsufficientHostMemory
from swap.image import Manifest, read_manifest
from swap.segment import Segment


@dataclass
class _Stored:
    segment: Segment
    manifest: Manifest
    used: int
    holders: set[str] = field(default_factory=set)
    pinned: bool = False


@dataclass(frozen=True)
class StoredImage:
    """An image as listed. `holders` are those who asked that it stays, for example workers."""

    digest: str
    size_bytes: int
    weights_bytes: int
    page_bytes: int
    """Of the memory it is in; transparent huge pages show as small ones."""
    holders: tuple[str, ...]
    pinned: bool


class Reservation:
    """Bytes set aside for an image that is being built: commit it, or `give_up`."""

    def __init__(self, store: HostStore, size_bytes: int, evicted: tuple[str, ...]) -> None:
        self.size_bytes = size_bytes
        self.evicted = evicted
        """Digests that made room; whoever keeps their descriptors must close them too."""
        self._store = store

    def give_up(self) -> None:
        """Return the bytes. Idempotent, and without effect once committed."""
        self._store._reservations.discard(self)


class HostStore:
    """The images of a node, by digest, within `budget_bytes`."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._images: dict[str, _Stored] = {}
        self._reservations: set[Reservation] = set()
        self._uses = 0

    # Accounts.

    @property
    def images_bytes(self) -> int:
        return sum(stored.segment.size_bytes for stored in self._images.values())

    @property
    def reserved_bytes(self) -> int:
        return sum(reservation.size_bytes for reservation in self._reservations)

    @property
    def used_bytes(self) -> int:
        """Images and reservations; above the budget only by what was adopted."""
        return self.images_bytes + self.reserved_bytes

    @property
    def free_bytes(self) -> int:
        return max(0, self.budget_bytes - self.used_bytes)

    @property
    def evictable_bytes(self) -> int:
        return sum(self._images[digest].segment.size_bytes for digest in self._evictable())

    def images(self) -> tuple[StoredImage, ...]:
        """All images, least recently used first."""
        ordered = sorted(self._images.items(), key=lambda item: item[1].used)
        return tuple(
            StoredImage(
                digest,
                stored.segment.size_bytes,
                stored.manifest.weights_bytes,
                stored.segment.page_bytes,
                tuple(sorted(stored.holders)),
                stored.pinned,
            )
            for digest, stored in ordered
        )

    def __contains__(self, digest: object) -> bool:
        return digest in self._images

    # Putting images in.

    def reserve(self, size_bytes: int) -> Reservation:
        """Set bytes aside for a segment, evicting what is needed.

        Raises InsufficientHostMemory, having evicted nothing.
        """
        evicted = self._make_room(size_bytes)
        reservation = Reservation(self, size_bytes, evicted)
        self._reservations.add(reservation)
        return reservation

    def commit(self, reservation: Reservation, segment: Segment) -> Manifest:
        """Turn a reservation into a stored image; the store owns the segment from here on.

        If the image is there already, that one stays and the new segment is closed. Raises
        CorruptWeights when the segment holds no sealed image; it is closed and the reservation
        stays open.
        """
        if reservation not in self._reservations:
            raise ValueError("a reservation can be committed once, by the store that gave it")
        if segment.size_bytes > reservation.size_bytes:
            raise ValueError(
                f"a segment of {segment.size_bytes} bytes does not fit in the "
                f"{reservation.size_bytes} bytes that were reserved for it"
            )
        manifest = self._put(segment.detach())
        reservation.give_up()
        return manifest

    def adopt(self, descriptor: int) -> Manifest:
        """Take in an image that survived elsewhere; the store owns the descriptor from here on.

        Its memory is in use whether or not it fits the budget, so it is counted in any case; see
        `trim`. Raises CorruptWeights, with the descriptor closed.
        """
        return self._put(descriptor)

    def trim(self) -> tuple[str, ...]:
        """Evict until the budget is kept, as far as that is possible; returns the digests."""
        evicted = []
        for digest in self._evictable():
            if self.used_bytes <= self.budget_bytes:
                break
            self._forget(digest)
            evicted.append(digest)
        return tuple(evicted)

    def _put(self, descriptor: int) -> Manifest:
        segment = Segment.adopt(descriptor)  # checks the seals; closes what has none
        try:
            manifest = read_manifest(segment.descriptor)
        except BaseException:
            segment.close()
            raise
        if manifest.digest in self._images:
            segment.close()
        else:
            self._images[manifest.digest] = _Stored(segment, manifest, 0)
        self.touch(manifest.digest)
        return self._images[manifest.digest].manifest

    # Using images.

    def manifest(self, digest: str) -> Manifest:
        return self._get(digest).manifest

    def size_bytes(self, digest: str) -> int:
        return self._get(digest).segment.size_bytes

    def descriptor(self, digest: str) -> int:
        """The image's descriptor, to be sent or duplicated; it stays the store's."""
        return self._get(digest).segment.descriptor

    def acquire(self, digest: str, holder: str) -> None:
        """Keep the image for `holder` until released. Idempotent."""
        self._get(digest).holders.add(holder)
        self.touch(digest)

    def release(self, digest: str, holder: str) -> None:
        """`holder` needs the image no longer. Idempotent."""
        self._get(digest).holders.discard(holder)

    def release_all(self, holder: str) -> None:
        """`holder` is gone, with all it held."""
        for stored in self._images.values():
            stored.holders.discard(holder)

    def pin(self, digest: str) -> None:
        """A user wants the image to stay."""
        self._get(digest).pinned = True

    def unpin(self, digest: str) -> None:
        self._get(digest).pinned = False

    def touch(self, digest: str) -> None:
        """The image was used just now."""
        self._uses += 1
        self._get(digest).used = self._uses

    def drop(self, digest: str) -> None:
        """Forget an image and free its memory. Raises ImageInUse, ImageUnknown."""
        stored = self._get(digest)
        if stored.holders or stored.pinned:
            who = "a user's pin" if stored.pinned else ", ".join(sorted(stored.holders))
            raise ImageInUse(
                f"image {digest[:12]} is kept by {who}: release it first",
                digest=digest,
                holders=",".join(sorted(stored.holders)),
                pinned=stored.pinned,
            )
        self._forget(digest)

    def close(self) -> None:
        """Close every descriptor; images others hold stay in memory."""
        for digest in list(self._images):
            self._forget(digest)
        self._reservations.clear()

    # Inside.

    def _make_room(self, needed: int) -> tuple[str, ...]:
        excess = self.used_bytes + needed - self.budget_bytes
        if excess > self.evictable_bytes:
            raise InsufficientHostMemory(
                f"an image needs {needed} bytes of host memory; of the budget of "
                f"{self.budget_bytes}, {self.free_bytes} are free and {self.evictable_bytes} can "
                f"be evicted: raise the budget by {excess - self.evictable_bytes} bytes, or unload "
                "or unpin other models",
                needed_bytes=needed,
                free_bytes=self.free_bytes,
                evictable_bytes=self.evictable_bytes,
                budget_bytes=self.budget_bytes,
            )
        evicted = []
        for digest in self._evictable():
            if excess <= 0:
                break
            excess -= self._images[digest].segment.size_bytes
            self._forget(digest)
            evicted.append(digest)
        return tuple(evicted)

    def _evictable(self) -> list[str]:
        free = (
            (stored.used, digest)
            for digest, stored in self._images.items()
            if not stored.holders and not stored.pinned
        )
        return [digest for _, digest in sorted(free)]

    def _forget(self, digest: str) -> None:
        self._images.pop(digest).segment.close()

    def _get(self, digest: str) -> _Stored:
        stored = self._images.get(digest)
        if stored is None:
            raise ImageUnknown(
                f"no image {digest[:12]} in the host store: load it again", digest=digest
            )
        return stored
