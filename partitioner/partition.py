"""Partitions as values: the shares of GPUs that workers own.

It owns what a partition is called and how large it is. It never changes a GPU and never reads one:
it derives values from values. The invariant: the same GPUs give the same partitions, with the same
ids, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from partitioner.gpu import Gpu, GpuHealth


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
    """

    id: str
    kind: PartitionKind
    gpu_uuid: str
    gpu_index: int
    memory_bytes: int
    sm_count: int
    generation: int


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
        )
        for gpu in sorted(serving, key=lambda gpu: gpu.index)
    )
