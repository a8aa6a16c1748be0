"""What every device promises the arena; each test runs over every implementation there is."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Iterator

import pytest

from swap.errors import DeviceMisuse
from swap.virtual_memory import VirtualMemory, view_of
from tests.support.devices import FAKE, KEPT, NEEDS_GPU, DeviceFactory, device_factory, read

MIB = 1 << 20
PAGE = 2 * MIB


@pytest.fixture(params=["host", FAKE, KEPT, pytest.param("cuda", marks=NEEDS_GPU)])
def make_device(request: pytest.FixtureRequest) -> Iterator[DeviceFactory]:
    with device_factory(request.param) as make:
        yield make


@pytest.fixture
def source():
    """Host memory to copy from: two pages of known bytes, and their address."""
    content = random.Random(1).randbytes(2 * PAGE)
    buffer = ctypes.create_string_buffer(content, len(content))
    return content, ctypes.addressof(buffer), buffer


def test_what_is_copied_in_is_there(make_device, source):
    content, address, _ = source
    device = make_device(4)
    base = device.reserve(2 * PAGE)
    device.map(base, (3, 1))
    device.copy_in(base + 100, address, PAGE + 5)
    device.synchronize()
    assert device.statistics().copied_bytes == PAGE + 5
    assert read(device, base + 100, PAGE + 5) == content[: PAGE + 5]


def test_contents_travel_with_the_page(make_device, source):
    content, address, _ = source
    device = make_device(4)
    first, second = device.reserve(2 * PAGE), device.reserve(4 * PAGE)
    device.map(first, (0, 1))
    device.copy_in(first, address, 2 * PAGE)
    device.synchronize()
    assert device.unmap(first, 2) == (0, 1)
    device.map(second + PAGE, (1, 2, 0))
    assert read(device, second + PAGE, PAGE) == content[PAGE:]
    assert read(device, second + 3 * PAGE, PAGE) == content[:PAGE]


def test_prefaulting_is_done_once_wherever_pages_are(make_device, source):
    content, address, _ = source
    device = make_device(6)
    base = device.reserve(2 * PAGE)
    device.map(base, (4, 5))
    device.copy_in(base, address, 2 * PAGE)
    present = device.statistics().pages_present
    assert device.prefault(range(6)) == 6 - present
    assert device.prefault(range(6)) == 0
    assert device.statistics().pages_present == 6
    device.synchronize()
    assert read(device, base, 2 * PAGE) == content


def test_any_sequence_of_maps_keeps_every_page_and_its_contents(make_device):
    device = make_device(24)
    bases = [device.reserve(24 * PAGE) for _ in range(3)]
    stamps = [ctypes.c_uint64(page + 1000) for page in range(24)]
    shuffle = random.Random(5)
    mapped: dict[int, int] = {}
    for page in range(24):
        device.map(bases[0] + page * PAGE, (page,))
        device.copy_in(bases[0] + page * PAGE, ctypes.addressof(stamps[page]), 8)
        mapped[bases[0] + page * PAGE] = page
    device.synchronize()
    for _ in range(300):
        if mapped and shuffle.random() < 0.5:
            start = shuffle.choice(sorted(mapped))
            count = 1
            while start + count * PAGE in mapped and shuffle.random() < 0.7:
                count += 1
            pages = device.unmap(start, count)
            assert pages == tuple(mapped.pop(start + i * PAGE) for i in range(count))
        else:
            free = sorted(set(range(24)) - set(mapped.values()))
            if not free:
                continue
            pages = free[: shuffle.randint(1, len(free))]
            base = shuffle.choice(bases)
            slot = shuffle.randint(0, 24 - len(pages))
            places = [base + (slot + i) * PAGE for i in range(len(pages))]
            if any(place in mapped for place in places):
                continue
            device.map(places[0], pages)
            mapped.update(zip(places, pages, strict=True))
        for place, page in mapped.items():
            assert int.from_bytes(read(device, place, 8), "little") == page + 1000
    assert device.statistics().pages_mapped == len(mapped)


def test_consecutive_pages_move_in_one_call(make_device):
    device = make_device(16)
    base = device.reserve(16 * PAGE)
    device.map(base, range(16))
    assert device.statistics().map_calls == 1
    device.unmap(base, 16)
    assert device.statistics().map_calls == (1 if device.keeps_mappings else 2)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (lambda d, b: d.map(b, (1,)), "mapped already"),
        (lambda d, b: d.map(b + 2 * PAGE, (0,)), "mapped already"),
        (lambda d, b: d.map(b + 2 * PAGE, (1, 1)), "twice"),
        (lambda d, b: d.map(b + 2 * PAGE, (4,)), "does not exist"),
        (lambda d, b: d.map(b + 2 * PAGE, (-1,)), "does not exist"),
        (lambda d, b: d.map(b + 3 * PAGE, (1, 2)), "beyond"),
        (lambda d, b: d.map(b + MIB, (1,)), "whole pages"),
        (lambda d, b: d.map(b - PAGE, (1,)), "no reserved range"),
        (lambda d, b: d.map(b + 2 * PAGE, ()), "whole pages"),
        (lambda d, b: d.unmap(b, 2), "is mapped"),
        (lambda d, b: d.unmap(b + PAGE, 1), "is mapped"),
        (lambda d, b: d.release(b), "still has page 0"),
        (lambda d, b: d.release(b + PAGE), "not the start"),
        (lambda d, b: d.copy_in(b + PAGE, b, 8), "unmapped"),
        (lambda d, b: d.copy_in(b + PAGE - 4, b, 8), "unmapped"),
        (lambda d, b: d.copy_in(b - 8, b, 8), "no reserved range"),
        (lambda d, b: d.copy_in(b, b, 0), "0 bytes"),
        (lambda d, b: d.reserve(0), "0 bytes"),
        (lambda d, b: d.prefault((4,)), "does not exist"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(make_device, case, says):
    device = make_device(4)
    base = device.reserve(4 * PAGE)
    device.map(base, (0,))
    before = device.statistics()
    with pytest.raises(DeviceMisuse, match=says):
        case(device, base)
    assert device.statistics() == before
    assert device.unmap(base, 1) == (0,)
    device.release(base)


def test_nothing_is_unmapped_under_a_running_copy(make_device, stepped_clock, source):
    _, address, _ = source
    clock = stepped_clock(blocking=True)
    device = make_device(4, link_bytes_per_s=1e6, clock=clock)
    base = device.reserve(4 * PAGE)
    device.map(base, (0, 1, 2))
    copying = threading.Thread(
        target=lambda: device.wait(device.copy_in(base + PAGE, address, PAGE))
    )
    copying.start()
    assert clock.asleep.acquire(timeout=120)
    for start, count in ((base, 3), (base + PAGE, 1)):
        with pytest.raises(DeviceMisuse, match="running"):
            device.unmap(start, count)
    with pytest.raises(DeviceMisuse, match="running"):
        device.close()
    assert device.unmap(base, 1) == (0,)
    clock.step()
    copying.join()
    assert device.unmap(base + PAGE, 2) == (1, 2)


def test_the_memory_limit_is_in_whole_pages(make_device, source):
    _, address, _ = source
    device = make_device(3, page_bytes=4 * MIB)
    assert (device.pages_total, device.page_bytes) == (3, 4 * MIB)
    base = device.reserve(1)
    device.map(base, (2,))
    device.wait(device.copy_in(base, address, 4 * MIB))
    device.unmap(base, 1)
    with pytest.raises(DeviceMisuse, match="does not exist"):
        device.map(base, (3,))


def test_a_closed_device_refuses(make_device):
    device = make_device(2)
    base = device.reserve(PAGE)
    device.close()
    device.close()
    for call in (
        lambda: device.map(base, (0,)),
        lambda: device.reserve(PAGE),
        lambda: device.copy_in(base, base, 1),
    ):
        with pytest.raises(DeviceMisuse, match="closed"):
            call()


def test_what_is_copied_out_is_what_is_there(make_device, source):
    content, address, _ = source
    device = make_device(4)
    base = device.reserve(2 * PAGE)
    device.map(base, (2, 0))
    device.wait(device.copy_in(base, address, 2 * PAGE))
    back = ctypes.create_string_buffer(PAGE)
    device.wait(device.copy_out(ctypes.addressof(back), base + PAGE - 7, 14))
    assert back.raw[:14] == content[PAGE - 7 : PAGE + 7]
    assert back.raw[14:] == bytes(PAGE - 14)
    with pytest.raises(DeviceMisuse, match="unmapped"):
        device.copy_out(ctypes.addressof(back), base + 2 * PAGE - 1, 2)


def test_copies_are_waited_for_by_number_and_several_may_be_issued(make_device, source):
    content, address, _ = source
    device = make_device(4)
    base = device.reserve(4 * PAGE)
    device.map(base, range(4))
    copies = [device.copy_in(base + at * PAGE, address, PAGE) for at in range(4)]
    device.wait(copies[-1])
    device.wait(copies[0])  # in any order
    assert read(device, base + 3 * PAGE, PAGE) == content[:PAGE]
    device.unmap(base, 4)
    device.wait(copies[2])  # one that has long ended


def test_registered_memory_is_copied_from_and_to(make_device):
    device = make_device(2)
    base = device.reserve(PAGE)
    device.map(base, (0,))
    memory = VirtualMemory()
    address = memory.reserve(PAGE, PAGE)
    memory.make_writable(address, PAGE)
    device.register(address, MIB, writable=True)
    device.register(address + MIB, MIB, writable=True)
    view_of(address, PAGE)[:] = b"\x07" * PAGE
    device.copy_in(base, address, PAGE)  # across two registrations
    device.synchronize()
    view_of(address, PAGE)[:] = bytes(PAGE)
    device.copy_out(address, base, PAGE)
    device.synchronize()
    assert bytes(view_of(address, PAGE)) == b"\x07" * PAGE
    device.unregister(address)
    device.unregister(address + MIB)
    memory.release(address, PAGE)
