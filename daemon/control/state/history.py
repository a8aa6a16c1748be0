"""How long exchanges took here before, and so how long the next one is going to take.

It owns a bounded memory of each partition's exchanges and the arithmetic over it; it never asks a
clock or a worker. The invariant: a prediction is made of what was measured on the same partition,
medians of the most similar exchanges, and of the link's measured limit where nothing is known yet.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from daemon.control.state.records import LinkRate
from engine.link.control import Ledger

SAMPLES_MAX = 32
# Copies of less than half or more than twice the size may go at another rate.
ALIKE = 2.0
# Two measurements of one link that are further apart than this are of two different links.
LINK_CHANGED = 1.25


@dataclass(frozen=True)
class Sample:
    """One exchange. `busy`: requests ran whose end it waited for."""

    copied_bytes: int
    copy_ms: float
    drain_ms: float
    fixed_ms: float
    """All but draining, copying, parking and waiting for the link: eviction, verification, the
    turns of the worker's loop."""
    busy: bool
    parked_bytes: int = 0
    park_ms: float = 0.0


@dataclass(frozen=True)
class Past:
    """What is known of a partition."""

    link_bytes_per_s: float
    samples: tuple[Sample, ...] = ()
    out_bytes_per_s: float = 0.0
    """The link's limit the other way; 0: not known, and taken to be the same."""

    def predict_ms(
        self, copy_bytes: int, *, busy: bool, drain_timeout_s: float, parked_bytes: int = 0
    ) -> float:
        """An exchange's duration in milliseconds, from the worker's being asked to its end.

        KV is parked while weights come in, in the link's other direction, and weights follow into
        the pages that fall free by it: of the two the longer one counts.
        """
        # A copy that waits for pages is no measure of the link.
        copies = [each for each in self.samples if each.copied_bytes]
        copies = [each for each in copies if not each.parked_bytes] or copies
        alike = [
            each for each in copies if copy_bytes / ALIKE <= each.copied_bytes <= copy_bytes * ALIKE
        ]
        rates = [each.copied_bytes / each.copy_ms for each in alike or copies if each.copy_ms]
        rate_per_ms = _median(rates) or self.link_bytes_per_s / 1000
        drains = [each.drain_ms for each in self.samples if each.busy == busy]
        drain_ms = min(_median(drains), drain_timeout_s * 1000) if busy else _median(drains)
        fixed = [
            each.fixed_ms for each in self.samples if bool(each.copied_bytes) == (copy_bytes > 0)
        ]
        parks = [each.parked_bytes / each.park_ms for each in self.samples if each.park_ms]
        park_rate_per_ms = _median(parks) or self.out_bytes_per_s / 1000 or rate_per_ms
        moving_ms = max(copy_bytes / rate_per_ms, parked_bytes / park_rate_per_ms)
        return moving_ms + drain_ms + _median(fixed)

    def drained_within(self, timeout_s: float) -> bool:
        """Whether running requests are likely to end in that time, rather than being kept."""
        drains = [each.drain_ms for each in self.samples if each.busy and each.drain_ms]
        return timeout_s > 0 and _median(drains) < timeout_s * 1000


class History:
    """Every partition's past exchanges, and its link as it was calibrated."""

    def __init__(self, links: Iterable[LinkRate] = ()) -> None:
        self._samples: dict[str, deque[Sample]] = {}
        self.links = {each.partition: each for each in links}

    def note(self, partition: str, ledger: Ledger, *, busy: bool) -> None:
        """Remember a committed exchange."""
        moving_ms = max(ledger.copy_ms, ledger.park_ms)
        fixed_ms = max(0.0, ledger.total_ms - moving_ms - ledger.drain_ms - ledger.link_wait_ms)
        sample = Sample(
            copied_bytes=ledger.copied_bytes,
            copy_ms=ledger.copy_ms,
            drain_ms=ledger.drain_ms,
            fixed_ms=fixed_ms,
            busy=busy,
            parked_bytes=ledger.parked_bytes,
            park_ms=ledger.park_ms,
        )
        self._samples.setdefault(partition, deque(maxlen=SAMPLES_MAX)).append(sample)

    def past(self, partition: str, measured_bytes_per_s: float) -> Past:
        """What is known of a partition whose worker measured its link at its own start."""
        calibrated = self.links.get(partition)
        rate = link_rate(
            calibrated.bytes_per_s if calibrated is not None else 0.0, measured_bytes_per_s
        )
        samples = tuple(self._samples.get(partition, ()))
        return Past(rate, samples, calibrated.out_bytes_per_s if calibrated is not None else 0.0)


def link_rate(calibrated_bytes_per_s: float, measured_bytes_per_s: float) -> float:
    """A link's limit by an earlier calibration and its present worker's own measurement.

    Either is of the best of several copies, and so the better one is nearer to the limit; but for a
    link that has changed, where the newer one counts. 0 is for one that was not made.
    """
    low, high = sorted((calibrated_bytes_per_s, measured_bytes_per_s))
    if low and high > low * LINK_CHANGED:
        return measured_bytes_per_s
    return high


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
