"""The fake driver refuses what the driver refuses: each rule broken once."""

from __future__ import annotations

import ctypes
import threading

import pytest

from swap.cuda_driver import DEFAULT_STREAM, DriverError, Rows
from swap.fake_driver import FakeDriver
from swap.segment import Segment
from swap.virtual_memory import view_of

MIB = 1 << 20
PAGE = 2 * MIB


@pytest.fixture
def driver():
    fake = FakeDriver(memory_bytes=4 * PAGE)
    fake.init()
    fake.context_set_current(fake.primary_context_retain(fake.device_get(0)))
    yield fake
    fake.close()


@pytest.fixture
def mapped(driver):
    """Four reserved pages, of which two are mapped and accessible; and the handles."""
    base = driver.mem_address_reserve(4 * PAGE, 0)
    handles = [driver.mem_create(PAGE, 0) for _ in range(2)]
    for index, handle in enumerate(handles):
        driver.mem_map(base + index * PAGE, PAGE, handle)
    driver.mem_set_access(base, 2 * PAGE, 0)
    return base, handles


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (lambda d, b, h: d.mem_address_reserve(MIB, 0), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_address_reserve(PAGE, 3), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_create(MIB, 0), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_create(PAGE, 1), "INVALID_DEVICE"),
        (lambda d, b, h: d.mem_create(4 * PAGE, 0), "OUT_OF_MEMORY"),
        (lambda d, b, h: d.mem_map(b, PAGE, h[0]), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_map(b + 4 * PAGE, PAGE, h[0]), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_map(b + 2 * PAGE + MIB, PAGE, h[0]), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_map(b + 2 * PAGE, 2 * PAGE, h[0]), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_map(b + 2 * PAGE, PAGE, 7), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_set_access(b, 3 * PAGE, 0), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_unmap(b, MIB), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_unmap(b, 3 * PAGE), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_unmap(b + 2 * PAGE, PAGE), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_address_free(b, 4 * PAGE), "INVALID_VALUE"),
        (lambda d, b, h: d.mem_release(7), "INVALID_VALUE"),
        (lambda d, b, h: d.memcpy_to_device(b + 2 * PAGE, b, 1, 1), "INVALID_VALUE"),
        (lambda d, b, h: d.memcpy_to_device(b, b, 0, 1), "INVALID_VALUE"),
        (lambda d, b, h: d.memcpy_to_device(b, b, 1, 99), "INVALID_HANDLE"),
        (lambda d, b, h: d.memcpy_rows(Rows(b, 9, b, 10, 2), 1, to_host=False), "INVALID_VALUE"),
        (
            lambda d, b, h: d.memcpy_rows(Rows(b, 1 << 31, b, 1, 1), 1, to_host=True),
            "INVALID_VALUE",
        ),
        (lambda d, b, h: d.memcpy_rows(Rows(b, PAGE, b, 8, 3), 1, to_host=True), "INVALID_VALUE"),
        (lambda d, b, h: d.stream_wait_event(1, 5), "INVALID_HANDLE"),
        (lambda d, b, h: d.host_unregister(b), "HOST_MEMORY_NOT_REGISTERED"),
        (lambda d, b, h: d.host_register(b + 3 * PAGE, MIB, read_only=True), "INVALID_VALUE"),
        (lambda d, b, h: d.event_record(5, 1), "INVALID_HANDLE"),
        (lambda d, b, h: d.event_synchronize(5), "INVALID_HANDLE"),
        (lambda d, b, h: d.stream_destroy(DEFAULT_STREAM), "INVALID_HANDLE"),
        (lambda d, b, h: d.context_set_current(1), "INVALID_CONTEXT"),
    ],
)
def test_what_breaks_a_rule_is_refused_and_changes_nothing(driver, mapped, case, says):
    before = driver.holdings()
    with pytest.raises(DriverError, match=f"CUDA_ERROR_{says}"):
        case(driver, *mapped)
    assert driver.holdings() == before
    driver.mem_unmap(mapped[0], 2 * PAGE)


