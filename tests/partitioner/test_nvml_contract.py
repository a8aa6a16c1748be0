"""What every NVML library must do for us, the simulated and the real one alike. Read only."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator
from typing import Any

import pynvml
import pytest

from partitioner.bounded import BoundedNvml
from partitioner.errors import GpuLostError, NvmlClosedError, StaleGenerationError
from partitioner.gpu import GpuHealth
from partitioner.nvml import PynvmlReader
from partitioner.partition import whole_partitions

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def handles(library: str) -> Iterator[list[Any]]:
    pynvml.nvmlInit()
    yield [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    pynvml.nvmlShutdown()


@pytest.fixture
def reader(library: str) -> Iterator[PynvmlReader]:
    reader = PynvmlReader()
    yield reader
    reader.close()


def test_calls_need_init_and_inits_are_counted(library: str) -> None:
    with pytest.raises(pynvml.NVMLError) as refused:
        pynvml.nvmlDeviceGetCount()
    assert refused.value.value == pynvml.NVML_ERROR_UNINITIALIZED
    pynvml.nvmlInit()
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()
    assert pynvml.nvmlDeviceGetCount() >= 1
    pynvml.nvmlShutdown()
    with pytest.raises(pynvml.NVMLError):
        pynvml.nvmlDeviceGetCount()


def test_versions_are_told(handles: list[Any]) -> None:
    driver = pynvml.nvmlSystemGetDriverVersion()
    assert pynvml.nvmlSystemGetNVMLVersion().endswith(driver)
    assert int(driver.partition(".")[0]) >= 450
    assert pynvml.nvmlSystemGetCudaDriverVersion() >= 11000


def test_one_device_is_found_by_index_uuid_and_bus(handles: list[Any]) -> None:
    for index, handle in enumerate(handles):
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        bus_id = pynvml.nvmlDeviceGetPciInfo(handle).busId
        assert pynvml.nvmlDeviceGetIndex(handle) == index
        for found in (
            pynvml.nvmlDeviceGetHandleByUUID(uuid),
            pynvml.nvmlDeviceGetHandleByPciBusId(bus_id),
            pynvml.nvmlDeviceGetHandleByPciBusId(bus_id[4:]),
        ):
            assert pynvml.nvmlDeviceGetUUID(found) == uuid


@pytest.mark.parametrize(
    ("look_up", "code"),
    [
        (lambda: pynvml.nvmlDeviceGetHandleByIndex(999), pynvml.NVML_ERROR_INVALID_ARGUMENT),
        (
            lambda: pynvml.nvmlDeviceGetHandleByUUID("GPU-00000000-0000-0000-0000-000000000000"),
            pynvml.NVML_ERROR_NOT_FOUND,
        ),
        (
            lambda: pynvml.nvmlDeviceGetHandleByPciBusId("00000000:fe:1f.0"),
            pynvml.NVML_ERROR_NOT_FOUND,
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(handles: list[Any], look_up: Any, code: int) -> None:
    with pytest.raises(pynvml.NVMLError) as refused:
        look_up()
    assert refused.value.value == code


def test_memory_adds_up_in_both_versions(handles: list[Any]) -> None:
    for handle in handles:
        old = pynvml.nvmlDeviceGetMemoryInfo(handle)
        new = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        assert old.total == new.total > 0
        assert new.free + new.used + new.reserved == pytest.approx(new.total, rel=1e-3)
        assert old.free + old.used == pytest.approx(old.total, rel=1e-3)


def test_a_struct_of_another_version_is_refused(handles: list[Any]) -> None:
    with pytest.raises(pynvml.NVMLError) as refused:
        pynvml.nvmlDeviceGetMemoryInfo(handles[0], version=0x0900_0028)
    assert refused.value.value in (
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
    )


def test_a_string_that_does_not_fit_is_refused(handles: list[Any]) -> None:
    function = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetUUID")
    buffer = ctypes.create_string_buffer(8)
    assert function(handles[0], buffer, ctypes.c_uint(8)) == pynvml.NVML_ERROR_INSUFFICIENT_SIZE


def test_readings_are_in_range(handles: list[Any]) -> None:
    for handle in handles:
        assert 0 < pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU) < 110
        assert 0 < pynvml.nvmlDeviceGetPowerUsage(handle) < 2_000_000
        assert 1 <= pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle) <= 7
        assert pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle) in (1, 2, 4, 8, 16)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            assert process.pid > 0


def _profile_or_none(handle: Any, enum: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, enum)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
        return None


def test_every_profile_is_placed_inside_the_board(handles: list[Any]) -> None:
    for handle in handles:
        total_mib = pynvml.nvmlDeviceGetMemoryInfo(handle).total >> 20
        for enum in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
            info = _profile_or_none(handle, enum)
            if info is None:
                continue
            assert 0 < info.memorySizeMB <= total_mib
            assert info.name
            count = ctypes.c_uint()
            pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(
                handle, info.id, None, ctypes.byref(count)
            )
            placements = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
            pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(
                handle, info.id, placements, ctypes.byref(count)
            )
            assert len({row.start for row in placements}) == count.value >= info.instanceCount
            assert len({row.size for row in placements}) == 1


def test_discovery_tells_every_gpu(reader: PynvmlReader) -> None:
    gpus = reader.discover()
    assert [gpu.index for gpu in gpus] == list(range(len(gpus)))
    assert gpus
    assert len({gpu.uuid for gpu in gpus}) == len(gpus)
    for gpu in gpus:
        assert gpu.uuid.startswith("GPU-")
        assert gpu.health is GpuHealth.OK
        assert gpu.health_reason == ""
        assert gpu.generation == 1
        assert gpu.usable_bytes > gpu.memory_used_bytes >= 0
        assert gpu.sm_count > 0
        assert gpu.pci_id.count(":") == 2
        assert gpu.pci_device_id > 0


def test_discovery_twice_tells_the_same(reader: PynvmlReader) -> None:
    first, second = reader.discover(), reader.discover()
    assert [(gpu.uuid, gpu.generation) for gpu in first] == [
        (gpu.uuid, gpu.generation) for gpu in second
    ]
    assert [p.id for p in whole_partitions(first)] == [p.id for p in whole_partitions(second)]


def test_telemetry_is_fenced_by_the_generation(reader: PynvmlReader) -> None:
    gpu = reader.discover()[0]
    reading = reader.telemetry(gpu.uuid, gpu.generation)
    assert reading.uuid == gpu.uuid
    assert reading.memory_used_bytes <= gpu.memory_bytes
    assert reading.temperature_c is None or 0 < reading.temperature_c < 110
    moved_on = reader.invalidate(gpu.uuid)
    assert moved_on == gpu.generation + 1
    with pytest.raises(StaleGenerationError, match="discover again"):
        reader.telemetry(gpu.uuid, gpu.generation)
    assert reader.telemetry(gpu.uuid, moved_on).uuid == gpu.uuid
    assert reader.discover()[0].generation == moved_on


def test_a_gpu_that_was_never_listed_is_refused(reader: PynvmlReader) -> None:
    with pytest.raises(GpuLostError, match="run a discovery"):
        reader.telemetry("GPU-unheard-of", 1)


def test_a_closed_reader_says_so(library: str) -> None:
    reader = PynvmlReader()
    reader.close()
    reader.close()
    with pytest.raises(NvmlClosedError):
        reader.discover()


def test_the_bounded_reader_tells_the_same(library: str) -> None:
    async def read() -> None:
        nvml = BoundedNvml()
        gpus = await nvml.discover()
        assert gpus
        reading = await nvml.telemetry(gpus[0].uuid, gpus[0].generation)
        assert reading.uuid == gpus[0].uuid
        assert await nvml.invalidate(gpus[0].uuid) == 2
        await nvml.close()
        with pytest.raises(NvmlClosedError):
            await nvml.discover()

    asyncio.run(read())
