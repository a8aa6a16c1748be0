"""Calling pynvml, and reading the facts of one GPU from it.

It owns the translation from pynvml's calls, errors and structs to this package's values. It keeps
no state and caches nothing. The invariant: a fact that a board or driver does not tell becomes None
or 0, never a guess; any other refusal is an `NvmlCallError` that names the function.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pynvml

from partitioner.errors import NvmlCallError
from partitioner.gpu import CUDA_CORES_PER_SM, Gpu

MAX_NUMA_NODES = 1024
_NUMA_WORD_BITS = 64
_AFFINITY_OF_NODE = 0

# Answers that mean "this board or driver does not tell", not that something is wrong.
_NOT_TOLD = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_INSUFFICIENT_SIZE,
        pynvml.NVML_ERROR_NO_DATA,
    }
)


def read_gpu(handle: Any, index: int, uuid: str, driver_version: str) -> Gpu:
    """Read every fact of one healthy GPU. The generation is filled in later."""
    pci = call("nvmlDeviceGetPciInfo", handle)
    capability = call("nvmlDeviceGetCudaComputeCapability", handle)
    total, reserved, used = read_memory(handle)
    mig_mode = call_optional("nvmlDeviceGetMigMode", handle)
    cores = call_optional("nvmlDeviceGetNumGpuCores", handle) or 0
    cores_per_sm = CUDA_CORES_PER_SM.get(capability, 0)
    return Gpu(
        uuid=uuid,
        index=index,
        name=str(call("nvmlDeviceGetName", handle)),
        pci_id=str(pci.busId).lower(),
        pci_device_id=int(pci.pciDeviceId) >> 16,
        memory_bytes=total,
        memory_reserved_bytes=reserved,
        memory_used_bytes=used,
        sm_count=cores // cores_per_sm if cores_per_sm else 0,
        compute_capability=capability,
        minor=call_optional("nvmlDeviceGetMinorNumber", handle) or 0,
        mig_capable=mig_mode is not None,
        mig_enabled=mig_mode is not None and mig_mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
        mig_pending=mig_mode is not None and mig_mode[1] == pynvml.NVML_DEVICE_MIG_ENABLE,
        driver_version=driver_version,
        numa_node=_numa_node(handle),
        generation=0,
    )


def read_memory(handle: Any) -> tuple[int, int, int]:
    """Return total, reserved and used bytes; older drivers count the reserve as used."""
    memory = call_optional("nvmlDeviceGetMemoryInfo", handle, pynvml.nvmlMemory_v2)
    if memory is not None:
        return int(memory.total), int(memory.reserved), int(memory.used)
    memory = call("nvmlDeviceGetMemoryInfo", handle)
    return int(memory.total), 0, int(memory.used)


def read_ancestor(handle: Any, other: Any) -> int | None:
    """NVML's level of the nearest common ancestor of two GPUs; None where it cannot be told."""
    try:
        level = call_optional("nvmlDeviceGetTopologyCommonAncestor", handle, other)
    except NvmlCallError:
        return None  # in trouble just now, which the reading of its other facts reports
    return None if level is None else int(level)


def _numa_node(handle: Any) -> int | None:
    """Return the one host memory node nearest to the GPU, or None when there is no one node."""
    words: Iterable[int] | None = call_optional(
        "nvmlDeviceGetMemoryAffinity",
        handle,
        MAX_NUMA_NODES // _NUMA_WORD_BITS,
        _AFFINITY_OF_NODE,
    )
    nodes = 0
    for position, word in enumerate(words or ()):
        nodes |= int(word) << position * _NUMA_WORD_BITS
    return nodes.bit_length() - 1 if nodes.bit_count() == 1 else None


def call(function: str, *arguments: Any) -> Any:
    """Call pynvml and raise this package's error, with the function's name, for its errors."""
    try:
        return getattr(pynvml, function)(*arguments)
    except pynvml.NVMLError as error:
        raise NvmlCallError(function, int(error.value), str(error)) from error


def call_optional(function: str, *arguments: Any) -> Any:
    """Like `_call`, but None where this board or driver does not tell."""
    try:
        return call(function, *arguments)
    except NvmlCallError as error:
        if error.code in _NOT_TOLD:
            return None
        raise
