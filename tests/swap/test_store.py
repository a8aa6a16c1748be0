"""The host store's account, against a simple model of it and against /proc."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swap.errors import CorruptWeights, ImageInUse, ImageUnknown, InsufficientHostMemory
from swap.image import TensorRecipe, complete, plan_image, segment_bytes
from swap.segment import Segment
from swap.store import HostStore, Reservation
from swap.writing import write_manifest
from tests.support.descriptors import listed_descriptors, open_descriptors


def image_of(seed: int) -> tuple[str, Segment]:
    """A sealed image of zeros, 1 to 4 pages long, which `seed` alone decides."""
    recipe = TensorRecipe("t", 0, ("s",), (1 + 1024 * (seed % 4),))
    layout = plan_image([recipe], "float32", {"seed": seed})
    segment = Segment.create(segment_bytes(layout), f"{seed}")
    manifest = complete(layout, {"t": f"{seed:032x}"})
    write_manifest(segment.descriptor, manifest)
    segment.seal()
    return manifest.digest, segment


def stored(store: HostStore, seed: int) -> str:
    digest, segment = image_of(seed)
    reservation = store.reserve(segment.size_bytes)
    assert store.commit(reservation, segment).digest == digest
    assert segment.closed
    return digest


def test_least_recently_used_images_make_room():
    store = HostStore(budget_bytes=4 * 8192)
    digests = [stored(store, seed) for seed in (0, 4, 8, 12)]
    assert (store.used_bytes, store.free_bytes) == (4 * 8192, 0)
    store.touch(digests[0])
    store.pin(digests[1])
    store.acquire(digests[2], "worker a")
    assert store.evictable_bytes == 2 * 8192
    reservation = store.reserve(8192)
    assert reservation.evicted == (digests[3],)
    with pytest.raises(InsufficientHostMemory) as refused:
        store.reserve(2 * 8192)
    assert refused.value.metadata == {
        "needed_bytes": "16384",
        "free_bytes": "0",
        "evictable_bytes": "8192",
        "budget_bytes": "32768",
    }
    assert "by 8192 bytes" in str(refused.value)
    assert [image.digest for image in store.images()] == [digests[1], digests[0], digests[2]]
    reservation.give_up()
    reservation.give_up()
    assert store.used_bytes == 3 * 8192
    store.close()


def test_holders_and_pins_keep_an_image():
    store = HostStore(1 << 20)
    digest = stored(store, 1)
    store.acquire(digest, "gpu0")
    store.acquire(digest, "gpu0")
    store.acquire(digest, "gpu1")
    store.pin(digest)
    assert store.images()[0].holders == ("gpu0", "gpu1")
    with pytest.raises(ImageInUse) as refused:
        store.drop(digest)
    assert refused.value.metadata["holders"] == "gpu0,gpu1"
    store.unpin(digest)
    store.release(digest, "gpu0")
    store.release(digest, "nobody")
    with pytest.raises(ImageInUse, match="gpu1"):
        store.drop(digest)
    store.release_all("gpu1")
    store.drop(digest)
    assert digest not in store
    for call in (store.drop, store.pin, store.manifest, store.descriptor, store.touch):
        with pytest.raises(ImageUnknown):
            call(digest)
    store.close()


def test_the_same_image_twice_is_kept_once():
    store = HostStore(1 << 20)
    digest = stored(store, 2)
    first = store.descriptor(digest)
    assert stored(store, 2) == digest
    assert store.descriptor(digest) == first
    assert store.used_bytes == store.images()[0].size_bytes
    store.close()


def test_what_is_no_image_is_not_committed():
    store = HostStore(1 << 20)
    descriptors = len(open_descriptors())
    reservation = store.reserve(8192)
    unfinished = Segment.create(8192, "unfinished")
    with pytest.raises(CorruptWeights, match="not sealed"):
        store.commit(reservation, unfinished)
    empty = Segment.create(8192, "empty")
    empty.seal()
    with pytest.raises(CorruptWeights, match="trailer"):
        store.commit(reservation, empty)
    assert unfinished.closed
    assert empty.closed
    assert len(open_descriptors()) == descriptors
    assert (store.images(), store.used_bytes) == ((), 8192)
    _, large = image_of(3)
    with pytest.raises(ValueError, match="does not fit"):
        store.commit(reservation, large)
    large.close()
    reservation.give_up()
    _, late = image_of(0)
    with pytest.raises(ValueError, match="once"):
        store.commit(reservation, late)
    late.close()
    assert store.used_bytes == 0


def test_survivors_are_adopted_even_beyond_the_budget():
    store = HostStore(2 * 8192)
    digests = []
    for seed in (0, 4, 8):
        digest, segment = image_of(seed)
        digests.append(store.adopt(segment.descriptor).digest)
        assert digests[-1] == digest
    assert store.used_bytes == 3 * 8192
    assert store.free_bytes == 0
    with pytest.raises(InsufficientHostMemory):
        store.reserve(3 * 8192)
    store.acquire(digests[0], "gpu0")
    assert store.trim() == (digests[1],)
    assert store.trim() == ()
    store.close()


class StoreMachine(RuleBasedStateMachine):
    """The store against a dictionary: same images, same bytes, same evictions."""

    BUDGET = 7 * 8192

    def __init__(self) -> None:
        super().__init__()
        self.descriptors = len(open_descriptors())
        self.store = HostStore(self.BUDGET)
        self.sizes: dict[str, int] = {}
        self.order: list[str] = []
        self.holders: dict[str, set[str]] = {}
        self.pinned: set[str] = set()
        self.reservations: list[Reservation] = []

    def teardown(self) -> None:
        self.store.close()
        assert len(listed_descriptors()) == self.descriptors

    def _free_to_go(self) -> list[str]:
        return [d for d in self.order if not self.holders[d] and d not in self.pinned]

    def _gone(self, digest: str) -> None:
        self.order.remove(digest)
        del self.sizes[digest], self.holders[digest]

    def _reserve(self, size: int) -> Reservation | None:
        used = sum(self.sizes.values()) + sum(r.size_bytes for r in self.reservations)
        expected, free = [], self.BUDGET - used
        for digest in self._free_to_go():
            if free >= size:
                break
            free += self.sizes[digest]
            expected.append(digest)
        if free < size:
            with pytest.raises(InsufficientHostMemory):
                self.store.reserve(size)
            return None
        reservation = self.store.reserve(size)
        assert list(reservation.evicted) == expected
        for digest in expected:
            self._gone(digest)
        return reservation

    @rule(size=st.integers(1, 9).map(lambda pages: pages * 4096))
    def reserve(self, size: int) -> None:
        reservation = self._reserve(size)
        if reservation is not None:
            self.reservations.append(reservation)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        reservation = data.draw(st.sampled_from(self.reservations))
        self.reservations.remove(reservation)
        reservation.give_up()

    @rule(seed=st.integers(0, 9))
    def build(self, seed: int) -> None:
        digest, segment = image_of(seed)
        size = segment.size_bytes
        reservation = self._reserve(size)
        if reservation is None:
            segment.close()
            return
        self.store.commit(reservation, segment)
        self.sizes[digest] = size
        self.holders.setdefault(digest, set())
        self.order = [d for d in self.order if d != digest] + [digest]

    @precondition(lambda self: self.order)
    @rule(data=st.data(), holder=st.sampled_from("ab"))
    def acquire_or_release(self, data: st.DataObject, holder: str) -> None:
        digest = data.draw(st.sampled_from(sorted(self.order)))
        if holder in self.holders[digest]:
            self.store.release(digest, holder)
            self.holders[digest].discard(holder)
        else:
            self.store.acquire(digest, holder)
            self.holders[digest].add(holder)
            self.order = [d for d in self.order if d != digest] + [digest]

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def pin_or_unpin(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.order)))
        if digest in self.pinned:
            self.store.unpin(digest)
        else:
            self.store.pin(digest)
        self.pinned ^= {digest}

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.order)))
        if digest in self._free_to_go():
            self.store.drop(digest)
            self._gone(digest)
        else:
            with pytest.raises(ImageInUse):
                self.store.drop(digest)

    @rule(holder=st.sampled_from("ab"))
    def holder_dies(self, holder: str) -> None:
        self.store.release_all(holder)
        for holders in self.holders.values():
            holders.discard(holder)

    @invariant()
    def the_account_is_exact(self) -> None:
        reserved = sum(r.size_bytes for r in self.reservations)
        assert [image.digest for image in self.store.images()] == self.order
        assert self.store.images_bytes == sum(self.sizes.values())
        assert self.store.reserved_bytes == reserved
        assert self.store.used_bytes <= self.BUDGET
        assert self.store.evictable_bytes == sum(self.sizes[d] for d in self._free_to_go())
        assert len(listed_descriptors()) == self.descriptors + len(self.order)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
