"""What is known about a GPU, as frozen values, and the Protocol of whoever reads it.

It owns the vocabulary between the NVML reader and everything above it. It never talks to a
library. The invariant: a value carries the generation in which it was read, so that a decision made
on old geometry can be refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from partitioner.geometry import Geometry, Instance

if TYPE_CHECKING:
    from partitioner.nvml_health import HealthReadings
    from partitioner.readings import GpuReadings

# NVML tells the cores of a GPU but not its multiprocessors, so the ratio of each architecture (by
# compute capability) has to be known. Anything else reports an SM count of 0: not known.
CUDA_CORES_PER_SM: Mapping[tuple[int, int], int] = MappingProxyType(
    {
        (7, 0): 64,
        (7, 5): 64,
        (8, 0): 64,
        (8, 6): 128,
        (8, 9): 128,
        (9, 0): 128,
        (10, 0): 128,
        (10, 3): 128,
        (12, 0): 128,
    }
)


class GpuHealth(StrEnum):
    """Whether a GPU can be used at all."""

    OK = "ok"
    LOST = "lost"  # Fell off the bus, or is no longer listed.
    FAILING = "failing"  # Listed, but the driver refuses to answer for it.


@dataclass(frozen=True)
class MigInstance:
    """A GPU instance that exists. `number` is NVML's; it and `uuid` may come back for another one.

    `uuid` is that of its MIG device, empty where it has no compute instance.
    """

    number: int
    place: Instance
    uuid: str
    memory_bytes: int
    sm_count: int


@dataclass(frozen=True)
class Gpu:
    """One GPU as last read. Facts of a lost GPU are the last known ones; unknown numbers are 0.

    `memory_bytes` is the total, of which the driver keeps `memory_reserved_bytes` for itself;
    `memory_used_bytes` is what tenants hold. `numa_node` is None where the host does not tell.
    `link` names the way to the host's memory: GPUs behind one PCIe root have the same.
    `health_reason` says why when the health is not OK. An empty `uuid` means that the GPU was lost
    before it was ever seen. `minor` is the number of its device file. `instances` is empty without
    MIG mode, and None where the driver does not let this process see them.
    """

    uuid: str
    index: int
    name: str = ""
    pci_id: str = ""
    pci_device_id: int = 0
    memory_bytes: int = 0
    memory_reserved_bytes: int = 0
    memory_used_bytes: int = 0
    sm_count: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    minor: int = 0
    mig_capable: bool = False
    mig_enabled: bool = False
    mig_pending: bool = False
    instances: tuple[MigInstance, ...] | None = ()
    driver_version: str = ""
    numa_node: int | None = None
    link: str = ""
    generation: int = 0
    health: GpuHealth = GpuHealth.OK
    health_reason: str = ""

    @property
    def usable_bytes(self) -> int:
        """What tenants can have in all: the total less what the driver keeps."""
        return max(0, self.memory_bytes - self.memory_reserved_bytes)


@dataclass(frozen=True)
class GpuProcess:
    """A process with a compute context on the GPU. `used_bytes` is None where not told.

    `instance` is NVML's number of the GPU instance that it uses, None for the whole GPU.
    """

    pid: int
    used_bytes: int | None
    instance: int | None = None


@dataclass(frozen=True)
class Telemetry:
    """Readings of one GPU now. None means that this board or driver does not tell.

    Temperature in degrees Celsius, power in watts, utilisation in per cent.
    """

    uuid: str
    memory_used_bytes: int
    temperature_c: int | None
    power_w: float | None
    utilization_percent: int | None
    pcie_generation: int | None
    pcie_lanes: int | None
    processes: tuple[GpuProcess, ...]


class NvmlReader(Protocol):
    """Reads GPUs. Every method may raise the errors under `NvmlError`."""

    def discover(self) -> tuple[Gpu, ...]:
        """List every GPU, in index order. A lost or failing GPU is listed as such."""
        ...

    def telemetry(self, uuid: str, generation: int) -> Telemetry:
        """Read one GPU; refuses a generation that is not the current one."""
        ...

    def readings(self) -> tuple[GpuReadings, ...]:
        """What every GPU that answers measures of itself now, for monitoring."""
        ...

    def health(self, uuid: str) -> HealthReadings:
        """What the driver tells of a GPU's health now, whatever its generation."""
        ...

    def geometry(self, uuid: str, generation: int) -> Geometry:
        """What instances the board allows; without profiles where it has no MIG."""
        ...

    def invalidate(self, uuid: str) -> int:
        """Drop what is cached of a GPU whose geometry changed; return its new generation."""
        ...

    def close(self) -> None:
        """Let go of the library. Closing twice is allowed."""
        ...


class NvmlDriver(NvmlReader, Protocol):
    """Reads GPUs, and changes how they are cut.

    Every change refuses a generation that is not the current one, and moves it on whether it
    succeeds or not: whoever goes on reads again first. None touches another GPU or instance.
    """

    def reread(self, uuid: str) -> Gpu:
        """Read one GPU that a discovery has listed, whatever its generation is now."""
        ...

    def set_mig_mode(
        self, uuid: str, generation: int, enabled: bool, *, may_wait: bool = False
    ) -> None:
        """Switch MIG mode now; raises `ResetNeededError` where that takes a reset.

        With `may_wait` a switch that takes a reset is left waiting for one.
        """
        ...

    def reset_gpu(self, uuid: str, generation: int) -> None:
        """Reset the GPU, which nobody uses. Raises `ResetNeededError` where that is refused."""
        ...

    def create_instance(self, uuid: str, generation: int, place: Instance) -> None:
        """Create a GPU instance at `place`, with one compute instance over all of it."""
        ...

    def complete_instance(self, uuid: str, generation: int, number: int, place: Instance) -> None:
        """Create the missing compute instance of a GPU instance that is there."""
        ...

    def destroy_instance(self, uuid: str, generation: int, number: int, place: Instance) -> None:
        """Destroy the GPU instance `number` with what is in it; it must be at `place`."""
        ...
