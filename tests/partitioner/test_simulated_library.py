"""The simulated library beyond the contract: its C entry points, its injections, its removal."""

from __future__ import annotations

import ctypes
import threading

import pynvml
import pytest

from partitioner.catalogue import load_catalogue
from partitioner.errors import SimulationError
from partitioner.simulated.install import installed
from partitioner.simulated.node import MIB, Fault, SimulatedNode
from partitioner.simulated.nvml_library import TABLES, SimulatedLibrary
from partitioner.simulation import GpuSpec, NodeSpec, ProcessSpec, parse_simulate


def _code_of(call: object, *arguments: object) -> int:
    with pytest.raises(pynvml.NVMLError) as refused:
        call(*arguments)  # type: ignore[operator]
    return int(refused.value.value)


def test_uuids_and_buses_follow_from_the_description() -> None:
    first, second = (SimulatedNode(parse_simulate("h200x3")) for _ in range(2))
    assert [gpu.uuid for gpu in first.gpus] == [gpu.uuid for gpu in second.gpus]
    assert len({gpu.uuid for gpu in first.gpus}) == 3
    assert len({gpu.bus for gpu in first.gpus}) == 3
    assert first.gpus[0].uuid != SimulatedNode(parse_simulate("h100")).gpus[0].uuid


def test_what_the_board_lacks_and_what_no_driver_has_differ(node: SimulatedNode) -> None:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    assert _code_of(pynvml.nvmlDeviceGetFanSpeed, handle) == pynvml.NVML_ERROR_NOT_SUPPORTED
    assert _code_of(pynvml.nvmlDeviceGetNumaNodeId, handle) == pynvml.NVML_ERROR_NOT_SUPPORTED
    # Attributes are told of MIG devices only, as the driver's documentation says.
    assert _code_of(pynvml.nvmlDeviceGetAttributes, handle) == pynvml.NVML_ERROR_NOT_SUPPORTED
    node.hidden_symbols = frozenset({"nvmlDeviceGetSerial"})
    assert _code_of(pynvml.nvmlDeviceGetSerial, handle) == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    assert not hasattr(pynvml.nvmlLib, "cuInit")
    pynvml.nvmlShutdown()


def test_every_symbol_refuses_calls_before_init_or_needs_none(node: SimulatedNode) -> None:
    library = SimulatedLibrary(node)
    for name, (signature, _) in TABLES.items():
        buffer = ctypes.create_string_buffer(256)
        arguments = [96 if kind == "u" else buffer for kind in signature]
        code = getattr(library, name)(*arguments)
        if name.startswith("nvmlSystemGet") and name != "nvmlSystemGetDriverVersion":
            assert code == pynvml.NVML_SUCCESS, name
        else:
            assert code == pynvml.NVML_ERROR_UNINITIALIZED, name
            assert buffer.raw == bytes(256), name


def test_null_pointers_and_foreign_handles_are_refused(node: SimulatedNode) -> None:
    library = SimulatedLibrary(node)
    assert library.nvmlInit_v2() == pynvml.NVML_SUCCESS
    refused = pynvml.NVML_ERROR_INVALID_ARGUMENT
    out = ctypes.c_uint()
    for name, (signature, _) in TABLES.items():
        if name.startswith("nvmlDevice"):
            nothing = [0 if kind == "u" else None for kind in signature]
            assert getattr(library, name)(*nothing) == refused, name
    foreign = ctypes.c_void_p(0xDEAD0000)
    assert library.nvmlDeviceGetIndex(foreign, ctypes.byref(out)) == refused
    assert library.nvmlSystemGetCudaDriverVersion_v2(None) == refused


@pytest.mark.parametrize("key", sorted(load_catalogue().boards))
def test_profiles_are_those_of_the_board(key: str) -> None:
    board = load_catalogue().board(key)
    with installed(SimulatedNode(NodeSpec((GpuSpec(key, board),)))):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for profile in board.profiles:
            info = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, profile.enum)
            old = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, profile.enum, version=1)
            by_id = pynvml.nvmlDeviceGetGpuInstanceProfileInfoById(handle, profile.id)
            assert info.id == old.id == by_id.id == profile.id
            assert info.name == f"MIG {profile.name}" == by_id.name
            assert info.memorySizeMB == old.memorySizeMB == profile.memory_mib
            assert (info.sliceCount, info.multiprocessorCount, info.instanceCount) == (
                profile.compute_slices,
                profile.sm_count,
                profile.max_instances,
            )
            count = ctypes.c_uint(len(profile.starts))
            rows = (pynvml.c_nvmlGpuInstancePlacement_t * len(profile.starts))()
            pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(
                handle, profile.id, rows, ctypes.byref(count)
            )
            assert [(row.start, row.size) for row in rows] == [
                (start, profile.slots) for start in profile.starts
            ]
        unknown = _code_of(pynvml.nvmlDeviceGetGpuInstanceProfileInfoById, handle, 200)
        assert unknown == pynvml.NVML_ERROR_INVALID_ARGUMENT
        beyond = _code_of(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, 0x12)
        assert beyond == pynvml.NVML_ERROR_INVALID_ARGUMENT
        eight_slices = _code_of(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, 5)
        assert eight_slices == pynvml.NVML_ERROR_NOT_SUPPORTED
        assert pynvml.nvmlDeviceGetNumGpuCores(handle) % board.sm_count == 0


