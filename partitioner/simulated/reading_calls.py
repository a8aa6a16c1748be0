"""What the simulated NVML functions for monitoring answer: clocks, traffic, memory.

It owns one small function per NVML symbol, and their table. It never changes the node. The
invariant: what is not simulated is answered as by a board that does not tell it, never by a number
that was made up for the occasion.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pynvml

from partitioner.geometry import MIB
from partitioner.simulated.abi import Held, Status, Symbol, put_uint, unsigned
from partitioner.simulated.mig_calls import profile_named
from partitioner.simulated.node import SimulatedGpu, SimulatedNode

IDLE_CLOCK_MHZ = 345
MHZ_PER_PERCENT = 16
"""How far the clock of the multiprocessors rises with utilisation."""
MEMORY_CLOCK_MHZ = 2619


def _memory(node: SimulatedNode, held: Held, out: int) -> None:
    """Of a GPU, or of a MIG device; this version of the struct counts the reserve as used."""
    memory = pynvml.c_nvmlMemory_t.from_address(out)
    if isinstance(held, SimulatedGpu):
        memory.total = held.board.memory_mib * MIB
        memory.used = held.board.reserved_mib * MIB + held.used_bytes
    else:
        gpu, instance = held
        name = str(instance.place)
        memory.total = profile_named(gpu, instance.place.profile).memory_mib * MIB
        memory.used = sum(each.memory_mib for each in gpu.processes if each.on == name) * MIB
    memory.free = memory.total - memory.used


def _clock(node: SimulatedNode, gpu: SimulatedGpu, kind: int, out: int) -> None:
    if kind == pynvml.NVML_CLOCK_MEM:
        put_uint(out, MEMORY_CLOCK_MHZ)
    elif kind in (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_GRAPHICS):
        put_uint(out, IDLE_CLOCK_MHZ + MHZ_PER_PERCENT * gpu.utilization_percent)
    else:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)


def _no_traffic(node: SimulatedNode, gpu: SimulatedGpu, counter: int, out: int) -> None:
    put_uint(out, 0)


READING_CALLS: Mapping[str, Symbol] = MappingProxyType(
    {
        "nvmlDeviceGetMemoryInfo": ("dp", _memory),
        "nvmlDeviceGetClockInfo": ("hup", _clock),
        "nvmlDeviceGetPcieThroughput": ("hup", _no_traffic),
        "nvmlDeviceGetPcieReplayCounter": unsigned(lambda gpu: 0),
    }
)
