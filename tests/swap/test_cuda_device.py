"""What is particular to CUDA: handles kept, calls counted, refusals undone, threads, kernels."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from swap.arena import PagePool, Region
from swap.cuda_device import CudaDevice
from swap.cuda_driver import (
    DEFAULT_STREAM,
    INVALID_CONTEXT,
    INVALID_VALUE,
    NOT_INITIALIZED,
    CudaDriver,
    DriverError,
    Rows,
)
from swap.device import REGISTER_BYTES_MAX
from swap.errors import DeviceError, DeviceMisuse, InsufficientDeviceMemory
from swap.fake_driver import ILLEGAL_ADDRESS, FakeDriver
from swap.segment import Segment

PAGE = 2 << 20


@pytest.fixture
def driver():
    fake = FakeDriver()
    yield fake
    assert set(fake.holdings().values()) == {0}, fake.holdings()
    fake.close()


@pytest.fixture
def device(driver):
    opened = CudaDevice(8 * PAGE, page_bytes=PAGE, driver=driver, keep_mappings=False)
    yield opened
    opened.synchronize()
    opened.close()


def test_handles_are_created_once_and_ranges_mapped_with_one_access_call(device, driver):
    pool = PagePool(device)
    weights = [Region(pool, f"weights {number}", 6 * PAGE) for number in range(2)]
    kv = Region(pool, "KV", 8 * PAGE)
    device.prefault(range(8))
    for number in range(100):
        weights[number % 2].grow(6)
        kv.grow(2)
        kv.shrink(2)
        weights[number % 2].shrink(6)
    assert driver.calls["cuMemCreate"] == 8
    assert driver.calls["cuMemRelease"] == 0
    assert driver.calls["cuMemMap"] == 100 * 8
    assert driver.calls["cuMemSetAccess"] == driver.calls["cuMemUnmap"] == 200
    assert driver.calls["cuMemAddressReserve"] == 3
    for region in (*weights, kv):
        region.release()


def test_pages_are_rounded_up_to_what_the_driver_maps(driver):
    device = CudaDevice(10 << 20, page_bytes=(2 << 20) + 1, driver=driver)
    assert (device.page_bytes, device.pages_total) == (4 << 20, 2)
    device.close()
    with pytest.raises(DeviceMisuse, match="no page of 67108864"):
        CudaDevice(10 << 20, driver=driver)


def test_a_gpu_without_memory_left_says_how_much_there_was(device, driver):
    base = device.reserve(4 * PAGE)
    device.map(base, (0, 1))
    driver.refuse.create_from = 4
    with pytest.raises(InsufficientDeviceMemory, match="others use it") as refused:
        device.map(base + 2 * PAGE, (2, 3))
    assert refused.value.metadata["present_bytes"] == str(3 * PAGE)
    assert device.statistics().pages_mapped == 2
    driver.refuse.create_from = None
    device.map(base + 2 * PAGE, (2, 3))
    assert driver.calls["cuMemCreate"] == 5


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
def test_a_map_that_fails_half_way_is_undone(device, driver, call):
    base = device.reserve(4 * PAGE)
    device.map(base, (7,))
    mapped = driver.holdings()["mappings"]
    if call == "cuMemMap":
        driver.mem_map, real = None, driver.mem_map
        calls = []

        def fail_third(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise DriverError(call, INVALID_VALUE)
            real(*arguments)

        driver.mem_map = fail_third
    else:
        driver.refuse.codes[call] = INVALID_VALUE
    with pytest.raises(DeviceError, match=f"{call} failed with {INVALID_VALUE}"):
        device.map(base + PAGE, (1, 2, 3))
    assert driver.holdings()["mappings"] == mapped
    device.map(base + PAGE, (1, 2, 3))
    assert device.unmap(base, 4) == (7, 1, 2, 3)


def test_unmapping_waits_for_kernels(device, driver):
    base = device.reserve(PAGE)
    device.map(base, (0,))
    running, ended = threading.Event(), threading.Event()
    driver.launch(lambda: (running.wait(120), ended.set()))
    threading.Timer(0.05, running.set).start()
    device.unmap(base, 1)
    assert ended.is_set()


def test_copying_out_waits_for_what_is_computed(device, driver):
    base = device.reserve(PAGE)
    device.map(base, (0,))
    running = threading.Event()
    driver.launch(lambda: (running.wait(120), ctypes.memset(base, 5, 16)))
    threading.Timer(0.05, running.set).start()
    back = ctypes.create_string_buffer(16)
    device.wait(device.copy_out(ctypes.addressof(back), base, 16))
    assert back.raw == b"\x05" * 16


def test_waiting_for_one_copy_does_not_hold_up_others(driver, stepped_clock):
    clock = stepped_clock(blocking=True)
    slow = FakeDriver(link_bytes_per_s=1e6, clock=clock)
    device = CudaDevice(4 * PAGE, page_bytes=PAGE, driver=slow)
    base = device.reserve(4 * PAGE)
    device.map(base, range(4))
    source = ctypes.create_string_buffer(PAGE)
    address = ctypes.addressof(source)
    first = device.copy_in(base, address, PAGE)
    waiting = threading.Thread(target=device.wait, args=(first,))
    waiting.start()
    second = device.copy_in(base + PAGE, address, PAGE)  # issued while the first is waited for
    out = device.copy_out(address, base + 2 * PAGE, 8)  # and the other way too
    clock.step(1)
    clock.step(2)
    waiting.join(120)
    assert not waiting.is_alive()
    device.wait(out)
    device.wait(second)
    device.close()
    slow.close()


def test_an_event_serves_again_once_its_copy_has_ended(device, driver):
    base = device.reserve(PAGE)
    device.map(base, (0,))
    source = ctypes.create_string_buffer(64)
    for _ in range(50):
        device.wait(device.copy_in(base, ctypes.addressof(source), 64))
    assert driver.calls["cuEventCreate"] == 1


def test_a_copy_whose_issue_fails_leaves_nothing_running(device, driver):
    base = device.reserve(PAGE)
    device.map(base, (0,))
    source = ctypes.create_string_buffer(PAGE)
    driver.refuse.codes["cuEventRecord"] = ILLEGAL_ADDRESS
    with pytest.raises(DeviceError, match=ILLEGAL_ADDRESS):
        device.copy_in(base, ctypes.addressof(source), PAGE)
    assert device.unmap(base, 1) == (0,)


def test_a_failed_copy_is_reported_to_who_waits(device, driver):
    base = device.reserve(PAGE)
    device.map(base, (0,))
    source = ctypes.create_string_buffer(64)
    driver.refuse.codes["cuEventSynchronize"] = ILLEGAL_ADDRESS
    copy = device.copy_in(base, ctypes.addressof(source), 64)
    with pytest.raises(DeviceError, match=ILLEGAL_ADDRESS):
        device.wait(copy)


def test_every_thread_has_the_context_made_current(device, driver):
    with pytest.raises(DriverError, match=INVALID_CONTEXT):
        _in_thread(lambda: driver.mem_address_reserve(PAGE, 0))
    base = _in_thread(lambda: device.reserve(PAGE))
    _in_thread(lambda: device.map(base, (0,)))
    _in_thread(lambda: device.unmap(base, 1))
    _in_thread(lambda: device.release(base))


def _in_thread(function):
    result, errors = [], []

    def call():
        try:
            result.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


def test_a_read_only_mapping_is_registered_and_a_refusal_names_the_limit(device, driver):
    with Segment.create(PAGE, "test") as segment, segment.map() as source:
        device.register(source.address, PAGE)
        with pytest.raises(DeviceError, match="ALREADY_REGISTERED"):
            device.register(source.address, PAGE)
        device.unregister(source.address)
        with pytest.raises(DeviceMisuse, match="not registered"):
            device.unregister(source.address)
        with pytest.raises(DeviceError, match=INVALID_VALUE):
            device.register(source.address, PAGE, writable=True)
        driver.refuse.register = True
        with pytest.raises(DeviceError, match="LimitMEMLOCK=infinity") as refused:
            device.register(source.address, PAGE)
        assert refused.value.metadata == {
            "code": "CUDA_ERROR_OUT_OF_MEMORY",
            "size_bytes": str(PAGE),
        }
        with pytest.raises(DeviceMisuse, match="at most"):
            device.register(source.address, REGISTER_BYTES_MAX + 1)


def test_nothing_is_unpinned_under_a_running_copy(stepped_clock):
    clock = stepped_clock(blocking=True)
    driver = FakeDriver(link_bytes_per_s=1e6, clock=clock)
    device = CudaDevice(2 * PAGE, page_bytes=PAGE, driver=driver)
    base = device.reserve(PAGE)
    device.map(base, (0,))
    with Segment.create(PAGE, "test") as segment, segment.map() as source:
        device.register(source.address, PAGE)
        copy = device.copy_in(base, source.address, PAGE)
        with pytest.raises(DeviceMisuse, match="running"):
            device.unregister(source.address)
        clock.step()
        device.wait(copy)
        device.unregister(source.address)
    device.close()
    driver.close()


def test_what_is_still_held_is_given_back_at_close(driver):
    device = CudaDevice(8 * PAGE, page_bytes=PAGE, driver=driver)
    first, second = device.reserve(4 * PAGE), device.reserve(4 * PAGE)
    device.map(first, (0, 1))
    device.map(first + 3 * PAGE, (2,))
    device.map(second, range(3, 7))
    with Segment.create(PAGE, "test") as segment, segment.map() as source:
        device.register(source.address, PAGE)
        device.wait(device.copy_in(second, source.address, 100))
        assert 0 not in driver.holdings().values()
        device.close()
        assert set(driver.holdings().values()) == {0}


def test_memory_that_is_not_mapped_faults(tmp_path):
    import signal
    import subprocess

    code = """
