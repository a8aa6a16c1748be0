"""A packing as a layout file, and the names that its partitions will have.

It owns the writing. It decides nothing. The invariant: planning the file gives exactly the places
that were packed, since every instance is written with its profile and start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from partitioner.layout_file import format_size
from partitioner.packing.sharing import Rules
from partitioner.packing.values import Arrangement, Filled, ModelNeed, Packing


def layout_text(packing: Packing, models: Sequence[ModelNeed], rules: Rules) -> str:
    """The layout file; GPUs that nothing was placed on are left out, and so left as they are."""
    gpus = [_gpu(each, models, rules) for each in packing.filled]
    if not gpus:
        return ""
    document = {"version": 1, "gpus": gpus}
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100)


def partitions(filled: Filled) -> list[tuple[str, Arrangement, tuple[int, ...]]]:
    """The partitions of a GPU: name, the arrangement it is part of, and the models on it."""
    named = []
    for place, arrangement in filled.rooms:
        parent = filled.bin.state.partition_id(place)
        names = [parent]
        if arrangement.shared:
            names = [f"{parent}/mps{number}" for number in range(len(arrangement.workers))]
        named += [
            (name, arrangement, worker.models)
            for name, worker in zip(names, arrangement.workers, strict=True)
        ]
    return named


def _gpu(filled: Filled, models: Sequence[ModelNeed], rules: Rules) -> dict[str, Any]:
    entry: dict[str, Any] = {"uuid": filled.bin.state.uuid}
    if any(place is None for place, _ in filled.rooms):
        ((_, arrangement),) = filled.rooms
        return entry | _inside(arrangement, models, rules)
    entry["partitions"] = [
        {"profile": place.profile, "start": place.start} | _inside(arrangement, models, rules)
        for place, arrangement in filled.rooms
        if place is not None
    ]
    return entry


def _inside(arrangement: Arrangement, models: Sequence[ModelNeed], rules: Rules) -> dict[str, Any]:
    if not arrangement.shared:
        return _owner(arrangement.models, models)
    threads = rules.threads_percent(len(arrangement.workers))
    shares = [
        {"memory": format_size(worker.memory_bytes), "threads": threads}
        | _owner(worker.models, models)
        for worker in arrangement.workers
    ]
    return {"shares": shares}


def _owner(group: Sequence[int], models: Sequence[ModelNeed]) -> dict[str, str]:
    tenants = {models[index].tenant for index in group}
    tenant = tenants.pop() if len(tenants) == 1 else ""
    return {"owner": tenant} if tenant else {}