def test_mig_mode_and_what_depends_on_it() -> None:
    board = load_catalogue().board("a100")
    plain = board.model_copy(update={"profiles": ()})
    spec = NodeSpec(
        (
            GpuSpec("a100-80", board, mig_enabled=True),
            GpuSpec("a100-80", board),
            GpuSpec("plain", plain),
        )
    )
    with installed(SimulatedNode(spec)):
        pynvml.nvmlInit()
        enabled, disabled, incapable = (pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(3))
        assert pynvml.nvmlDeviceGetMigMode(enabled) == [1, 1]
        assert pynvml.nvmlDeviceGetMigMode(disabled) == [0, 0]
        assert _code_of(pynvml.nvmlDeviceGetMigMode, incapable) == pynvml.NVML_ERROR_NOT_SUPPORTED
        counts = [pynvml.nvmlDeviceGetMaxMigDeviceCount(h) for h in (enabled, disabled, incapable)]
        assert counts == [7, 0, 0]
        by_index = pynvml.nvmlDeviceGetMigDeviceHandleByIndex
        assert _code_of(by_index, enabled, 0) == pynvml.NVML_ERROR_NOT_FOUND
        assert _code_of(by_index, disabled, 0) == pynvml.NVML_ERROR_NOT_SUPPORTED
        utilization = pynvml.nvmlDeviceGetUtilizationRates
        assert _code_of(utilization, enabled) == pynvml.NVML_ERROR_NOT_SUPPORTED
        assert utilization(disabled).gpu == 0
        placed = _code_of(
            pynvml.nvmlDeviceGetGpuInstancePossiblePlacements,
            incapable,
            19,
            None,
            ctypes.byref(ctypes.c_uint()),
        )
        assert placed == pynvml.NVML_ERROR_NOT_SUPPORTED


def test_processes_hold_the_memory_they_are_said_to_hold() -> None:
    board = load_catalogue().board("h200")
    held = (ProcessSpec(pid=4711, memory_mib=1024), ProcessSpec(pid=4712, memory_mib=512))
    with installed(SimulatedNode(NodeSpec((GpuSpec("h200", board, processes=held),)))) as node:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        assert [(p.pid, p.usedGpuMemory) for p in listed] == [
            (4711, 1024 * MIB),
            (4712, 512 * MIB),
        ]
        assert listed[0].gpuInstanceId == 0xFFFFFFFF
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        assert memory.used == 1536 * MIB
        node.gpus[0].processes = ()
        assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle) == []


def test_temperature_and_affinity_check_their_arguments() -> None:
    board = load_catalogue().board("h200")
    with installed(SimulatedNode(NodeSpec((GpuSpec("h200", board, numa_node=3),)))) as node:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        assert list(pynvml.nvmlDeviceGetMemoryAffinity(handle, 2, 0)) == [8, 0]
        affinity = _code_of(pynvml.nvmlDeviceGetMemoryAffinity, handle, 1, 7)
        sensor = _code_of(pynvml.nvmlDeviceGetTemperature, handle, 9)
        assert affinity == sensor == pynvml.NVML_ERROR_INVALID_ARGUMENT
        node.gpus[0].temperature_c = 71
        assert pynvml.nvmlDeviceGetTemperature(handle, 0) == 71
        assert pynvml.nvmlDeviceGetTemperatureV(handle, 0) == 71


