"""Which GPUs divide one way to the host's memory, as the PCI topology says.

It owns the rule: two GPUs share a link where the path between them passes bridges and switches
alone, for then their copies meet on the way to the root. GPUs that meet at a host bridge or beyond
have a root port each. It reads nothing and keeps nothing. The invariants: sharing is transitive;
every GPU has a link, by itself if with nobody; a link has the same name whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pynvml

from partitioner.gpu import Gpu

SHARED_UP_TO = pynvml.NVML_TOPOLOGY_MULTIPLE
"""The farthest common ancestor, in NVML's levels, below which two GPUs are on one root port."""


def links(gpus: Sequence[Gpu], ancestor: Callable[[str, str], int | None]) -> dict[str, str]:
    """The link of each GPU by UUID, named by the lowest PCI id on it.

    `ancestor(uuid, uuid)` is NVML's level of the nearest common ancestor, None where it does not
    tell: then they are taken to share nothing, as GPUs of one's own desk do.
    """
    name: dict[str, str] = {}
    ordered = sorted(gpus, key=lambda gpu: (gpu.pci_id, gpu.uuid))
    for gpu in ordered:
        near = {
            name[other]
            for other in name
            if (level := ancestor(gpu.uuid, other)) is not None and level <= SHARED_UP_TO
        }
        own = min(near, default=gpu.pci_id or gpu.uuid)
        name[gpu.uuid] = own
        for other in name:
            if name[other] in near:
                name[other] = own
    return name
