"""What a GPU and its instances measure of themselves now, for monitoring.

It owns the calls and the values. It keeps nothing, derives nothing and rounds nothing but units.
The invariant: what a board or driver does not tell is None, never 0, and one figure that cannot be
read does not take the others along.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pynvml

from partitioner.gpu import Gpu, GpuProcess
from partitioner.nvml_facts import call, call_optional, read_memory
from partitioner.nvml_instances import mig_devices

PROCESSES_MAX = 256
"""Of one GPU that are told of; more than MPS allows, and a bound on what is shown."""
_NO_INSTANCE = 0xFFFFFFFF


@dataclass(frozen=True)
class InstanceReadings:
    """Memory of one GPU instance, which `number` is NVML's of."""

    number: int
    memory_total_bytes: int
    memory_used_bytes: int


@dataclass(frozen=True)
class GpuReadings:
    """One GPU. `gpu` is what it was known as; counters are those since the driver was loaded."""

    gpu: Gpu
    memory_total_bytes: int
    memory_reserved_bytes: int
    memory_used_bytes: int
    utilization_percent: int | None = None
    memory_utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    energy_j: float | None = None
    multiprocessor_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    pcie_sent_bytes_per_s: int | None = None
    pcie_received_bytes_per_s: int | None = None
    pcie_replays: int | None = None
    instances: tuple[InstanceReadings, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    clients: tuple[GpuProcess, ...] = field(default=())
    """Processes that are clients of MPS; the server is among `processes`."""


def read_readings(handle: Any, gpu: Gpu) -> GpuReadings:
    """Read one GPU that answers. Takes some 40 ms of PCIe's counters alone."""
    total, reserved, used = read_memory(handle)
    rates = call_optional("nvmlDeviceGetUtilizationRates", handle)
    return GpuReadings(
        gpu=gpu,
        memory_total_bytes=total,
        memory_reserved_bytes=reserved,
        memory_used_bytes=used,
        utilization_percent=None if rates is None else int(rates.gpu),
        memory_utilization_percent=None if rates is None else int(rates.memory),
        temperature_c=_number(
            call_optional("nvmlDeviceGetTemperatureV", handle, pynvml.NVML_TEMPERATURE_GPU)
        ),
        power_w=_scaled(call_optional("nvmlDeviceGetPowerUsage", handle), 1e-3),
        energy_j=_scaled(call_optional("nvmlDeviceGetTotalEnergyConsumption", handle), 1e-3),
        multiprocessor_clock_mhz=_clock(handle, pynvml.NVML_CLOCK_SM),
        memory_clock_mhz=_clock(handle, pynvml.NVML_CLOCK_MEM),
        ecc_corrected=_ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        ecc_uncorrected=_ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        pcie_sent_bytes_per_s=_pcie(handle, pynvml.NVML_PCIE_UTIL_TX_BYTES),
        pcie_received_bytes_per_s=_pcie(handle, pynvml.NVML_PCIE_UTIL_RX_BYTES),
        pcie_replays=_number(call_optional("nvmlDeviceGetPcieReplayCounter", handle)),
        instances=_instances(handle) if gpu.mig_enabled and gpu.instances is not None else (),
        processes=processes_of(call_optional("nvmlDeviceGetComputeRunningProcesses", handle)),
        clients=processes_of(call_optional("nvmlDeviceGetMPSComputeRunningProcesses", handle)),
    )


def processes_of(told: Iterable[Any] | None) -> tuple[GpuProcess, ...]:
    """NVML's list of processes, at most PROCESSES_MAX of them."""
    return tuple(
        GpuProcess(int(each.pid), each.usedGpuMemory, instance_of(each))
        for each in list(told or ())[:PROCESSES_MAX]
    )


def instance_of(process: Any) -> int | None:
    """The number of the GPU instance that a process uses; None for the whole GPU."""
    number = int(getattr(process, "gpuInstanceId", _NO_INSTANCE))
    return None if number == _NO_INSTANCE else number


def _instances(handle: Any) -> tuple[InstanceReadings, ...]:
    found = []
    for number, device in mig_devices(handle):
        memory = call("nvmlDeviceGetMemoryInfo", device)
        found.append(InstanceReadings(number, int(memory.total), int(memory.used)))
    return tuple(sorted(found, key=lambda each: each.number))


def _clock(handle: Any, kind: int) -> int | None:
    return _number(call_optional("nvmlDeviceGetClockInfo", handle, kind))


def _ecc(handle: Any, kind: int) -> int | None:
    counter = pynvml.NVML_VOLATILE_ECC
    return _number(call_optional("nvmlDeviceGetTotalEccErrors", handle, kind, counter))


def _pcie(handle: Any, counter: int) -> int | None:
    kilobytes = call_optional("nvmlDeviceGetPcieThroughput", handle, counter)
    return None if kilobytes is None else int(kilobytes) * 1000


def _number(told: Any) -> int | None:
    return None if told is None else int(told)


def _scaled(told: Any, factor: float) -> float | None:
    return None if told is None else float(told) * factor
