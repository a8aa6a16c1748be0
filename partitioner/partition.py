"""Partitions as values: the shares of GPUs that workers own.

It owns what a partition is called and how large it is. It never changes a GPU and never reads one:
it derives values from values. The invariant: the same GPUs give the same partitions, with the same
ids, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from partitioner.cutting import Owned
from partitioner.gpu import Gpu, GpuHealth
from partitioner.mps.control import Limits
from partitioner.mps.shared import SharedPlace


class PartitionKind(StrEnum):
    """How a partition is walled off from its neighbours."""

    WHOLE = "whole"  # A GPU of its own.
    MIG = "mig"  # A GPU instance: walls in hardware.
    MPS = "mps"  # A share under an MPS server: walls between processes.


@dataclass(frozen=True)
class Partition:
    """One share of one GPU.

    `memory_bytes` is what its worker may use, driver reserve excluded. `sm_count` is 0 where the
    driver does not tell. `generation` is that of the geometry in which the partition was seen.
    `link` is its GPU's: partitions with the same one share the way to the host's memory.
    `device_uuid` is what CUDA knows it by where that is not the GPU: the MIG device.
    """

    id: str
    kind: PartitionKind
    gpu_uuid: str
    gpu_index: int
    memory_bytes: int
    sm_count: int
    generation: int
    link: str = ""
    device_uuid: str = ""
    place_bytes: int = 0
    """Of a share: the memory of the GPU or instance that it is a share of."""
    thread_percent: int = 100
    """At most so much of the place's threads."""


def whole_partitions(gpus: Iterable[Gpu]) -> tuple[Partition, ...]:
    """Return one whole partition, `gpu<index>`, for each GPU that can serve as one, in index order.

    Left out are GPUs that are not healthy, and GPUs in MIG mode: nothing can run on those but on
    their instances.
    """
    serving = (gpu for gpu in gpus if gpu.health is GpuHealth.OK and not gpu.mig_enabled)
    return tuple(
        Partition(
            id=f"gpu{gpu.index}",
            kind=PartitionKind.WHOLE,
            gpu_uuid=gpu.uuid,
            gpu_index=gpu.index,
            memory_bytes=gpu.usable_bytes,
            sm_count=gpu.sm_count,
            generation=gpu.generation,
            link=gpu.link,
        )
        for gpu in sorted(serving, key=lambda gpu: gpu.index)
    )


def partitions_of(
    gpus: Iterable[Gpu],
    owned: Iterable[Owned],
    boot_id: str,
    shared: Iterable[SharedPlace] = (),
) -> tuple[Partition, ...]:
    """The partitions that can serve: whole GPUs, and those instances that are marked as ours.

    Those that are shared are replaced by their shares.

    Left out are instances of others and such as are only half made. In order of GPU and slot.
    """
    marks = tuple(owned)
    found = list(gpus)
    instances = [
        Partition(
            id=f"gpu{gpu.index}/{each.place}",
            kind=PartitionKind.MIG,
            gpu_uuid=gpu.uuid,
            gpu_index=gpu.index,
            memory_bytes=each.memory_bytes,
            sm_count=each.sm_count,
            generation=gpu.generation,
            link=gpu.link,
            device_uuid=each.uuid,
        )
        for gpu in found
        if gpu.health is GpuHealth.OK and gpu.mig_enabled
        for each in gpu.instances or ()
        if each.uuid and any(mark.marks(gpu.uuid, each, boot_id) for mark in marks)
    ]
    # Stable: the instances of a GPU stay in the order of their slots.
    places = {(each.name, each.device): each for each in shared}
    return tuple(
        part
        for whole in sorted([*whole_partitions(found), *instances], key=lambda one: one.gpu_index)
        for part in _divided(whole, places.get((whole.id, whole.device_uuid or whole.gpu_uuid)))
    )


def _divided(whole: Partition, shared: SharedPlace | None) -> Iterable[Partition]:
    """A place, or its shares."""
    if shared is None:
        return (whole,)
    return (
        replace(
            whole,
            id=name,
            kind=PartitionKind.MPS,
            memory_bytes=limits.memory_bytes,
            sm_count=_sm_count(whole, limits),
            place_bytes=whole.memory_bytes,
            thread_percent=_thread_percent(whole, limits),
        )
        for name, limits in zip(shared.partitions, shared.limits, strict=True)
    )


def _sm_count(whole: Partition, limits: Limits) -> int:
    """Of a share: its own multiprocessors, or the most that it may use of the common ones."""
    if limits.sm_count is not None:
        return limits.sm_count
    return whole.sm_count * limits.thread_percent // 100


def _thread_percent(whole: Partition, limits: Limits) -> int:
    if limits.sm_count is None or not whole.sm_count:
        return limits.thread_percent
    return max(1, 100 * limits.sm_count // whole.sm_count)
