"""The account of pages, and regions whose addresses never change."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from swap.arena import PagePool, Region
from swap.errors import DeviceError, DeviceMisuse, InsufficientDeviceMemory
from swap.virtual_memory import view_of
from tests.support.descriptors import open_descriptors

PAGE = 2 << 20


def test_taking_is_all_or_nothing(make_device):
    pool = PagePool(make_device(8))
    assert len(pool.take("a", 5)) == 5
    with pytest.raises(InsufficientDeviceMemory) as refused:
        pool.take("b", 4)
    assert refused.value.reason == "INSUFFICIENT_DEVICE_MEMORY"
    assert refused.value.metadata == {
        "needed_bytes": str(4 * PAGE),
        "free_bytes": str(3 * PAGE),
        "total_bytes": str(8 * PAGE),
    }
    assert (pool.free_pages, pool.owners()) == (3, {"a": 5})
    assert pool.take("b", 0) == ()
    assert pool.owners() == {"a": 5}


def test_pages_are_given_back_by_their_owner_only(make_device):
    pool = PagePool(make_device(4))
    mine, theirs = pool.take("a", 2), pool.take("b", 1)
    for owner, pages in (
        ("b", mine),
        ("a", (*mine, *theirs)),
        ("a", mine[:1] * 2),
        ("a", (3,)),
        ("a", (-1,)),
        ("a", (4,)),
    ):
        with pytest.raises(DeviceMisuse):
            pool.give_back(owner, pages)
        assert pool.owners() == {"a": 2, "b": 1}
    pool.give_back("a", mine)
    assert pool.owners() == {"b": 1}
    assert pool.free_pages == 3


def test_runs_stay_contiguous(make_device):
    pool = PagePool(make_device(16))
    first, second, third = pool.take("a", 4), pool.take("b", 4), pool.take("c", 4)
    assert (first, third) == (tuple(range(4)), tuple(range(8, 12)))
    pool.give_back("a", first)
    # The hole of exactly four is a better fit than the four at the end are for three.
    assert pool.take("d", 4) == (0, 1, 2, 3)
    pool.give_back("b", second)
    assert pool.take("e", 8) == (*second, 12, 13, 14, 15)


def test_the_account_is_exact_after_any_sequence(make_device):
    device = make_device(32)
    pool = PagePool(device)
    held: dict[str, list[int]] = {}
    choose = random.Random(11)
    for _ in range(2000):
        owner = choose.choice("abcd")
        pages = held.setdefault(owner, [])
        if choose.random() < 0.5:
            count = choose.randint(0, 12)
            free = 32 - sum(map(len, held.values()))
            if count > free:
                with pytest.raises(InsufficientDeviceMemory):
                    pool.take(owner, count)
            else:
                pages += pool.take(owner, count)
        else:
            choose.shuffle(pages)
            given = [pages.pop() for _ in range(choose.randint(0, len(pages)))]
            pool.give_back(owner, given)
        everything = [page for pages in held.values() for page in pages]
        assert len(set(everything)) == len(everything)
        assert pool.free_pages == 32 - len(everything)
        assert pool.owners() == {name: len(pages) for name, pages in held.items() if pages}


def test_a_region_keeps_its_address_and_contents_while_it_grows_and_shrinks(make_device):
    pool = PagePool(make_device(8))
    region = Region(pool, "kv", 8 * PAGE)
    address = region.address
    region.grow(2)
    view_of(region.address, 2 * PAGE)[PAGE] = 42
    blocker = pool.take("other", 1)
    region.grow(3)
    assert (region.address, region.mapped_pages, region.mapped_bytes) == (address, 5, 5 * PAGE)
    assert view_of(region.address, 5 * PAGE)[PAGE] == 42
    region.shrink(3)
    assert view_of(region.address, 2 * PAGE)[PAGE] == 42
    assert pool.owned_pages("kv") == 2
    pool.give_back("other", blocker)
    region.release()
    region.release()
    assert (pool.free_pages, pool.owners()) == (8, {})
    assert pool.device.statistics().reservations == 0


def test_a_region_has_bounds(make_device):
    pool = PagePool(make_device(8))
    region = Region(pool, "weights", 3 * PAGE - 1)
    assert region.pages_max == 3
    region.grow(0)
    for call in (lambda: region.grow(4), lambda: region.grow(-1), lambda: region.shrink(1)):
        with pytest.raises(DeviceMisuse):
            call()
    region.grow(3)
    with pytest.raises(DeviceMisuse):
        region.grow(1)
    region.release()
    with pytest.raises(DeviceMisuse):
        region.grow(1)


def test_a_region_that_cannot_grow_is_as_it_was(make_device, monkeypatch):
    device = make_device(4)
    pool = PagePool(device)
    region = Region(pool, "weights", 8 * PAGE)
    region.grow(1)
    with pytest.raises(InsufficientDeviceMemory):
        region.grow(4)

    def refuse(address, pages):
        raise DeviceError("no")

    monkeypatch.setattr(device, "map", refuse)
    with pytest.raises(DeviceError):
        region.grow(2)
    monkeypatch.undo()
    assert (region.mapped_pages, pool.free_pages, pool.owners()) == (1, 3, {"weights": 1})


def _mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_a_thousand_cycles_leave_nothing_behind(make_device):
    device = make_device(16)
    pool = PagePool(device)
    device.prefault(range(16))
    choose = random.Random(3)

    def cycle() -> None:
        weights, kv = Region(pool, "weights", 16 * PAGE), Region(pool, "kv", 16 * PAGE)
        weights.grow(choose.randint(1, 6))
        kv.grow(choose.randint(1, 6))
        weights.shrink(choose.randint(0, weights.mapped_pages))
        weights.grow(choose.randint(0, 4))
        kv.shrink(choose.randint(0, kv.mapped_pages))
        weights.release()
        kv.release()

    for _ in range(20):
        cycle()
    before = device.statistics()
    descriptors, mappings = len(open_descriptors()), _mappings()
    for _ in range(1000):
        cycle()
    after = device.statistics()
    assert (after.pages_mapped, after.reservations, after.pages_present) == (0, 0, 16)
    assert after.map_calls > before.map_calls
    assert pool.free_pages == 16
    assert len(open_descriptors()) == descriptors
    # The interpreter's own allocator may come and go by a mapping or two; a leak is thousands.
    assert _mappings() <= mappings + 4


def test_pages_that_were_taken_are_mapped_by_any_thread_once(make_device):
    pool = PagePool(make_device(8))
    region = Region(pool, "KV", 8 * PAGE)
    region.grow(1)
    growth = region.begin_grow(3)
    # The account is of now, the mapping of when somebody does it.
    assert (region.mapped_pages, region.growing_pages, pool.owners()) == (1, 3, {"KV": 4})
    threads = [threading.Thread(target=growth.run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert growth.ended
    assert (region.mapped_pages, region.growing_pages, pool.owners()) == (4, 0, {"KV": 4})
    view_of(region.address, 4 * PAGE)[-1] = 1
    for change in (lambda: region.grow(1), lambda: region.shrink(1), region.release):
        region.begin_grow(1)  # whatever comes next waits for it
        change()
    assert pool.free_pages == 8


def test_a_growth_that_fails_has_never_been(make_device, monkeypatch):
    device = make_device(8)
    pool = PagePool(device)
    region = Region(pool, "KV", 8 * PAGE)
    region.grow(2)

    def refuse(address, pages):
        raise DeviceError("no memory left")

    monkeypatch.setattr(device, "map", refuse)
    growth = region.begin_grow(3)
    with pytest.raises(DeviceError):
        growth.run()
    growth.run()
    assert (region.mapped_pages, region.growing_pages, pool.owners()) == (2, 0, {"KV": 2})
    region.begin_grow(3)
    with pytest.raises(DeviceError):
        region.settle()
    region.begin_grow(3)
    region.shrink(1)  # for which it matters to nobody
    assert pool.owners() == {"KV": 1}
    others = pool.take("others", 1)
    with pytest.raises(InsufficientDeviceMemory):
        region.begin_grow(7)
    assert (region.growing_pages, pool.owners()) == (0, {"KV": 1, "others": 1})
    pool.give_back("others", others)
    monkeypatch.undo()
    region.release()
    assert pool.free_pages == 8
