"""What the simulated NVML functions about MIG answer: mode, profiles and instances, read only.

It owns one small function per NVML symbol, and their table. It never changes the node: functions
that do are in `mig_changes`. The invariant: geometry comes from the board's data alone, whatever
its number of slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pynvml

from partitioner.catalogue import MigProfile
from partitioner.simulated.abi import (
    Held,
    Status,
    Symbol,
    put_string,
    put_uint,
    unsigned,
    versioned,
)
from partitioner.simulated.node import SimulatedGpu, SimulatedInstance, SimulatedNode


def _mig_mode(node: SimulatedNode, gpu: SimulatedGpu, current: int, pending: int) -> None:
    require_mig_board(gpu)
    put_uint(current, int(gpu.mig_current))
    put_uint(pending, int(gpu.mig_pending))


def require_mig_board(gpu: SimulatedGpu) -> None:
    if not gpu.board.mig_capable:
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)


def _mig_device_by_index(node: SimulatedNode, gpu: SimulatedGpu, index: int, out: int) -> None:
    if not gpu.mig_current:
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    devices = [each for each in gpu.instances if each.complete]
    if index >= len(devices):
        raise Status(pynvml.NVML_ERROR_NOT_FOUND)
    ctypes.c_void_p.from_address(out).value = devices[index].device_handle


def profile_of(gpu: SimulatedGpu, field: str, number: int, missing: int) -> MigProfile:
    require_mig_board(gpu)
    for profile in gpu.board.profiles:
        if getattr(profile, field) == number:
            return profile
    raise Status(missing)


def _profile_by_enum(gpu: SimulatedGpu, number: int) -> MigProfile:
    if number >= pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT:
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    return profile_of(gpu, "enum", number, pynvml.NVML_ERROR_NOT_SUPPORTED)


def _fill_profile(info: Any, profile: MigProfile) -> None:
    info.id = profile.id
    info.isP2pSupported = 0
    info.sliceCount = profile.compute_slices
    info.instanceCount = profile.max_instances
    info.multiprocessorCount = profile.sm_count
    info.copyEngineCount = profile.copy_engines
    info.decoderCount = profile.decoders
    info.encoderCount = profile.encoders
    info.jpegCount = profile.jpeg
    info.ofaCount = profile.ofa
    info.memorySizeMB = profile.memory_mib


def _fill_named_profile(address: int, profile: MigProfile) -> None:
    info = versioned(
        pynvml.c_nvmlGpuInstanceProfileInfo_v2_t, address, pynvml.nvmlGpuInstanceProfileInfo_v2
    )
    _fill_profile(info, profile)
    info.name = f"MIG {profile.name}"


def _profile_info_v1(node: SimulatedNode, gpu: SimulatedGpu, number: int, out: int) -> None:
    profile = _profile_by_enum(gpu, number)
    _fill_profile(pynvml.c_nvmlGpuInstanceProfileInfo_t.from_address(out), profile)


def _profile_info_v2(node: SimulatedNode, gpu: SimulatedGpu, number: int, out: int) -> None:
    _fill_named_profile(out, _profile_by_enum(gpu, number))


def _profile_info_by_id(node: SimulatedNode, gpu: SimulatedGpu, number: int, out: int) -> None:
    _fill_named_profile(out, profile_of(gpu, "id", number, pynvml.NVML_ERROR_INVALID_ARGUMENT))


def _possible_placements(
    node: SimulatedNode, gpu: SimulatedGpu, number: int, out: int | None, count: int
) -> None:
    profile = profile_of(gpu, "id", number, pynvml.NVML_ERROR_INVALID_ARGUMENT)
    put_uint(count, len(profile.placements))
    if out is None:  # The first of the two calls asks only how many there are.
        return
    table = (pynvml.c_nvmlGpuInstancePlacement_t * len(profile.placements)).from_address(out)
    for row, placement in zip(table, profile.placements, strict=True):
        row.start, row.size = placement.start, placement.size


# Instances, and the MIG devices over them.


def _gpu_instances(
    node: SimulatedNode, gpu: SimulatedGpu, number: int, out: int, count: int
) -> None:
    """Writes as many handles as there are; the caller has room for the profile's most."""
    if not gpu.mig_current:
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    profile = profile_of(gpu, "id", number, pynvml.NVML_ERROR_INVALID_ARGUMENT)
    found = [each for each in gpu.instances if each.place.profile == profile.name]
    table = (ctypes.c_void_p * len(found)).from_address(out)
    for index, each in enumerate(found):
        table[index] = each.handle
    put_uint(count, len(found))


