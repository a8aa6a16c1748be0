"""Mappings that outlive a page's being there: what swaps cost the driver, and who owns what."""

from __future__ import annotations

import collections
import ctypes
import random

import pytest

from swap.arena import PagePool, Region
from swap.cuda_device import CudaDevice
from swap.cuda_driver import INVALID_VALUE
from swap.errors import DeviceError, DeviceMisuse, InsufficientDeviceMemory
from swap.fake_driver import FakeDriver
from tests.support.devices import read

MIB = 1 << 20
PAGE = 2 * MIB
HANDLE = 64 * MIB
WEIGHTS_8B = 240
"""Handles of 64 MiB that 16.06 GB take."""
MAPPING = ("cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemCreate", "cuMemRelease")


class Watched(FakeDriver):
    """Has every copy's addresses looked up, in an account of the test's, when it is issued."""

    owned: collections.abc.Callable[[int], bool] | None = None

    def memcpy_to_device(self, destination, source, size, stream):
        assert self.owned is None or self.owned(destination), hex(destination)
        super().memcpy_to_device(destination, source, size, stream)

    def memcpy_to_host(self, destination, source, size, stream):
        assert self.owned is None or self.owned(source), hex(source)
        super().memcpy_to_host(destination, source, size, stream)


@pytest.fixture
def driver():
    fake = Watched()
    yield fake
    assert set(fake.holdings().values()) == {0}, fake.holdings()
    fake.close()


def mapping_calls(driver: FakeDriver) -> dict[str, int]:
    return {name: driver.calls[name] for name in MAPPING if driver.calls[name]}


def less(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in after.items() if n != before.get(name, 0)}


@pytest.mark.parametrize("kept", [True, False])
def test_calls_of_an_eviction_and_a_mapping_of_8b(driver, kept):
    device = CudaDevice(260 * HANDLE, page_bytes=HANDLE, driver=driver, keep_mappings=kept)
    device.prefault(range(260))
    pool = PagePool(device)
    models = []
    for name in "ab":
        kv = Region(pool, f"{name} KV", 260 * HANDLE, from_end=True)
        models.append((Region(pool, f"{name} weights", WEIGHTS_8B * HANDLE), kv))
    seen = []
    for number in range(6):
        weights, kv = models[number % 2]
        before = mapping_calls(driver)
        weights.grow(WEIGHTS_8B)
        kv.grow(4 + number)
        mapped = mapping_calls(driver)
        weights.shrink(WEIGHTS_8B)
        kv.shrink(4 + number)
        seen.append((less(mapped, before), less(mapping_calls(driver), mapped)))
    if kept:
        first, second, *later = seen
        assert first == ({"cuMemMap": WEIGHTS_8B + 4, "cuMemSetAccess": 2}, {})
        assert second == ({"cuMemMap": WEIGHTS_8B + 5, "cuMemSetAccess": 2}, {})
        # What grows beyond what a model had before is all that is mapped, never its weights.
        assert later == [({"cuMemMap": 2, "cuMemSetAccess": 1}, {})] * 4
    else:
        assert seen == [
            ({"cuMemMap": WEIGHTS_8B + 4 + n, "cuMemSetAccess": 2}, {"cuMemUnmap": 2})
            for n in range(6)
        ]
    for region in (one for model in models for one in model):
        region.release()
    device.close()


def test_only_pages_that_others_have_are_mapped_anew(driver):
    device = CudaDevice(8 * PAGE, page_bytes=PAGE, driver=driver)
    pool = PagePool(device)
    weights, other = Region(pool, "weights", 4 * PAGE), Region(pool, "other", 4 * PAGE)
    weights.grow(4)
    assert weights.pages == (0, 1, 2, 3)
    weights.shrink(4)
    assert pool.take("kept KV", 2, (9, 1, 2)[1:]) == (1, 2)
    before = mapping_calls(driver)
    weights.grow(4)
    assert weights.pages == (0, 4, 5, 3)
    assert less(mapping_calls(driver), before) == {
        "cuMemCreate": 2, "cuMemMap": 2, "cuMemSetAccess": 1, "cuMemUnmap": 1,
    }  # fmt: skip
    with pytest.raises(InsufficientDeviceMemory):
        other.grow(3)
    pool.give_back("kept KV", (1, 2))
    weights.release()
    other.release()
    device.close()