import ctypes
from swap.cuda_device import CudaDevice
from swap.fake_driver import FakeDriver
device = CudaDevice(8 << 20, page_bytes=2 << 20, driver=FakeDriver(), keep_mappings=False)
base = device.reserve(2 << 20)
device.map(base, (0,))
ctypes.memset(base, 1, 2 << 20)
device.unmap(base, 1)
print("touching", flush=True)
ctypes.string_at(base, 1)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=60)
    assert done.stdout == b"touching\n"
    assert done.returncode == -signal.SIGSEGV


# The real driver, as far as it goes without a GPU.


def test_without_a_driver_it_says_what_to_install():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(DeviceError, match="install the NVIDIA driver"):
            CudaDevice(8 * PAGE)
    else:
        pytest.skip("there is a driver here")


def test_a_driver_that_was_not_initialised_is_refused():
    with pytest.raises(DriverError, match=NOT_INITIALIZED):
        CudaDriver().device_get(0)


def test_the_real_calls_have_the_arguments_that_the_bindings_take():
    """The bindings' own classes around the fake: what reaches it is what the driver would get."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    made = []

    class Recorder(SimpleNamespace):
        def __getattr__(self, name):
            if not name.startswith("cu") or not callable(getattr(bindings, name)):
                return getattr(bindings, name)

            def call(*arguments):
                made.append((name, arguments))
                return (bindings.CUresult.CUDA_SUCCESS, bindings.CUdeviceptr(4096))

            return call

    driver = CudaDriver()
    driver._cu = Recorder()
    assert driver.granularity(0) == 4096
    properties, minimum = made[-1][1]
    assert properties.type == bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    location = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    assert (properties.location.type, properties.location.id) == (location, 0)
    assert int(minimum) == 0
    assert driver.mem_create(PAGE, 0) == 4096
    assert made[-1][1][0] == PAGE
    driver.mem_set_access(4096, PAGE, 0)
    address, size, (access,), count = made[-1][1]
    assert (address, size, count, int(access.flags)) == (4096, PAGE, 1, 3)
    driver.mem_map(1, 2, 3)
    assert made[-1] == ("cuMemMap", (1, 2, 0, 3, 0))
    driver.host_register(1, 2, read_only=True)
    assert made[-1] == ("cuMemHostRegister", (1, 2, 8))
    assert driver.stream_create() == driver.event_create() == 4096
    assert [arguments for _, arguments in made[-2:]] == [(1,), (3,)]
    driver.stream_wait_event(5, 6)
    assert made[-1] == ("cuStreamWaitEvent", (5, 6, 0))
    for to_host in (False, True):
        driver.memcpy_rows(Rows(4096, 180, 8192, 64, 5), 7, to_host=to_host)
        name, (copy, stream) = made[-1]
        assert (name, stream) == ("cuMemcpy2DAsync", 7)
        assert (copy.WidthInBytes, copy.Height) == (64, 5)
        host, card = bindings.CUmemorytype(1), bindings.CUmemorytype(2)
        assert (copy.srcMemoryType, copy.dstMemoryType) == (
            (card, host) if to_host else (host, card)
        )
        device = (
            (int(copy.srcDevice), copy.srcPitch)
            if to_host
            else (int(copy.dstDevice), copy.dstPitch)
        )
        assert device == (4096, 180)
        pinned = (copy.dstHost, copy.dstPitch) if to_host else (copy.srcHost, copy.srcPitch)
        assert pinned == (8192, 64)
    assert driver.pitch_bytes_max(0) == 4096
    assert int(made[-1][1][0]) == 11
    assert int(bindings.CU_STREAM_LEGACY) == DEFAULT_STREAM


@pytest.mark.parametrize(("code", "done"), [("SUCCESS", True), ("ERROR_NOT_READY", False)])
def test_codes_become_errors_with_their_names(code, done):
    bindings = pytest.importorskip("cuda.bindings.driver")
    status = getattr(bindings.CUresult, f"CUDA_{code}")
    driver = CudaDriver()
    driver._cu = SimpleNamespace(cuEventQuery=lambda event: (status,))
    assert driver.event_done(1) is done
    lost = bindings.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    driver._cu = SimpleNamespace(cuEventQuery=lambda event: (lost,))
    with pytest.raises(DriverError, match="cuEventQuery failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        driver.event_done(1)
