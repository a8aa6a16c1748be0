"""What each simulated NVML function answers about the node and its devices; MIG has its own file.

It owns one small function per NVML symbol, and the table from symbol to signature and function. It
never sees ctypes function pointers (that is `library`) and never changes the node. The invariant:
each function either writes its whole answer into the caller's memory or raises `Status` and writes
nothing but what NVML's documentation says it writes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import MappingProxyType

import pynvml

from partitioner.catalogue import NVIDIA_PCI_VENDOR_ID
from partitioner.geometry import MIB
from partitioner.gpu import CUDA_CORES_PER_SM
from partitioner.simulated.abi import (
    Status,
    Symbol,
    put_string,
    put_uint,
    text,
    unsigned,
    versioned,
)
from partitioner.simulated.node import SimulatedGpu, SimulatedNode
from partitioner.simulation import ProcessSpec

NOT_IN_A_MIG_INSTANCE = 0xFFFFFFFF


# The node.


def _driver_version(node: SimulatedNode, out: int, length: int) -> None:
    put_string(out, length, node.driver_version)


def _nvml_version(node: SimulatedNode, out: int, length: int) -> None:
    put_string(out, length, f"{node.cuda_version // 1000}.{node.driver_version}")


def _cuda_version(node: SimulatedNode, out: int) -> None:
    ctypes.c_int.from_address(out).value = node.cuda_version


def _count(node: SimulatedNode, out: int) -> None:
    put_uint(out, len(node.gpus))


def _handle_of(gpu: SimulatedGpu | None, out: int, missing: int) -> None:
    if gpu is None:
        raise Status(missing)
    if gpu.lost:
        raise Status(pynvml.NVML_ERROR_GPU_IS_LOST)
    ctypes.c_void_p.from_address(out).value = gpu.handle


def _by_index(node: SimulatedNode, index: int, out: int) -> None:
    gpu = node.gpus[index] if index < len(node.gpus) else None
    _handle_of(gpu, out, pynvml.NVML_ERROR_INVALID_ARGUMENT)


def _by_uuid(node: SimulatedNode, uuid: bytes, out: int) -> None:
    gpu = next((gpu for gpu in node.gpus if gpu.uuid.encode() == uuid), None)
    _handle_of(gpu, out, pynvml.NVML_ERROR_NOT_FOUND)


def _by_pci(node: SimulatedNode, bus_id: bytes, out: int) -> None:
    try:
        domain, bus, device = (int(part, 16) for part in bus_id.partition(b".")[0].split(b":"))
    except ValueError:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT) from None
    wanted = (domain, bus, device)
    gpu = next((gpu for gpu in node.gpus if (0, gpu.bus, 0) == wanted), None)
    _handle_of(gpu, out, pynvml.NVML_ERROR_NOT_FOUND)


# One device.


def _pci_info(node: SimulatedNode, gpu: SimulatedGpu, out: int) -> None:
    info = pynvml.nvmlPciInfo_t.from_address(out)
    info.domain, info.bus, info.device = 0, gpu.bus, 0
    info.pciDeviceId = gpu.board.pci_device_ids[0] << 16 | NVIDIA_PCI_VENDOR_ID
    info.pciSubSystemId = 0
    info.busId = pynvml.NVML_DEVICE_PCI_BUS_ID_FMT % (0, gpu.bus, 0)
    info.busIdLegacy = pynvml.NVML_DEVICE_PCI_BUS_ID_LEGACY_FMT % (0, gpu.bus, 0)


def _memory_v2(node: SimulatedNode, gpu: SimulatedGpu, out: int) -> None:
    memory = versioned(pynvml.c_nvmlMemory_v2_t, out, pynvml.nvmlMemory_v2)
    memory.total = gpu.board.memory_mib * MIB
    memory.reserved = gpu.board.reserved_mib * MIB
    memory.used = gpu.used_bytes
    memory.free = memory.total - memory.reserved - memory.used


def _compute_capability(node: SimulatedNode, gpu: SimulatedGpu, major: int, minor: int) -> None:
    put_uint(major, gpu.board.compute_capability[0])
    put_uint(minor, gpu.board.compute_capability[1])


def _cores(gpu: SimulatedGpu) -> int:
    per_sm = CUDA_CORES_PER_SM.get(gpu.board.compute_capability)
    if per_sm is None:
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return gpu.board.sm_count * per_sm


def _temperature(node: SimulatedNode, gpu: SimulatedGpu, sensor: int, out: int) -> None:
    if sensor != pynvml.NVML_TEMPERATURE_GPU:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    put_uint(out, gpu.temperature_c)


def _temperature_v(node: SimulatedNode, gpu: SimulatedGpu, out: int) -> None:
    reading = versioned(pynvml.c_nvmlTemperature_v1_t, out, pynvml.nvmlTemperature_v1)
    if reading.sensorType != pynvml.NVML_TEMPERATURE_GPU:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    reading.temperature = gpu.temperature_c


def _utilization(node: SimulatedNode, gpu: SimulatedGpu, out: int) -> None:
    if gpu.mig_current:  # NVML has no utilisation of a GPU in MIG mode.
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    rates = pynvml.c_nvmlUtilization_t.from_address(out)
    rates.gpu = gpu.utilization_percent
    rates.memory = 0


def _processes(node: SimulatedNode, gpu: SimulatedGpu, count: int, out: int | None) -> None:
    _list([each for each in gpu.processes if not each.mps], gpu, count, out)


def _clients(node: SimulatedNode, gpu: SimulatedGpu, count: int, out: int | None) -> None:
    _list([each for each in gpu.processes if each.mps], gpu, count, out)


def _list(processes: list[ProcessSpec], gpu: SimulatedGpu, count: int, out: int | None) -> None:
    room = ctypes.c_uint.from_address(count).value
    put_uint(count, len(processes))
    if not processes:
        return
    if out is None or room < len(processes):
        raise Status(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    table = (pynvml.c_nvmlProcessInfo_v2_t * len(processes)).from_address(out)
    for row, process in zip(table, processes, strict=True):
        row.pid = process.pid
        row.usedGpuMemory = process.memory_mib * MIB
        on = next((each.number for each in gpu.instances if str(each.place) == process.on), None)
        row.gpuInstanceId = NOT_IN_A_MIG_INSTANCE if on is None else on
        row.computeInstanceId = NOT_IN_A_MIG_INSTANCE if on is None else 0


def _memory_affinity(
    node: SimulatedNode, gpu: SimulatedGpu, size: int, out: int, scope: int
) -> None:
    if gpu.numa_node is None:
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    if size == 0 or scope not in (0, 1):
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    words = (ctypes.c_ulong * size).from_address(out)
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    for index in range(size):
        words[index] = 0
    if gpu.numa_node < size * word_bits:
        words[gpu.numa_node // word_bits] = 1 << gpu.numa_node % word_bits


def _common_ancestor(node: SimulatedNode, gpu: SimulatedGpu, other: SimulatedGpu, out: int) -> None:
    if gpu is other:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    if gpu.pcie_root is not None and gpu.pcie_root == other.pcie_root:
        put_uint(out, pynvml.NVML_TOPOLOGY_MULTIPLE)
    elif gpu.numa_node == other.numa_node:
        put_uint(out, pynvml.NVML_TOPOLOGY_NODE)
    else:
        put_uint(out, pynvml.NVML_TOPOLOGY_SYSTEM)


# The driver answers these without nvmlInit.
WITHOUT_INIT = frozenset(
    {
        "nvmlSystemGetNVMLVersion",
        "nvmlSystemGetCudaDriverVersion",
        "nvmlSystemGetCudaDriverVersion_v2",
    }
)

CALLS: Mapping[str, Symbol] = MappingProxyType(
    {
        "nvmlSystemGetDriverVersion": ("pu", _driver_version),
        "nvmlSystemGetNVMLVersion": ("pu", _nvml_version),
        "nvmlSystemGetCudaDriverVersion": ("p", _cuda_version),
        "nvmlSystemGetCudaDriverVersion_v2": ("p", _cuda_version),
        "nvmlDeviceGetCount_v2": ("p", _count),
        "nvmlDeviceGetHandleByIndex_v2": ("up", _by_index),
        "nvmlDeviceGetHandleByUUID": ("sp", _by_uuid),
        "nvmlDeviceGetHandleByPciBusId_v2": ("sp", _by_pci),
        "nvmlDeviceGetName": text(lambda gpu: gpu.board.product),
        "nvmlDeviceGetIndex": unsigned(lambda gpu: gpu.index),
        "nvmlDeviceGetMinorNumber": unsigned(lambda gpu: gpu.index),
        "nvmlDeviceGetPciInfo_v3": ("hp", _pci_info),
        "nvmlDeviceGetMemoryInfo_v2": ("hp", _memory_v2),
        "nvmlDeviceGetCudaComputeCapability": ("hpp", _compute_capability),
        "nvmlDeviceGetNumGpuCores": unsigned(_cores),
        "nvmlDeviceGetComputeMode": unsigned(lambda gpu: pynvml.NVML_COMPUTEMODE_DEFAULT),
        "nvmlDeviceGetTemperature": ("hup", _temperature),
        "nvmlDeviceGetTemperatureV": ("hp", _temperature_v),
        "nvmlDeviceGetPowerUsage": unsigned(lambda gpu: gpu.power_mw),
        "nvmlDeviceGetEnforcedPowerLimit": unsigned(lambda gpu: 1000 * gpu.board.power_limit_w),
        "nvmlDeviceGetUtilizationRates": ("hp", _utilization),
        "nvmlDeviceGetComputeRunningProcesses_v2": ("hpo", _processes),
        "nvmlDeviceGetComputeRunningProcesses_v3": ("hpo", _processes),
        "nvmlDeviceGetMPSComputeRunningProcesses_v3": ("hpo", _clients),
        "nvmlDeviceGetMaxPcieLinkGeneration": unsigned(lambda gpu: gpu.board.pcie_generation),
        "nvmlDeviceGetCurrPcieLinkGeneration": unsigned(lambda gpu: gpu.board.pcie_generation),
        "nvmlDeviceGetMaxPcieLinkWidth": unsigned(lambda gpu: gpu.board.pcie_lanes),
        "nvmlDeviceGetCurrPcieLinkWidth": unsigned(lambda gpu: gpu.board.pcie_lanes),
        "nvmlDeviceGetMemoryAffinity": ("hupu", _memory_affinity),
        "nvmlDeviceGetTopologyCommonAncestor": ("hhp", _common_ancestor),
    }
)
