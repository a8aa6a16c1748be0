"""Which partitions take nothing new now, and why: cordoned GPUs, and units in trouble.

It owns the cordons, which are an operator's word and outlive the daemon, and the taints, which are
health's. It never takes anything off a partition: what serves on a cordoned GPU goes on; requests
for what is on a tainted partition are held, which the router sees to. The invariant: the answer
follows from these two alone, so that every part of the daemon gets the same one.
"""

from __future__ import annotations

from collections.abc import Iterable

from daemon.control.errors import Refused
from daemon.control.state.records import Cordon
from partitioner.gpu import Gpu
from partitioner.partition import Partition


class Closures:
    """See the module's text."""

    def __init__(self, cordons: Iterable[Cordon] = ()) -> None:
        self.cordons = {each.gpu: each for each in cordons}
        self.taints: dict[str, str] = {}
        """Why, by partition."""

    def tainted(self, partition: str) -> bool:
        """Whether no request may be sent there."""
        return partition in self.taints

    def closed(self, partition: Partition) -> Refused | None:
        """The refusal of whatever would be new on a partition; None where it is open."""
        metadata = {"partition": partition.id, "gpu": partition.gpu_uuid}
        if partition.id in self.taints:
            return Refused(
                f"{partition.id} is in trouble: {self.taints[partition.id]}",
                reason="PARTITION_TAINTED",
                metadata=metadata,
            )
        cordon = self.cordons.get(partition.gpu_uuid)
        if cordon is None:
            return None
        why = f": {cordon.reason}" if cordon.reason else ""
        return Refused(
            f"gpu{partition.gpu_index} is cordoned{why}", reason="GPU_CORDONED", metadata=metadata
        )


def find_gpu(gpus: Iterable[Gpu], text: str) -> Gpu:
    """The GPU that an index, `gpu0` or a UUID means. Raises Refused (GPU_NOT_FOUND)."""
    listed = list(gpus)
    number = text.removeprefix("gpu")
    for gpu in listed:
        if gpu.uuid == text or (number.isdecimal() and gpu.index == int(number)):
            return gpu
    raise Refused(
        f"there is no GPU {text!r}; there are {', '.join(f'gpu{gpu.index}' for gpu in listed)}",
        reason="GPU_NOT_FOUND",
        metadata={"gpu": text},
    )
