"""What an exchange did, measured while it is under way.

Owns the figures and turns them into the result that is reported; it never influences the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from engine.link.control import CanaryRecord, ExchangeResult, Ledger
from engine.link.tokens import Output
from engine.worker.drain import DrainCounts
from engine.worker.errors import message_of, reason_of
from engine.worker.order import Order
from swap.shared_link import Turn


class Journal:
    """The figures of one exchange. Times are of `clock`, in seconds; the ledger's in ms."""

    def __init__(self, order: Order, link_bytes_per_s: float, clock: Callable[[], float]) -> None:
        self.counts = DrainCounts()
        self.evicted_bytes = 0
        self.copied_bytes = 0
        self.staged_bytes = 0
        self.preserved = 0
        self.residue_bytes = 0
        self.canary: CanaryRecord | None = None
        self.unparked_s: Callable[[], float] = lambda: 0.0
        """Time the incoming model has spent so far on bringing its KV back."""
        self._parked_bytes = 0
        self._link_missed = False
        self.pageable_bytes = 0
        self._link_bytes_per_s = link_bytes_per_s
        self._order = order
        self._clock = clock
        self._phases_ms: dict[str, float] = {}
        self._first_token_ms: float | None = None
        self._failure: Exception | None = None
        self._ended = clock()

    @contextmanager
    def phase(self, name: str) -> Generator[None, None, None]:
        """Measure a phase, named as in the ledger."""
        started = self._clock()
        try:
            yield
        finally:
            self._phases_ms[name] = (self._clock() - started) * 1000

    def copied(self, size_bytes: int, seconds: float) -> None:
        """Note the copy by its own time: steps that were taken behind it are not its."""
        self._phases_ms["copy_ms"] = seconds * 1000
        self.copied_bytes = size_bytes

    def waited(self, turn: Turn) -> None:
        """Note how long the copy waited for the link, and whether it went on beside others."""
        self._phases_ms["link_wait_ms"] = turn.waited_s * 1000
        self._link_missed = turn.missed

    def parked(self, size_bytes: int, seconds: float) -> None:
        """Note KV copied out to make room, by its own time."""
        self._phases_ms["park_ms"] = seconds * 1000
        self._parked_bytes = size_bytes

    def sent(self, outputs: Iterable[Output]) -> bool:
        """Note outputs of the incoming model as they are sent; whether the first token was one."""
        if self._first_token_ms is None and any(output.tokens for output in outputs):
            self._first_token_ms = (self._clock() - self._order.arrived) * 1000
            return True
        return False

    def end(self, failure: Exception | None) -> ExchangeResult:
        """The exchange is over; `failure` is why it was rolled back."""
        self._failure, self._ended = failure, self._clock()
        return self.result()

    def result(self) -> ExchangeResult:
        """How it ended, with the first token even if that came afterwards."""
        failure = self._failure
        request = self._order.request
        return ExchangeResult(
            operation=request.operation,
            incoming=request.incoming.model if request.incoming is not None else "",
            outgoing=",".join(request.outgoing),
            error_reason=reason_of(failure) if failure is not None else "",
            error=message_of(failure) if failure is not None else "",
            rolled_back=failure is not None,
            canary=self.canary if failure is None else None,
            ledger=Ledger(
                **self._phases_ms,
                total_ms=(self._ended - self._order.arrived) * 1000,
                first_token_ms=self._first_token_ms,
                unpark_ms=self.unparked_s() * 1000,
                copied_bytes=self.copied_bytes,
                staged_bytes=self.staged_bytes,
                evicted_bytes=self.evicted_bytes,
                link_bytes_per_s=self._link_bytes_per_s,
                link_missed=self._link_missed,
                pageable_bytes=self.pageable_bytes,
                requests_finished=self.counts.finished,
                requests_kept=self.counts.kept,
                requests_preserved=self.preserved,
                parked_bytes=self._parked_bytes,
                residue_bytes=self.residue_bytes,
                requests_lost=self.counts.lost,
            ),
        )
