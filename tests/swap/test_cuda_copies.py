"""Copies to and from a GPU: rows in one call, edges of pinned memory, what drivers may refuse."""

from __future__ import annotations

import ctypes
import random
import threading

import pytest

from swap.arena import PagePool, Region
from swap.cuda_device import CudaDevice
from swap.errors import DeviceError
from swap.fake_driver import FakeDriver
from swap.parking import ParkingArea
from swap.segment import Segment
from swap.virtual_memory import HUGE_PAGE_BYTES, VirtualMemory, view_of

PAGE = 2 << 20
KIB = 1 << 10


@pytest.fixture
def open_device():
    """Opens a device over a fake driver with the driver's options; nothing may be left of it."""
    drivers, devices = [], []

    def make(**options):
        drivers.append(FakeDriver(**options))
        devices.append(
            CudaDevice(8 * PAGE, page_bytes=PAGE, driver=drivers[-1], keep_mappings=False)
        )
        return devices[-1], drivers[-1]

    yield make
    for device, driver in zip(devices, drivers, strict=True):
        device.close()
        assert set(driver.holdings().values()) == {0}, driver.holdings()
        driver.close()


@pytest.fixture
def host():
    """Two huge pages of writable host memory, of known bytes."""
    memory = VirtualMemory()
    address = memory.reserve(2 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    memory.make_writable(address, 2 * HUGE_PAGE_BYTES)
    view_of(address, HUGE_PAGE_BYTES)[:] = random.Random(3).randbytes(HUGE_PAGE_BYTES)
    yield address
    memory.release(address, 2 * HUGE_PAGE_BYTES)


def mapped(device):
    base = device.reserve(2 * PAGE)
    device.map(base, (0, 1))
    return base


def rows_of(address, row_bytes, rows, pitch_bytes):
    return [bytes(view_of(address + row * pitch_bytes, row_bytes)) for row in range(rows)]


@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize(
    ("options", "edge", "calls"),
    [
        ({}, 0, {"cuMemcpy2DAsync": 1}),
        ({}, 64 * KIB, {"cuMemcpy2DAsync": 1}),
        # The third row lies in two registrations, so it is two copies.
        ({}, 2 * 300 + 100, {"rows": 6}),
        ({}, 2 * 300, {"rows": 5}),
        ({"pitch_bytes_max": 799}, 0, {"rows": 5}),
    ],
)
def test_rows_are_one_call_unless_the_driver_would_refuse_it(
    open_device, host, direction, options, edge, calls
):
    device, driver = open_device(**options)
    base = mapped(device)
    if edge:
        # Registrations begin and end on any byte here, as they do not in the worker.
        device.register(host, edge, writable=True)
        device.register(host + edge, HUGE_PAGE_BYTES - edge, writable=True)
    if direction == "in":
        device.wait(device.copy_in_rows(base + 8, host, 300, 5, 800))
        assert rows_of(base + 8, 300, 5, 800) == rows_of(host, 300, 5, 300)
        assert bytes(view_of(base + 308, 500)) == bytes(500)
        one = "cuMemcpyHtoDAsync"
    else:
        view_of(base, PAGE)[:] = random.Random(4).randbytes(PAGE)
        device.wait(device.copy_out_rows(host, base + 8, 300, 5, 800))
        assert rows_of(host, 300, 5, 300) == rows_of(base + 8, 300, 5, 800)
        one = "cuMemcpyDtoHAsync"
    wanted = {one if name == "rows" else name: count for name, count in calls.items()}
    assert {name: driver.calls[name] for name in wanted} == wanted
    assert device.statistics().copied_bytes == 1500


def test_a_copy_out_waits_for_kernels_on_the_device_and_for_nobody_here(open_device, host):
    device, driver = open_device()
    base = mapped(device)
    running = threading.Event()
    driver.launch(lambda: (running.wait(120), ctypes.memset(base, 5, 16)))
    first = device.copy_out(host, base, 16)
    second = device.copy_out_rows(host + KIB, base, 4, 4, 4)
    assert driver.calls["cuStreamSynchronize"] == 0
    assert not driver.event_done(device._copies.event_of(first))
    running.set()
    device.wait(first)
    device.wait(second)
    assert bytes(view_of(host, 16)) == bytes(view_of(host + KIB, 16)) == b"\x05" * 16


def test_what_fails_before_its_copy_was_issued_gives_its_event_back(open_device, host):
    device, driver = open_device()
    base = mapped(device)
    for call in ("cuStreamWaitEvent", "cuMemcpy2DAsync"):
        driver.refuse.codes[call] = "CUDA_ERROR_ILLEGAL_ADDRESS"
        with pytest.raises(DeviceError, match=call):
            device.copy_out_rows(host, base, 64, 4, 100)
    device.wait(device.copy_out_rows(host, base, 64, 4, 100))
    assert driver.calls["cuEventCreate"] == 1
    assert device.unmap(base, 2) == (0, 1)


def test_a_driver_that_unmaps_one_handle_a_call_is_asked_for_a_range_once(open_device):
    device, driver = open_device(unmaps_ranges=False)
    pool = PagePool(device)
    region = Region(pool, "weights", 6 * PAGE)
    for _ in range(3):
        region.grow(6)
        region.shrink(2)
        region.shrink(4)
    assert driver.calls["cuMemUnmap"] == 1 + 3 * 6
    assert pool.free_pages == 8
    driver.refuse.codes["cuMemSetAccess"] = "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(DeviceError, match="cuMemSetAccess"):
        region.grow(3)
    assert driver.holdings()["mappings"] == 0
    region.release()


def test_what_cannot_be_unmapped_at_all_says_so_and_stays(open_device):
    device, driver = open_device()
    region = Region(PagePool(device), "weights", 4 * PAGE)
    region.grow(4)
    driver.refuse.codes["cuMemUnmap"] = "CUDA_ERROR_NOT_PERMITTED"
    with pytest.raises(DeviceError, match="NOT_PERMITTED"):
        region.shrink(4)
    assert region.mapped_pages == device.statistics().pages_mapped == 4
    region.release()


@pytest.mark.parametrize(
    ("refusal", "says"), [("read_only", "newer driver"), ("register", "RLIMIT_MEMLOCK")]
)
def test_a_refused_registration_says_what_to_change(open_device, refusal, says):
    device, driver = open_device()
    setattr(driver.refuse, refusal, True)
    with Segment.create(PAGE, "test") as segment, segment.map() as source:
        with pytest.raises(DeviceError, match=says):
            device.register(source.address, PAGE)
        setattr(driver.refuse, refusal, False)
        device.register(source.address, PAGE)
        device.unregister(source.address)


def test_parked_kv_is_copied_through_pinned_memory_where_that_is_allowed(
    open_device, monkeypatch, caplog
):
    monkeypatch.setattr("swap.parking.REGISTER_BYTES_MAX", PAGE)
    device, driver = open_device()
    base = mapped(device)
    area = ParkingArea(3 * PAGE)
    area.open()
    assert area.pin(device) == 3 * PAGE
    assert driver.holdings()["registrations"] == 3
    pieces = area.take(3, PAGE - 4096)
    view_of(base, 2 * PAGE)[:] = random.Random(5).randbytes(2 * PAGE)
    # The second and third piece lie in two registrations each.
    for piece in pieces:
        row = (PAGE - 4096) // 4
        device.wait(device.copy_out_rows(piece, base, row, 4, PAGE // 4))
        assert rows_of(piece, row, 4, row) == rows_of(base, row, 4, PAGE // 4)
    area.give_back(pieces, PAGE - 4096)
    assert caplog.text == ""
    refused = ParkingArea(3 * PAGE)
    refused.open()
    driver.refuse.register = True
    assert refused.pin(device) == 0
    assert "RLIMIT_MEMLOCK" in caplog.text
    (piece,) = refused.take(1, PAGE)
    device.wait(device.copy_out(piece, base, PAGE))
    assert bytes(view_of(piece, PAGE)) == bytes(view_of(base, PAGE))
