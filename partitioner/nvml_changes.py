"""Changing how a GPU is cut, through pynvml: MIG mode, and instances at explicit places.

It owns the calls of one change and their errors in this package's words. It keeps no state, fences
nothing (its caller knows generations) and resets no GPU itself. The invariants: an instance is
created at the place that was asked for or not at all as far as this process can bring it about;
only the instance that is at the place its caller believes is destroyed; placements go to pynvml by
reference (by value they end the process).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pynvml

from partitioner.errors import (
    GpuInUseError,
    NvmlCallError,
    PermissionMissingError,
    ResetNeededError,
    StaleGenerationError,
)
from partitioner.geometry import Geometry, Instance, Profile
from partitioner.nvml_facts import call, call_optional

MODE_RIGHT = "with CAP_SYS_ADMIN (as root)"
INSTANCES_RIGHT = "as root, or let it use the driver's MIG capability `mig/config`"


def set_mig_mode(handle: Any, name: str, enabled: bool, *, may_wait: bool = False) -> None:
    """Switch MIG mode. One that would wait for a reset is taken back and refused, or may wait."""
    mode = pynvml.NVML_DEVICE_MIG_ENABLE if enabled else pynvml.NVML_DEVICE_MIG_DISABLE
    with _named(f"switching MIG mode of {name}", MODE_RIGHT):
        activation = call("nvmlDeviceSetMigMode", handle, mode)
    current, pending = call("nvmlDeviceGetMigMode", handle)
    if pending == mode and (may_wait or current == mode):
        return
    with suppress(NvmlCallError):
        call("nvmlDeviceSetMigMode", handle, current)
    if activation == pynvml.NVML_ERROR_IN_USE:
        raise GpuInUseError("nvmlDeviceSetMigMode", activation, name)
    raise ResetNeededError(
        f"MIG mode of {name} changes only when the GPU is reset, which the plan does not have: "
        f"switch it with `nvidia-smi -mig {int(enabled)}`, reset the GPU or the host, and plan "
        "again"
    )


def create_instance(handle: Any, geometry: Geometry, place: Instance) -> None:
    """Create a GPU instance and, over all of it, a compute instance. A half is taken away again."""
    profile = _profile(geometry, place)
    placement = pynvml.c_nvmlGpuInstancePlacement_t()
    placement.start, placement.size = place.start, place.size
    with _named(f"creating {place}", INSTANCES_RIGHT):
        instance = call(
            "nvmlDeviceCreateGpuInstanceWithPlacement",
            handle,
            profile.id,
            pynvml.byref(placement),
        )
        try:
            _create_compute(instance, profile)
        except NvmlCallError:
            # Whatever is left if this fails as well is seen by whoever reads the GPU again.
            with suppress(NvmlCallError):
                call("nvmlGpuInstanceDestroy", instance)
            raise


def complete_instance(handle: Any, geometry: Geometry, number: int, place: Instance) -> None:
    """Create the compute instance that a GPU instance lacks."""
    profile = _profile(geometry, place)
    with _named(f"completing {place}", INSTANCES_RIGHT):
        _create_compute(_instance_at(handle, number, place, profile), profile)


def destroy_instance(handle: Any, geometry: Geometry, number: int, place: Instance) -> None:
    """Destroy the compute instances of a GPU instance, then itself."""
    profile = _profile(geometry, place)
    with _named(str(place), INSTANCES_RIGHT):
        instance = _instance_at(handle, number, place, profile)
        for compute in _compute_instances(instance, profile):
            call("nvmlComputeInstanceDestroy", compute)
        call("nvmlGpuInstanceDestroy", instance)


def _profile(geometry: Geometry, place: Instance) -> Profile:
    profile = geometry.by_name.get(place.profile)
    if profile is None or not geometry.has(place):
        raise StaleGenerationError(
            f"{place} is not a placement of this board as its driver tells it now: plan again"
        )
    return profile


def _instance_at(handle: Any, number: int, place: Instance, profile: Profile) -> Any:
    """The handle of an instance, after a look at whether it is the one that is meant."""
    instance = call("nvmlDeviceGetGpuInstanceById", handle, number)
    info = call("nvmlGpuInstanceGetInfo", instance)
    there = (int(info.profileId), int(info.placement.start), int(info.placement.size))
    if there != (profile.id, place.start, place.size):
        raise StaleGenerationError(
            f"GPU instance {number} is no longer {place}: discover again, then decide again"
        )
    return instance


def _create_compute(instance: Any, profile: Profile) -> None:
    for _, info in _compute_profiles(instance):
        if int(info.sliceCount) == profile.compute_slices:
            call("nvmlGpuInstanceCreateComputeInstance", instance, int(info.id))
            return
    raise NvmlCallError(
        "nvmlGpuInstanceGetComputeInstanceProfileInfo",
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        f"{profile.name} has no compute instance profile of {profile.compute_slices} slices",
    )


def _compute_profiles(instance: Any) -> Iterator[tuple[int, Any]]:
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        info = call_optional(
            "nvmlGpuInstanceGetComputeInstanceProfileInfo",
            instance,
            number,
            pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED,
            1,  # The first version of the struct, which every driver with MIG knows.
        )
        if info is not None:
            yield number, info


def _compute_instances(instance: Any, profile: Profile) -> list[Any]:
    found: list[Any] = []
    for _, info in _compute_profiles(instance):
        table = (pynvml.c_nvmlComputeInstance_t * max(1, profile.compute_slices))()
        count = pynvml.c_uint(0)
        call(
            "nvmlGpuInstanceGetComputeInstances",
            instance,
            int(info.id),
            table,
            pynvml.byref(count),
        )
        found.extend(table[: count.value])
    return found


@contextmanager
def _named(what: str, right: str) -> Iterator[None]:
    """Say what was tried where the driver refuses for want of a right, or of peace."""
    try:
        yield
    except NvmlCallError as error:
        if error.code == pynvml.NVML_ERROR_NO_PERMISSION:
            raise PermissionMissingError(error.function, error.code, what, right) from error
        if error.code == pynvml.NVML_ERROR_IN_USE:
            raise GpuInUseError(error.function, error.code, what) from error
        raise