def test_error_texts_and_bad_bus_ids(node: SimulatedNode) -> None:
    pynvml.nvmlInit()
    assert pynvml.nvmlErrorString(pynvml.NVML_ERROR_GPU_IS_LOST) == "GPU is lost"
    assert pynvml.nvmlErrorString(pynvml.NVML_ERROR_IN_USE) == "In use by another client"
    bad = _code_of(pynvml.nvmlDeviceGetHandleByPciBusId, "zz:yy")
    assert bad == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_a_fault_strikes_its_function_after_its_calls_and_only_so_often(
    node: SimulatedNode,
) -> None:
    pynvml.nvmlInit()
    first, second = (pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(2))
    node.inject(
        Fault(
            pynvml.NVML_ERROR_NO_PERMISSION,
            function="nvmlDeviceGetName",
            gpu_uuid=node.gpus[0].uuid,
            after_calls=1,
            times=2,
        )
    )
    outcomes: list[str | int] = []
    for _ in range(4):
        assert pynvml.nvmlDeviceGetName(second) == "NVIDIA H200"
        try:
            outcomes.append(pynvml.nvmlDeviceGetName(first))
        except pynvml.NVMLError as error:
            outcomes.append(error.value)
    assert outcomes == ["NVIDIA H200", 4, 4, "NVIDIA H200"]
    assert node.calls_of("nvmlDeviceGetName") == 8


def test_latency_passes_before_the_answer(spec: NodeSpec) -> None:
    slept: list[float] = []
    node = SimulatedNode(spec, sleep=slept.append)
    node.set_latency("nvmlDeviceGetCount_v2", 10.0)
    with installed(node):
        pynvml.nvmlInit()
        assert pynvml.nvmlDeviceGetCount() == 2
        pynvml.nvmlSystemGetDriverVersion()
        node.set_latency("nvmlDeviceGetCount_v2", 0)
        pynvml.nvmlDeviceGetCount()
    assert slept == [10.0]


def test_a_stalled_call_waits_for_its_release(node: SimulatedNode) -> None:
    pynvml.nvmlInit()
    stall = node.stall("nvmlDeviceGetCount_v2")
    counts: list[int] = []
    caller = threading.Thread(target=lambda: counts.append(pynvml.nvmlDeviceGetCount()))
    caller.start()
    assert stall.entered.wait(10)
    assert counts == []
    assert pynvml.nvmlSystemGetDriverVersion()  # Other calls go through meanwhile.
    stall.released.set()
    caller.join(10)
    assert counts == [2]


def test_a_vanished_gpu_is_lost_to_every_call_until_it_is_back(node: SimulatedNode) -> None:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(1)
    node.vanish(node.gpus[1].uuid)
    lost = pynvml.NVML_ERROR_GPU_IS_LOST
    assert _code_of(pynvml.nvmlDeviceGetName, handle) == lost
    assert _code_of(pynvml.nvmlDeviceGetFanSpeed, handle) == lost
    assert _code_of(pynvml.nvmlDeviceGetHandleByIndex, 1) == lost
    assert _code_of(pynvml.nvmlDeviceGetHandleByUUID, node.gpus[1].uuid) == lost
    assert pynvml.nvmlDeviceGetCount() == 2
    node.clear_injections()
    assert pynvml.nvmlDeviceGetName(handle) == "NVIDIA H200"
    with pytest.raises(SimulationError, match="has no GPU GPU-nowhere; it has GPU-"):
        node.vanish("GPU-nowhere")


def test_a_failure_of_the_simulation_becomes_a_code(
    node: SimulatedNode, caplog: pytest.LogCaptureFixture
) -> None:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    node.gpus[0].processes = None  # type: ignore[assignment]
    assert _code_of(pynvml.nvmlDeviceGetMemoryInfo, handle) == pynvml.NVML_ERROR_UNKNOWN
    assert "nvmlDeviceGetMemoryInfo failed" in caplog.text


def test_installing_leaves_pynvml_as_it_was_even_after_an_error(spec: NodeSpec) -> None:
    def state() -> tuple[object, ...]:
        return (
            pynvml.nvmlLib,
            pynvml._nvmlLib_refcount,
            dict(pynvml._nvmlGetFunctionPointer_cache),
            dict(pynvml.NVMLError._errcode_to_string),
        )

    def use_and_fail() -> None:
        with installed(SimulatedNode(spec)):
            pynvml.nvmlInit()
            assert str(pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)) == "In use by another client"
            raise RuntimeError("left early")

    before = state()
    with pytest.raises(RuntimeError):
        use_and_fail()
    assert state() == before


def test_a_library_in_use_is_not_replaced(node: SimulatedNode, spec: NodeSpec) -> None:
    pynvml.nvmlInit()
    with pytest.raises(SimulationError, match="already"), installed(SimulatedNode(spec)):
        pass
    assert pynvml.nvmlDeviceGetCount() == 2
    pynvml.nvmlShutdown()
    with installed(SimulatedNode(parse_simulate("h100x1"))):
        pynvml.nvmlInit()
        assert pynvml.nvmlDeviceGetCount() == 1
    pynvml.nvmlInit()
    assert pynvml.nvmlDeviceGetCount() == 2
