"""Graphs without a device: they do what was captured again, and fail where a device would go wrong.

Owns the fake of `engine.graphs`. A real graph reads and writes the addresses that it saw when it
was captured, whatever lies there later, and never comes back to the host. So a replay here runs the
captured function again and compares, operation by operation, which one it is, on which shapes, at
which addresses of memory that it did not make itself. It never hides a difference: each raises
GraphChanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import GraphChanged

_HOST_READS = ("_local_scalar_dense", "nonzero", "pin_memory")
"""Operations that wait for the device or for the host, which no graph can hold."""


class RecordedGraphs:
    """Captures by noting, replays by running again."""

    def __init__(self) -> None:
        self.captured: list[RecordedGraph] = []

    @property
    def replays(self) -> int:
        """Of all graphs together."""
        return sum(graph.replays for graph in self.captured)

    def capture(self, work: Callable[[], None]) -> RecordedGraph:
        graph = RecordedGraph(work)
        self.captured.append(graph)
        return graph


class RecordedGraph:
    """One captured function and what it did."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._notes: list[str] = []
        self.replays = 0
        self.size_bytes = 0
        """Of the tensors that it makes, once it has run."""

    def replay(self) -> None:
        found = self._run()
        self.replays += 1
        if self.replays == 1:
            self._notes = found
        for place, (before, now) in enumerate(zip(self._notes, found, strict=False)):
            if before != now:
                raise GraphChanged(f"operation {place} was {before} at first, and is {now}")
        if len(found) != len(self._notes):
            raise GraphChanged(f"{len(self._notes)} operations at first, {len(found)} replayed")

    def _run(self) -> list[str]:
        recorder = _Recorder()
        with recorder:
            self._work()
        kept = [one for one in recorder.made if one() is not None]
        if kept:
            raise GraphChanged(f"{len(kept)} tensors made inside the graph are kept outside of it")
        self.size_bytes = recorder.made_bytes
        return recorder.notes


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations with the addresses of what was there before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes: list[str] = []
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.made_bytes = 0
        self._own: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(read in name for read in _HOST_READS):
            raise GraphChanged(f"{name} waits, which captured work must not do")
        inputs = list(_tensors((args, kwargs)))
        outside = [self._noted(one) for one in inputs]
        before = {_storage(one) for one in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _storage(tensor) not in before:
                self._own[_storage(tensor)] = weakref.ref(tensor.untyped_storage())
                self.made.append(weakref.ref(tensor))
                self.made_bytes += tensor.untyped_storage().nbytes()
        self.notes.append(f"{name} {outside}")
        return result

    def _noted(self, tensor: torch.Tensor) -> str:
        place = "own" if self._is_own(tensor) else hex(tensor.data_ptr())
        return f"{place} {tuple(tensor.shape)} {tensor.dtype}"

    def _is_own(self, tensor: torch.Tensor) -> bool:
        made = self._own.get(_storage(tensor))
        return made is not None and made() is not None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
