"""Reading the geometry of a board and its GPU instances from NVML. Read only.

It owns the walk over profiles, placements, instances and MIG devices. It keeps no state; handles
that it gets live no longer than the call. The invariant: whatever the board or driver does not
tell (no MIG, no permission) is None or left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pynvml

from partitioner.errors import NvmlCallError
from partitioner.geometry import MIB, Geometry, Instance, Profile
from partitioner.gpu import MigInstance
from partitioner.nvml_facts import call, call_optional

_NAME_PREFIX = "MIG "


def read_geometry(handle: Any) -> Geometry:
    """Every profile of the board with its possible placements; none on a board without MIG."""
    profiles = []
    for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        info = call_optional("nvmlDeviceGetGpuInstanceProfileInfo", handle, number)
        if info is None:
            continue
        name = _text(info.name).removeprefix(_NAME_PREFIX)
        profiles.append(
            Profile(
                name=name,
                id=int(info.id),
                compute_slices=int(info.sliceCount),
                max_instances=int(info.instanceCount),
                memory_bytes=int(info.memorySizeMB) * MIB,
                sm_count=int(info.multiprocessorCount),
                placements=_placements(handle, int(info.id), name),
            )
        )
    return Geometry(tuple(profile for profile in profiles if profile.placements))


def _placements(handle: Any, profile_id: int, name: str) -> tuple[Instance, ...]:
    count = pynvml.c_uint(0)
    function = "nvmlDeviceGetGpuInstancePossiblePlacements"
    if call_optional(function, handle, profile_id, None, pynvml.byref(count)) is None:
        return ()
    table = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    call(function, handle, profile_id, table, pynvml.byref(count))
    return tuple(Instance(int(row.start), int(row.size), name) for row in table[: count.value])


def read_instances(handle: Any, geometry: Geometry) -> tuple[MigInstance, ...] | None:
    """The GPU instances that exist, by slot; None where this process may not see them."""
    devices = dict(mig_devices(handle))
    found = []
    for profile in geometry.profiles:
        table = (pynvml.c_nvmlGpuInstance_t * profile.max_instances)()
        count = pynvml.c_uint(0)
        answer = call_optional(
            "nvmlDeviceGetGpuInstances", handle, profile.id, table, pynvml.byref(count)
        )
        if answer is None:
            return None
        for instance_handle in table[: count.value]:
            info = call("nvmlGpuInstanceGetInfo", instance_handle)
            place = Instance(int(info.placement.start), int(info.placement.size), profile.name)
            device = devices.get(int(info.id))
            found.append(_instance(int(info.id), place, profile, device))
    return tuple(sorted(found, key=lambda each: each.place))


def _instance(number: int, place: Instance, profile: Profile, device: Any) -> MigInstance:
    """An instance without a compute instance has no MIG device: its profile's figures are used."""
    if device is None:
        return MigInstance(number, place, "", profile.memory_bytes, profile.sm_count)
    attributes = call_optional("nvmlDeviceGetAttributes_v2", device)
    uuid = str(call("nvmlDeviceGetUUID", device))
    if attributes is None:
        return MigInstance(number, place, uuid, profile.memory_bytes, profile.sm_count)
    memory_bytes = int(attributes.memorySizeMB) * MIB
    return MigInstance(number, place, uuid, memory_bytes, int(attributes.multiprocessorCount))


def mig_devices(handle: Any) -> Iterator[tuple[int, Any]]:
    """Each MIG device with its instance's number. Indices have holes, so all are asked."""
    for index in range(call_optional("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        try:
            device = call("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
        except NvmlCallError as error:
            if error.code == pynvml.NVML_ERROR_NOT_FOUND:
                continue
            raise
        yield int(call("nvmlDeviceGetGpuInstanceId", device)), device


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