def test_addresses_whose_page_has_gone_are_refused_to_copies(driver):
    device = CudaDevice(2 * PAGE, page_bytes=PAGE, driver=driver)
    base = device.reserve(2 * PAGE)
    device.map(base, (0, 1))
    device.unmap(base + PAGE, 1)
    buffer = ctypes.create_string_buffer(16)
    for copy in (device.copy_in, device.copy_out):
        arguments = (base + PAGE, ctypes.addressof(buffer))
        if copy == device.copy_out:
            arguments = arguments[::-1]
        with pytest.raises(DeviceMisuse, match="unmapped"):
            copy(*arguments, 16)
    assert driver.holdings()["mappings"] == 2
    assert device.statistics().pages_mapped == 1
    device.close()


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess", "cuMemUnmap"])
def test_a_remapping_that_fails_leaves_nothing_of_its_own(driver, call):
    device = CudaDevice(4 * PAGE, page_bytes=PAGE, driver=driver)
    base = device.reserve(3 * PAGE)
    device.map(base, (0, 1, 2))
    device.unmap(base, 3)
    driver.refuse.codes[call] = INVALID_VALUE
    # A refused unmapping of one handle is not tried otherwise: there is no other way.
    with pytest.raises(DeviceError, match=INVALID_VALUE):
        device.map(base, (0, 3, 2))
    assert device.statistics().pages_mapped == 0
    device.map(base, (0, 3, 2))
    assert device.unmap(base, 3) == (0, 3, 2)
    device.close()


@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_gives_a_page_two_owners_or_mixes_their_contents(driver, seed):
    """Weights that come and go whole, KV that grows and shrinks, regions that are made and end."""
    pages = 24
    device = CudaDevice(pages * PAGE, page_bytes=PAGE, driver=driver)
    pool, choose = PagePool(device), random.Random(seed)
    regions: dict[int, Region] = {}
    stamps: dict[Region, list[int]] = {}
    counter = 0

    def owned(address: int) -> bool:
        return any(one.address <= address < one.address + one.mapped_bytes for one in stamps)

    driver.owned = owned
    for _ in range(400):
        slot = choose.randrange(5)
        region = regions.get(slot)
        if region is None:
            kv = slot >= 3
            region = Region(pool, f"{slot}", (pages if kv else 5 + slot) * PAGE, from_end=kv)
            regions[slot], stamps[region] = region, []
        elif choose.random() < 0.03:
            del regions[slot], stamps[region]
            region.release()
            continue
        whole = region.pages_max if slot < 3 else choose.randint(1, 4)
        if region.mapped_pages and choose.random() < 0.5:
            count = region.mapped_pages if slot < 3 else min(whole, region.mapped_pages)
            region.shrink(count)
            del stamps[region][-count:]
        elif region.mapped_pages + whole <= region.pages_max and whole <= pool.free_pages:
            region.grow(whole)
            for place in range(region.mapped_pages - whole, region.mapped_pages):
                counter += 1
                stamp = ctypes.c_uint64(counter)
                device.copy_in(region.address + place * PAGE, ctypes.addressof(stamp), 8)
                device.synchronize()
                stamps[region].append(counter)
        held = [page for one in stamps for page in one.pages]
        assert len(held) == len(set(held)) == pages - pool.free_pages
        assert device.statistics().pages_mapped == len(held)
    for region, expected in stamps.items():
        found = [read(device, region.address + n * PAGE, 8) for n in range(len(expected))]
        assert [int.from_bytes(one, "little") for one in found] == expected
        region.release()
    device.close()
