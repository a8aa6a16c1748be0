"""What a worker holds, and whether it holds no more afterwards than before.

Owns the figures and the comparison. It never changes a worker.
"""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from bench.results import Figure
from bench.worker import BenchWorker
from engine.link import control

SLACK = {"resident_bytes": 8 << 20, "mappings": 4}
"""What allocators may hold more of after many swaps than before; a leak is one per swap."""


async def holdings(worker: BenchWorker) -> dict[str, int]:
    """What the worker holds, from outside and by its own account."""
    process = psutil.Process(worker.process.pid)
    state = await worker.call(control.Describe())
    return {
        "pages_in_use": state.pages_total - state.pages_free,
        "resident_bytes": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "mappings": len(process.memory_maps(grouped=False)),
        "threads": process.num_threads(),
        "processes": 1 + len(process.children(recursive=True)),
    }


def compared(
    before: Mapping[str, int], after: Mapping[str, int], slack: Mapping[str, int] | None = None
) -> list[Figure]:
    """Each holding before and after, and whether it is no more but for what allocators keep."""
    allowed = {**SLACK, **(slack or {})}
    return [
        Figure(
            name,
            f"{value} before, {after[name]} after",
            "no more" if not allowed.get(name) else f"at most {allowed[name]} more",
            after[name] <= value + allowed.get(name, 0),
        )
        for name, value in before.items()
    ]
