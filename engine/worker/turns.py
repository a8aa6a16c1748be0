"""Whose step comes next when several engines of a worker have work: by time and by weight.

Owns what each engine has had of the step thread lately; pure arithmetic over times that others
measure. It never steps, and it never makes an engine wait for one that has nothing to do. An
engine's time is counted divided by its weight, and the one that has had least is next: so engines
that always have work share the time as their weights are to each other, however long their steps
are. Invariants: an engine that had nothing to do is owed nothing for it; what it had beyond its
share it owes even if it rests a while; between engines of equal weight a decode waits for one step
of each other engine at most.
"""

from __future__ import annotations

from collections.abc import Iterable

STEP_S_MIN = 1e-6
"""What a step is counted as at least, or one that took no time could come next for ever."""


class Turns:
    """The order of steps. Of the step thread alone."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        """Weighted seconds of each engine that had more than whoever came last when it came."""
        self._least = 0.0
        """Weighted seconds that the engine which came last had had before: where others begin."""

    def choose(self, ready: Iterable[str]) -> str:
        """The engine that is next, of at least one; of equals the first named."""
        chosen = min(ready, key=self._begin)
        self._least = self._begin(chosen)
        # What is at or behind that begins there: forgotten, the table holds only what is owed.
        self._had = {name: had for name, had in self._had.items() if had > self._least}
        return chosen

    def count(self, name: str, seconds: float, weight: float) -> None:
        """Count a step of the engine that was chosen."""
        self._had[name] = self._begin(name) + max(seconds, STEP_S_MIN) / weight

    def _begin(self, name: str) -> float:
        return max(self._least, self._had.get(name, 0.0))