def _gpu_instance_info(
    node: SimulatedNode, held: tuple[SimulatedGpu, SimulatedInstance], out: int
) -> None:
    gpu, instance = held
    profile = profile_named(gpu, instance.place.profile)
    info = pynvml.c_nvmlGpuInstanceInfo_t.from_address(out)
    ctypes.c_void_p.from_address(out).value = gpu.handle  # The first field: the parent device.
    info.id, info.profileId = instance.number, profile.id
    info.placement.start, info.placement.size = instance.place.start, instance.place.size


def profile_named(gpu: SimulatedGpu, name: str) -> MigProfile:
    return next(profile for profile in gpu.board.profiles if profile.name == name)


def _instance_of(held: Held) -> tuple[SimulatedGpu, SimulatedInstance]:
    """The instance of a MIG device; a GPU's own handle is refused."""
    if not isinstance(held, tuple):
        raise Status(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    return held


def _uuid(node: SimulatedNode, held: Held, out: int, length: int) -> None:
    put_string(out, length, held[1].uuid if isinstance(held, tuple) else held.uuid)


def _is_mig_device(node: SimulatedNode, held: Held, out: int) -> None:
    put_uint(out, int(isinstance(held, tuple)))


def _gpu_instance_id(node: SimulatedNode, held: Held, out: int) -> None:
    put_uint(out, _instance_of(held)[1].number)


def _compute_instance_id(node: SimulatedNode, held: Held, out: int) -> None:
    _instance_of(held)
    put_uint(out, 0)


def _parent_device(node: SimulatedNode, held: Held, out: int) -> None:
    ctypes.c_void_p.from_address(out).value = _instance_of(held)[0].handle


def _attributes(node: SimulatedNode, held: Held, out: int) -> None:
    if not isinstance(held, tuple):  # Attributes are told of MIG devices only.
        raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
    gpu, instance = held
    profile = profile_named(gpu, instance.place.profile)
    attributes = pynvml.c_nvmlDeviceAttributes.from_address(out)
    attributes.multiprocessorCount = profile.sm_count
    attributes.sharedCopyEngineCount = profile.copy_engines
    attributes.sharedDecoderCount = profile.decoders
    attributes.sharedEncoderCount = profile.encoders
    attributes.sharedJpegCount = profile.jpeg
    attributes.sharedOfaCount = profile.ofa
    attributes.gpuInstanceSliceCount = profile.compute_slices
    attributes.computeInstanceSliceCount = profile.compute_slices
    attributes.memorySizeMB = profile.memory_mib


MIG_CALLS: Mapping[str, Symbol] = MappingProxyType(
    {
        "nvmlDeviceGetUUID": ("dpu", _uuid),
        "nvmlDeviceIsMigDeviceHandle": ("dp", _is_mig_device),
        "nvmlDeviceGetGpuInstances": ("hupp", _gpu_instances),
        "nvmlGpuInstanceGetInfo": ("gp", _gpu_instance_info),
        "nvmlDeviceGetGpuInstanceId": ("dp", _gpu_instance_id),
        "nvmlDeviceGetComputeInstanceId": ("dp", _compute_instance_id),
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": ("dp", _parent_device),
        "nvmlDeviceGetAttributes_v2": ("dp", _attributes),
        "nvmlDeviceGetMigMode": ("hpp", _mig_mode),
        # The most MIG devices there may be is told only while MIG is on.
        "nvmlDeviceGetMaxMigDeviceCount": unsigned(
            lambda gpu: gpu.board.compute_slices if gpu.mig_current else 0
        ),
        "nvmlDeviceGetMigDeviceHandleByIndex": ("hup", _mig_device_by_index),
        "nvmlDeviceGetGpuInstanceProfileInfo": ("hup", _profile_info_v1),
        "nvmlDeviceGetGpuInstanceProfileInfoV": ("hup", _profile_info_v2),
        "nvmlDeviceGetGpuInstanceProfileInfoByIdV": ("hup", _profile_info_by_id),
        "nvmlDeviceGetGpuInstancePossiblePlacements_v2": ("huop", _possible_placements),
    }
)
