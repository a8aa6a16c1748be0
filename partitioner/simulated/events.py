"""NVML's event sets, simulated: who is registered for what, and what waits to be taken.

It owns the sets and their queues. It never knows of ctypes; `health_calls` hands its answers to C.
The invariants: an event is put into every set that is registered for its kind on its GPU, and into
no other; a wait ends with an event, with a GPU of the set being lost, or at its deadline.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

EVENTS_WAITING_MAX = 1024
"""Of one set; later ones push out the oldest, as a driver's ring does."""
SETS_MAX = 64
_FIRST_HANDLE = 0x5EEF0000


@dataclass(frozen=True)
class SimulatedEvent:
    """One event of the GPU with handle `gpu`; `instance` is None for the whole GPU."""

    gpu: int
    kind: int
    data: int
    instance: int | None = None


@dataclass
class _Set:
    registered: dict[int, int] = field(default_factory=dict)
    """Masks of kinds, by the GPU's handle."""
    waiting: deque[SimulatedEvent] = field(default_factory=lambda: deque(maxlen=EVENTS_WAITING_MAX))


class EventSets:
    """All event sets of a node. Usable from any thread."""

    def __init__(self, lost: Callable[[int], bool]) -> None:
        self._lost = lost
        self._sets: dict[int, _Set] = {}
        self._next = _FIRST_HANDLE
        self._changed = threading.Condition()

    def create(self) -> int | None:
        """A new set's handle; None when there are too many."""
        with self._changed:
            if len(self._sets) >= SETS_MAX:
                return None
            handle, self._next = self._next, self._next + 1
            self._sets[handle] = _Set()
            return handle

    def register(self, handle: int, gpu: int, kinds: int) -> bool:
        """Let a set have events of these kinds; False for a set that is not there."""
        with self._changed:
            found = self._sets.get(handle)
            if found is not None:
                found.registered[gpu] = found.registered.get(gpu, 0) | kinds
            return found is not None

    def wait(self, handle: int, timeout_s: float) -> SimulatedEvent | bool | None:
        """The next event; True when a GPU of the set is lost; None at the deadline; False for a set
        that is not there, or is freed meanwhile."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = self._sets.get(handle)
                if found is None:
                    return False
                if found.waiting:
                    return found.waiting.popleft()
                if any(map(self._lost, found.registered)):
                    return True
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)

    def free(self, handle: int) -> bool:
        """Forget a set, and end the waits on it; False for one that is not there."""
        with self._changed:
            found = self._sets.pop(handle, None)
            self._changed.notify_all()
            return found is not None

    def post(self, event: SimulatedEvent) -> None:
        """Report an event to whoever is registered for it."""
        with self._changed:
            for each in self._sets.values():
                if each.registered.get(event.gpu, 0) & event.kind:
                    each.waiting.append(event)
            self._changed.notify_all()

    def look_again(self) -> None:
        """Whether a GPU is lost has changed."""
        with self._changed:
            self._changed.notify_all()
