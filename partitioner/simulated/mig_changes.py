"""What the simulated NVML functions that change a GPU's cut do, and when they refuse.

It owns the rules of the driver: slots, slices and counts, MIG mode, who uses what. The state itself
is the node's. The invariants: a legal cut stays legal, whoever calls what; a call that is refused
has changed nothing; what a process uses is not taken away.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pynvml

from partitioner.geometry import Instance, geometry_of
from partitioner.simulated.abi import Status, Symbol, put_uint
from partitioner.simulated.mig_calls import profile_named, profile_of, require_mig_board
from partitioner.simulated.node import SimulatedGpu, SimulatedInstance, SimulatedNode

Cut = tuple[SimulatedGpu, SimulatedInstance]

# NVML's number of the compute instance profile that has so many slices; its id is the same.
_COMPUTE_PROFILES: Mapping[int, int] = MappingProxyType({1: 0, 2: 1, 3: 2, 4: 3, 7: 4, 8: 5, 6: 6})


def _set_mode(node: SimulatedNode, gpu: SimulatedGpu, mode: int, activation: int) -> None:
    """Ampere waits for a reset; later boards switch at once, if nobody is there."""
    require_mig_board(gpu)
    enabled = mode == pynvml.NVML_DEVICE_MIG_ENABLE
    put_uint(activation, pynvml.NVML_SUCCESS)
    if enabled == gpu.mig_current:
        node.set_mig(gpu, enabled, at_once=True)
    elif gpu.processes or gpu.instances:
        raise Status(pynvml.NVML_ERROR_IN_USE)
    elif gpu.board.mig_toggle_needs_reset:
        put_uint(activation, pynvml.NVML_ERROR_RESET_REQUIRED)
        node.set_mig(gpu, enabled, at_once=False)
    else:
        node.set_mig(gpu, enabled, at_once=True)


def _create(node: SimulatedNode, gpu: SimulatedGpu, number: int, wanted: int, out: int) -> None:
    """An occupied placement is answered as the driver does: INSUFFICIENT_RESOURCES."""
    if not gpu.mig_current:
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    profile = profile_of(gpu, "id", number, pynvml.NVML_ERROR_INVALID_ARGUMENT)
    placement = pynvml.c_nvmlGpuInstancePlacement_t.from_address(wanted)
    place = Instance(int(placement.start), int(placement.size), profile.name)
    geometry = geometry_of(gpu.board)
    if not geometry.has(place):
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    if not geometry.fits([each.place for each in gpu.instances], place):
        raise Status(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
    taken = {each.number for each in gpu.instances}
    free = next(number for number in range(1, len(taken) + 2) if number not in taken)
    made = node.make_instance(gpu, free, place, complete=False)
    node.cut(gpu, (*gpu.instances, made))
    ctypes.c_void_p.from_address(out).value = made.handle


def _by_id(node: SimulatedNode, gpu: SimulatedGpu, number: int, out: int) -> None:
    found = next((each for each in gpu.instances if each.number == number), None)
    if found is None:
        raise Status(pynvml.NVML_ERROR_NOT_FOUND)
    ctypes.c_void_p.from_address(out).value = found.handle


def _destroy(node: SimulatedNode, held: Cut) -> None:
    gpu, instance = held
    if instance.complete or gpu.holds(instance):
        raise Status(pynvml.NVML_ERROR_IN_USE)
    node.cut(gpu, tuple(each for each in gpu.instances if each is not instance))


def _compute_slices(held: Cut) -> int:
    gpu, instance = held
    return profile_named(gpu, instance.place.profile).compute_slices


def _compute_profile(node: SimulatedNode, held: Cut, number: int, engine: int, out: int) -> None:
    """Of the compute instances that a board offers only the one over the whole instance."""
    gpu, instance = held
    if _COMPUTE_PROFILES.get(_compute_slices(held)) != number or engine != 0:
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    profile = profile_named(gpu, instance.place.profile)
    info = pynvml.c_nvmlComputeInstanceProfileInfo_t.from_address(out)
    info.id, info.sliceCount, info.instanceCount = number, profile.compute_slices, 1
    info.multiprocessorCount = profile.sm_count


def _create_compute(node: SimulatedNode, held: Cut, number: int, out: int) -> None:
    gpu, instance = held
    if _COMPUTE_PROFILES.get(_compute_slices(held)) != number:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    if instance.complete:
        raise Status(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
    _put(node, gpu, instance, replace(instance, complete=True))
    ctypes.c_void_p.from_address(out).value = instance.compute_handle


def _compute_instances(node: SimulatedNode, held: Cut, number: int, out: int, count: int) -> None:
    _, instance = held
    there = instance.complete and _COMPUTE_PROFILES.get(_compute_slices(held)) == number
    if there:
        ctypes.c_void_p.from_address(out).value = instance.compute_handle
    put_uint(count, int(there))


def _destroy_compute(node: SimulatedNode, held: Cut) -> None:
    gpu, instance = held
    if gpu.holds(instance):
        raise Status(pynvml.NVML_ERROR_IN_USE)
    _put(node, gpu, instance, replace(instance, complete=False))


def _put(
    node: SimulatedNode, gpu: SimulatedGpu, before: SimulatedInstance, after: SimulatedInstance
) -> None:
    node.cut(gpu, tuple(after if each is before else each for each in gpu.instances))


MIG_CHANGES: Mapping[str, Symbol] = MappingProxyType(
    {
        "nvmlDeviceSetMigMode": ("hup", _set_mode),
        "nvmlDeviceCreateGpuInstanceWithPlacement": ("hupp", _create),
        "nvmlDeviceGetGpuInstanceById": ("hup", _by_id),
        "nvmlGpuInstanceDestroy": ("g", _destroy),
        "nvmlGpuInstanceGetComputeInstanceProfileInfo": ("guup", _compute_profile),
        "nvmlGpuInstanceCreateComputeInstance": ("gup", _create_compute),
        "nvmlGpuInstanceGetComputeInstances": ("gupp", _compute_instances),
        "nvmlComputeInstanceDestroy": ("c", _destroy_compute),
    }
)