def test_memory_is_accessible_only_after_access_was_given(driver):
    base = driver.mem_address_reserve(PAGE, 0)
    driver.mem_map(base, PAGE, driver.mem_create(PAGE, 0))
    source = ctypes.create_string_buffer(8)
    with pytest.raises(DriverError, match="INVALID_VALUE"):
        driver.memcpy_to_device(base, ctypes.addressof(source), 8, DEFAULT_STREAM)
    driver.mem_set_access(base, PAGE, 0)
    driver.memcpy_to_device(base, ctypes.addressof(source), 8, DEFAULT_STREAM)
    driver.stream_synchronize(DEFAULT_STREAM)


def test_a_handle_may_be_mapped_twice_and_lives_while_it_is_mapped(driver, mapped):
    base, (first, _) = mapped
    driver.mem_map(base + 3 * PAGE, PAGE, first)
    driver.mem_set_access(base + 3 * PAGE, PAGE, 0)
    view_of(base, 1)[0] = 9
    assert view_of(base + 3 * PAGE, 1)[0] == 9
    driver.mem_release(first)
    driver.mem_unmap(base, PAGE)
    assert view_of(base + 3 * PAGE, 1)[0] == 9
    with pytest.raises(DriverError, match="INVALID_VALUE"):
        driver.mem_map(base, PAGE, first)


def test_a_copy_has_not_happened_before_it_was_waited_for(driver, mapped):
    base, _ = mapped
    hold = threading.Event()
    stream = driver.stream_create()
    event = driver.event_create()
    assert driver.event_done(event)  # one that was never recorded
    driver.launch(lambda: hold.wait(120))
    source = ctypes.create_string_buffer(b"\x03" * 8)
    driver.memcpy_to_device(base, ctypes.addressof(source), 8, DEFAULT_STREAM)
    driver.event_record(event, DEFAULT_STREAM)
    driver.stream_synchronize(stream)  # streams do not wait for each other
    assert view_of(base, 8) == bytes(8)
    assert not driver.event_done(event)
    with pytest.raises(DriverError, match="cuMemUnmap failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        driver.mem_unmap(base, 2 * PAGE)
    hold.set()
    driver.event_synchronize(event)
    assert view_of(base, 8) == b"\x03" * 8
    driver.mem_unmap(base, 2 * PAGE)


def test_the_host_side_of_a_copy_lies_in_one_registration(driver, mapped):
    base, _ = mapped
    with Segment.create(PAGE, "test") as segment, segment.map() as source:
        driver.host_register(source.address, MIB, read_only=True)
        with pytest.raises(DriverError, match="ALREADY_REGISTERED"):
            driver.host_register(source.address + MIB // 2, MIB, read_only=True)
        driver.host_register(source.address + MIB, MIB, read_only=True)
        with pytest.raises(DriverError, match=r"cuMemcpyHtoDAsync failed with .*INVALID_VALUE"):
            driver.memcpy_to_device(base, source.address, PAGE, DEFAULT_STREAM)
        with pytest.raises(DriverError, match=r"cuMemcpyDtoHAsync failed with .*INVALID_VALUE"):
            driver.memcpy_to_host(source.address, base, MIB, DEFAULT_STREAM)  # read-only
        driver.memcpy_to_device(base, source.address + MIB, MIB, DEFAULT_STREAM)
        driver.stream_synchronize(DEFAULT_STREAM)
        driver.host_unregister(source.address)
        driver.host_unregister(source.address + MIB)


def test_without_initialising_or_a_context_nothing_goes():
    fake = FakeDriver()
    with pytest.raises(DriverError, match="NOT_INITIALIZED"):
        fake.device_get(0)
    fake.init()
    with pytest.raises(DriverError, match="INVALID_DEVICE"):
        fake.device_get(1)
    with pytest.raises(DriverError, match="INVALID_CONTEXT"):
        fake.stream_create()
    with pytest.raises(DriverError, match="INVALID_CONTEXT"):
        fake.primary_context_release(0)
    fake.close()
