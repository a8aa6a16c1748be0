"""Nodes and models for the tests of packing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from partitioner.catalogue import load_catalogue
from partitioner.geometry import Instance, geometry_of
from partitioner.layout import GpuState
from partitioner.packing.sharing import Rules, load_rules
from partitioner.packing.values import Bin, Isolation, ModelNeed

MIB = 1 << 20
GIB = 1 << 30
CATALOGUE = load_catalogue()
BANDWIDTH = 4.8e12


def rules(*, shares: bool = True) -> Rules:
    """As on a GPU: pages of 64 MiB, 3 GiB of each worker beside them."""
    return load_rules(64 * MIB, 3 * GIB, shares=shares)


def gpu(
    index: int = 0,
    board: str = "h200",
    *,
    mig: bool = True,
    own: Sequence[Instance] = (),
    foreign: Sequence[Instance] = (),
    bytes_per_s: float = 0.0,
) -> Bin:
    """A GPU to be filled."""
    found = CATALOGUE.board(board)
    state = GpuState(
        uuid=f"GPU-{index}",
        index=index,
        product=found.product,
        pci_id=f"0000:{index:02x}:00.0",
        geometry=geometry_of(found),
        memory_bytes=(found.memory_mib - found.reserved_mib) * MIB,
        mig_enabled=mig,
        mig_toggle_needs_reset=found.mig_toggle_needs_reset,
        instances=tuple(sorted((*own, *foreign))),
        foreign=frozenset(foreign),
    )
    return Bin(state, found.sm_count, bytes_per_s)


def need(name: str = "m", weights_gib: float = 8, kv_gib: float = 4, **rest: Any) -> ModelNeed:
    """A model, by GiB."""
    return ModelNeed(name, int(weights_gib * GIB), int(kv_gib * GIB), **rest)


def random_models(chance: random.Random, count: int) -> list[ModelNeed]:
    """Models of all sizes, tenants, walls and targets, some of which fit nowhere."""
    models = []
    for index in range(count):
        weights_gib = chance.choice((1, 2, 4, 8, 14, 16, 28, 60))
        alone_ms = 1000 * weights_gib * GIB / (BANDWIDTH * 0.6)
        models.append(
            need(
                f"m{index}",
                weights_gib,
                chance.choice((1, 2, 4, 8, 16)),
                tenant=f"t{chance.randrange(4)}",
                isolation=Isolation(chance.choice((0, 1, 1, 2))),
                value=float(chance.randint(1, 10)),
                requests=8,
                ms_per_token=alone_ms * chance.choice((0, 0, 1.5, 2.5, 4, 9, 12)),
                alone_ms=alone_ms,
            )
        )
    return models


def random_node(chance: random.Random, count: int) -> list[Bin]:
    """A node of mixed boards in MIG mode."""
    boards = ("h200", "a100-80", "a30", "h100-80", "rtx-pro-6000")
    return [gpu(index, chance.choice(boards)) for index in range(count)]
