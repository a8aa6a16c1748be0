"""How fast KV was computed and copied lately, and which of the two brings it back sooner.

Owns the measured rates and the comparison; pure but for what `Pace` was told. It never reads a
clock and never copies. Invariant: where a rate was not measured nothing is claimed about it, and KV
is computed again, which needs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

KEPT = 0.875
"""What an earlier measurement counts for beside the one after it: about eight make up a rate."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured rates; 0 is one that was not measured."""

    computed_tokens_per_s: float
    """Of steps with prompts in them, which is how tokens are computed again."""
    copied_bytes_per_s: float
    """Of KV between the device and host memory."""


def worth_parking(tokens: int, kv_bytes: int, rates: Rates) -> bool:
    """Whether copying `kv_bytes` out and back takes less time than computing `tokens` again.

    Both hold up the step thread for as long as they take.
    """
    if not rates.computed_tokens_per_s or not rates.copied_bytes_per_s:
        return False
    return 2 * kv_bytes / rates.copied_bytes_per_s < tokens / rates.computed_tokens_per_s


class Pace:
    """A rate over the last few measurements, longer ones counting for more."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def note(self, amount: int, seconds: float) -> None:
        """So much was done in so long."""
        self._amount = KEPT * self._amount + amount
        self._seconds = KEPT * self._seconds + seconds

    @property
    def per_s(self) -> float:
        """The rate; 0 before anything was measured."""
        return self._amount / self._seconds if self._seconds else 0.0
