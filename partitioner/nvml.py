"""Reading and changing GPUs through pynvml, above the real library or the simulated one alike.

It owns NVML's handles and the last known facts of every GPU. It never changes a device but where
its caller says so, and never waits for anything but the library itself: `bounded.BoundedNvml` puts
a deadline around it and is what a daemon uses. The invariants: a GPU that is in trouble is reported
as such and never fails the list; handles are cached by UUID and dropped whenever that GPU's
generation moves on, because they, and indices, go stale after a change of geometry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pynvml

from partitioner import nvml_changes
from partitioner.errors import (
    GpuLostError,
    NvmlCallError,
    NvmlClosedError,
    NvmlUnavailableError,
    StaleGenerationError,
)
from partitioner.geometry import Geometry, Instance
from partitioner.gpu import Gpu, GpuHealth, Telemetry
from partitioner.nvml_facts import call, call_optional, read_ancestor, read_gpu, read_memory
from partitioner.nvml_gate import NvmlGate
from partitioner.nvml_health import HealthReadings, read_health
from partitioner.nvml_instances import read_geometry, read_instances
from partitioner.pcie import links
from partitioner.readings import GpuReadings, processes_of, read_readings
from partitioner.resetting import Resetter, SmiResetter

_LOST = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_GPU_NOT_FOUND})
# Errors of the library as a whole: no GPU is to blame for them.
_OF_THE_LIBRARY = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)


class PynvmlReader:
    """An `NvmlDriver` over pynvml. Not for use from several threads at once.

    Raises `NvmlUnavailableError` on a host without a usable library. Whoever else opens NVML in
    this process does so through `gate`.
    """

    def __init__(self, resetter: Resetter | None = None, gate: NvmlGate | None = None) -> None:
        self._resetter = resetter or SmiResetter()
        self._gate = gate or NvmlGate()
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise _unavailable(error) from error
        self._open = True
        self._known: dict[str, Gpu] = {}
        self._handles: dict[str, Any] = {}
        # What a board allows does not change while its driver is loaded, and takes many calls.
        self._geometries: dict[str, Geometry] = {}
        self._ancestors: dict[tuple[str, str], int | None] = {}

    def discover(self) -> tuple[Gpu, ...]:
        """List every GPU in index order; a GPU seen before and now missing is listed as lost."""
        self._require_open()
        driver_version = str(call("nvmlSystemGetDriverVersion"))
        listed: dict[str, Gpu] = {}
        troubled: list[tuple[int, str, NvmlCallError]] = []
        for index in range(call("nvmlDeviceGetCount")):
            uuid = ""
            try:
                handle = call("nvmlDeviceGetHandleByIndex", index)
                uuid = str(call("nvmlDeviceGetUUID", handle))
                listed[uuid] = self._with_instances(
                    read_gpu(handle, index, uuid, driver_version), handle
                )
                self._handles[uuid] = handle
            except NvmlCallError as error:
                if error.code in _OF_THE_LIBRARY:
                    raise
                troubled.append((index, uuid, error))
        link = links(list(listed.values()), self._ancestor)
        for uuid, gpu in listed.items():
            # A name once given stays: it must not change with the GPU that it was taken from.
            before = self._known.get(uuid)
            given = before.link if before is not None else ""
            listed[uuid] = replace(gpu, link=given or link[uuid])
        nameless: list[Gpu] = []
        for index, uuid, failure in troubled:
            gpu = self._in_trouble_at(index, uuid, failure, listed)
            if gpu.uuid:
                listed[gpu.uuid] = gpu
            else:
                nameless.append(gpu)
        for uuid, gpu in self._known.items():
            if uuid not in listed:
                listed[uuid] = _in_trouble(gpu, GpuHealth.LOST, "the driver no longer lists it")
        self._known = {uuid: self._with_generation(gpu) for uuid, gpu in listed.items()}
        return tuple(sorted([*self._known.values(), *nameless], key=lambda gpu: gpu.index))

    def telemetry(self, uuid: str, generation: int) -> Telemetry:
        """Read one GPU now; raises `StaleGenerationError` and `GpuLostError`."""
        handle = self._handle(uuid, generation)
        try:
            memory = read_memory(handle)
            utilization = call_optional("nvmlDeviceGetUtilizationRates", handle)
            power_mw = call_optional("nvmlDeviceGetPowerUsage", handle)
            processes = call_optional("nvmlDeviceGetComputeRunningProcesses", handle)
            return Telemetry(
                uuid=uuid,
                memory_used_bytes=memory[2],
                temperature_c=call_optional(
                    "nvmlDeviceGetTemperatureV", handle, pynvml.NVML_TEMPERATURE_GPU
                ),
                power_w=None if power_mw is None else power_mw / 1000,
                utilization_percent=None if utilization is None else int(utilization.gpu),
                pcie_generation=call_optional("nvmlDeviceGetCurrPcieLinkGeneration", handle),
                pcie_lanes=call_optional("nvmlDeviceGetCurrPcieLinkWidth", handle),
                processes=processes_of(processes),
            )
        except NvmlCallError as error:
            if error.code not in _LOST:
                raise
            raise GpuLostError(f"GPU {uuid} fell off the bus: {error}") from error

    def readings(self) -> tuple[GpuReadings, ...]:
        """What every GPU that answers measures of itself now; see `NvmlReader.readings`."""
        read = []
        for gpu in self.discover():
            if gpu.health is GpuHealth.OK:
                # One that fails just now is shown as such by the next discovery.
                with suppress(NvmlCallError):
                    read.append(read_readings(self._handles[gpu.uuid], gpu))
        return tuple(read)

    def health(self, uuid: str) -> HealthReadings:
        """What the driver tells of one GPU's health now; raises `GpuLostError`."""
        self._current(uuid)
        try:
            if uuid not in self._handles:
                self._handles[uuid] = call("nvmlDeviceGetHandleByUUID", uuid)
            return read_health(self._handles[uuid])
        except NvmlCallError as error:
            if error.code not in _LOST:
                raise
            raise GpuLostError(f"GPU {uuid} fell off the bus: {error}") from error

    def geometry(self, uuid: str, generation: int) -> Geometry:
        """Read the board's profiles and placements, once; raises as `telemetry` does."""
        return self._geometry_of(uuid, self._handle(uuid, generation))

    def invalidate(self, uuid: str) -> int:
        """Drop what is cached of a GPU whose geometry changed; return its new generation."""
        gpu = self._current(uuid)
        self._handles.pop(uuid, None)
        self._known[uuid] = replace(gpu, generation=gpu.generation + 1)
        return self._known[uuid].generation

    def reread(self, uuid: str) -> Gpu:
        """Read one known GPU now; a call that fails is raised, not shown as its health."""
        before = self._current(uuid)
        if uuid not in self._handles:
            self._handles[uuid] = call("nvmlDeviceGetHandleByUUID", uuid)
        handle = self._handles[uuid]
        gpu = read_gpu(handle, before.index, uuid, before.driver_version)
        gpu = replace(self._with_instances(gpu, handle), link=before.link)
        self._known[uuid] = self._with_generation(gpu)
        return self._known[uuid]

    def set_mig_mode(
        self, uuid: str, generation: int, enabled: bool, *, may_wait: bool = False
    ) -> None:
        """Switch MIG mode now; see `NvmlDriver.set_mig_mode`."""
        with self._changing(uuid, generation) as handle:
            name = f"gpu{self._known[uuid].index}"
            nvml_changes.set_mig_mode(handle, name, enabled, may_wait=may_wait)

    def reset_gpu(self, uuid: str, generation: int) -> None:
        """Reset a GPU. NVML is let go of meanwhile: this process too would be in the way."""
        with self._changing(uuid, generation), self._gate.alone():
            self._handles.clear()
            call("nvmlShutdown")
            try:
                self._resetter.reset(self._known[uuid])
            finally:
                call("nvmlInit")

    def create_instance(self, uuid: str, generation: int, place: Instance) -> None:
        """Create an instance with its compute instance; see `NvmlDriver.create_instance`."""
        with self._changing(uuid, generation) as handle:
            nvml_changes.create_instance(handle, self._geometry_of(uuid, handle), place)

    def complete_instance(self, uuid: str, generation: int, number: int, place: Instance) -> None:
        """Create the missing compute instance; see `NvmlDriver.complete_instance`."""
        with self._changing(uuid, generation) as handle:
            nvml_changes.complete_instance(handle, self._geometry_of(uuid, handle), number, place)

    def destroy_instance(self, uuid: str, generation: int, number: int, place: Instance) -> None:
        """Destroy an instance; see `NvmlDriver.destroy_instance`."""
        with self._changing(uuid, generation) as handle:
            nvml_changes.destroy_instance(handle, self._geometry_of(uuid, handle), number, place)

    @contextmanager
    def _changing(self, uuid: str, generation: int) -> Iterator[Any]:
        """The handle for one change, after which whatever was known of the GPU is old."""
        handle = self._handle(uuid, generation)
        try:
            yield handle
        finally:
            self.invalidate(uuid)

    def close(self) -> None:
        """Shut NVML down. Closing twice is allowed."""
        if self._open:
            self._open = False
            self._handles.clear()
            call("nvmlShutdown")

    def _geometry_of(self, uuid: str, handle: Any) -> Geometry:
        if uuid not in self._geometries:
            self._geometries[uuid] = read_geometry(handle)
        return self._geometries[uuid]

    def _with_instances(self, gpu: Gpu, handle: Any) -> Gpu:
        if not gpu.mig_enabled:
            return gpu
        instances = read_instances(handle, self._geometry_of(gpu.uuid, handle))
        return replace(gpu, instances=instances)

    def _ancestor(self, one: str, other: str) -> int | None:
        """Where two GPUs meet, read once: boards do not move while the driver is loaded."""
        if (one, other) not in self._ancestors:
            self._ancestors[one, other] = read_ancestor(self._handles[one], self._handles[other])
        return self._ancestors[one, other]

    def _require_open(self) -> None:
        if not self._open:
            raise NvmlClosedError("the NVML reader is closed; open a new one")

    def _current(self, uuid: str) -> Gpu:
        self._require_open()
        gpu = self._known.get(uuid)
        if gpu is None:
            raise GpuLostError(f"no GPU {uuid} is known; run a discovery and pick one it lists")
        return gpu

    def _handle(self, uuid: str, generation: int) -> Any:
        """Return the cached handle, or look it up anew once after an invalidation."""
        gpu = self._current(uuid)
        if gpu.generation != generation:
            raise StaleGenerationError(
                f"GPU {uuid} is at generation {gpu.generation}, the caller knows {generation}; "
                "discover again and decide on what is there now"
            )
        if gpu.health is GpuHealth.LOST:
            raise GpuLostError(f"GPU {uuid} is lost: {gpu.health_reason}")
        if uuid not in self._handles:
            self._handles[uuid] = call("nvmlDeviceGetHandleByUUID", uuid)
        return self._handles[uuid]

    def _in_trouble_at(
        self, index: int, uuid: str, error: NvmlCallError, listed: Mapping[str, Gpu]
    ) -> Gpu:
        """Describe the GPU at `index`, which did not answer, by what was known of it."""
        health = GpuHealth.LOST if error.code in _LOST else GpuHealth.FAILING
        before = self._known.get(uuid)
        for gpu in self._known.values():
            if before is None and not uuid and gpu.index == index and gpu.uuid not in listed:
                before = gpu
        if before is None:
            return Gpu(uuid=uuid, index=index, health=health, health_reason=str(error))
        return _in_trouble(before, health, str(error))

    def _with_generation(self, gpu: Gpu) -> Gpu:
        """Carry the generation on, or move it when what handles and indices mean has changed."""
        before = self._known.get(gpu.uuid)
        if before is None:
            return replace(gpu, generation=1)
        if _geometry(before) == _geometry(gpu):
            return replace(gpu, generation=before.generation)
        if gpu.health is GpuHealth.LOST:
            self._handles.pop(gpu.uuid, None)
        return replace(gpu, generation=before.generation + 1)


def _geometry(gpu: Gpu) -> tuple[object, ...]:
    lost = gpu.health is GpuHealth.LOST
    return (gpu.index, gpu.pci_id, gpu.mig_enabled, gpu.instances, lost)


def _in_trouble(gpu: Gpu, health: GpuHealth, reason: str) -> Gpu:
    return replace(gpu, health=health, health_reason=reason, memory_used_bytes=0)


def _unavailable(error: Any) -> NvmlUnavailableError:
    """Say why NVML cannot be used here and what to do."""
    mend = "install or load the NVIDIA driver, or run on a simulated node with --simulate h200x1"
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return NvmlUnavailableError(f"this host has no NVML library (libnvidia-ml.so.1): {mend}")
    if error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return NvmlUnavailableError(f"the NVIDIA kernel driver is not loaded: {mend}")
    return NvmlUnavailableError(f"NVML cannot be initialised ({error}): {mend}")
