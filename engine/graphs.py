"""Steps recorded once and replayed: the Protocol, and CUDA's way of it.

Owns how device work is captured and replayed, and the one memory pool that all graphs of a worker
share. It never knows what is captured. Invariants: what a graph reads and writes besides its own
intermediates stays at its address for as long as the graph is kept; graphs of one pool are replayed
one at a time, in the order of one stream, so they may use the same memory for intermediates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

GRAPH_ROWS_MAX = 256
"""Rows of the largest bucket; larger batches are launched kernel by kernel, which by then costs
little beside what is computed."""
_SMALL_BUCKETS = (1, 2, 4, 8)
_BUCKET_STEP = 8


class Graph(Protocol):
    """Captured work."""

    @property
    def size_bytes(self) -> int:
        """Memory that it brought to the pool of its worker, beside what graphs before it use."""

    def replay(self) -> None:
        """Have it done again, on the same addresses, in the order of what is launched now."""


class Graphs(Protocol):
    """What captures. One for all engines of a worker."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` launches, without it being done.

        `work` must have run once before: a kernel is not compiled or loaded while it is recorded.
        """


class CudaGraph:
    """A graph of the current device."""

    def __init__(self, graph: torch.cuda.CUDAGraph, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """Graphs of the current device, in one pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, work: Callable[[], None]) -> Graph:
        """As the Protocol says. Takes about as long as to launch the work kernel by kernel.

        Not torch's own context manager: it waits for the device and empties the allocator's cache,
        both of which would hold up what is served meanwhile. Other threads copy weights while a
        graph is captured, so only this thread's calls count.
        """
        graph = torch.cuda.CUDAGraph()
        before_bytes = torch.cuda.memory_reserved()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return CudaGraph(graph, torch.cuda.memory_reserved() - before_bytes)


def buckets_up_to(rows_max: int) -> tuple[int, ...]:
    """Batch sizes that are captured: 1, 2, 4, 8, 16, 24 and so on, until `rows_max` fit or
    GRAPH_ROWS_MAX is reached."""
    found = []
    for bucket in (*_SMALL_BUCKETS, *range(2 * _BUCKET_STEP, GRAPH_ROWS_MAX + 1, _BUCKET_STEP)):
        found.append(bucket)
        if bucket >= rows_max:
            break
    return tuple(found)
