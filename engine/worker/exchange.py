"""The exchange: one transaction that takes models off the device and puts another one on it.

Owns the order of its stages, their undoing, and the ledger. It decides nothing about memory (a pure
plan does) and never blocks: it is a job of the step loop, resumed when something has happened,
while the engines go on stepping, the incoming one too. Invariant: whatever fails before the commit,
the outgoing models serve again; the pages that takes are out of everybody's reach until then.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator

from engine.link.control import EngineStatus, ExchangeResult, Stage
from engine.worker.canaries import check_canary, explained, try_canary
from engine.worker.copying import Copy, Waits
from engine.worker.desk import Desk
from engine.worker.drain import drain
from engine.worker.errors import CanaryFailed, message_of
from engine.worker.evacuation import Evacuation
from engine.worker.failpoints import FailPoint, FailPoints
from engine.worker.ledger import Journal
from engine.worker.order import Order
from engine.worker.residency import Residency
from engine.worker.resident import Resident
from engine.worker.verify import verify_weights
from swap.errors import CorruptWeights, SwapError

ROLLBACK_TRIES_MAX = 2
"""Bringing a model back is tried once more: by then what failed may have passed."""

log = logging.getLogger(__name__)


class Exchange:
    """One exchange, on the step thread."""

    def __init__(
        self,
        order: Order,
        residency: Residency,
        desk: Desk,
        failpoints: FailPoints,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.order = order
        self.incoming: Resident | None = None
        self.journal = Journal(order, residency.link_bytes_per_s, clock)
        self._request = order.request
        self._residency = residency
        self._desk = desk
        self._failpoints = failpoints
        self._wake = wake
        self._clock = clock
        self._outgoing: list[tuple[Resident, EngineStatus]] = []
        self._spare: set[str] = set()
        """Outgoing models that had weights only for as long as nobody needed their pages."""
        self._copy: Copy | None = None
        self._mapped = False
        self._verified = False
        self._evacuation: Evacuation | None = None
        self._owing: list[Resident] = []
        """Outgoing models whose pages a rollback would have to find again."""
        self._steps_before = 0
        self.damaged = False
        """Set when a step of the incoming engine failed by itself."""

    def run(self) -> Generator[float | None, None, ExchangeResult]:
        """Carry the exchange out, or leave everything as it was; the job's value is the result.

        Raises what the plan refuses it with, before anything has changed.
        """
        self._residency.room.map_ahead(False)
        try:
            return (yield from self._run())
        finally:
            self._residency.room.map_ahead(True)

    def _run(self) -> Generator[float | None, None, ExchangeResult]:
        self._plan()
        failure: Exception | None = None
        try:
            yield from self._forward()
        except Exception as error:
            failure = error
            log.warning(
                "exchange %s is rolled back from %s: %s",
                self._request.operation,
                self.order.stage,
                message_of(error),
                exc_info=error,
            )
            yield from self._roll_back(error)
            if isinstance(error, CanaryFailed) and self.incoming is not None:
                failure = yield from explained(error, self.incoming.image, self.order, self._wake)
        finally:
            for resident in self._involved():
                resident.claimed = False
            if self.incoming is not None:
                self.incoming.on_unparking(lambda: None)
        return self.journal.end(failure)

    # Forward.

    def _plan(self) -> None:
        """Refuse what cannot be done, and make the incoming engine. Nothing that serves changes."""
        outgoing = self._residency.check(self._request)
        self._failpoints.reach(FailPoint.PLANNED, self.order.hang)
        if self._request.incoming is not None:
            if self._request.canary is not None:
                spec = self._request.incoming
                manifest = self._residency.manifest(spec)
                check_canary(self._request.canary, spec.model, manifest)
            self.incoming = incoming = self._residency.expect(self._request.incoming)
            incoming.on_unparking(
                lambda: self._failpoints.reach(FailPoint.UNPARKING, self.order.hang)
            )
            before = incoming.engine.statistics()
            self._steps_before = before.steps_total
            self.journal.unparked_s = lambda: (
                incoming.engine.statistics().unparked_s - before.unparked_s
            )
        self._outgoing = [(one, one.status) for one in outgoing]
        self._spare = {one.model for one in outgoing if one.spare}
        for resident in self._involved():
            resident.claimed = True

    def _involved(self) -> list[Resident]:
        incoming = [self.incoming] if self.incoming is not None else []
        vacated = self._evacuation.residents if self._evacuation is not None else []
        return [*incoming, *(one for one, _ in self._outgoing), *vacated]

    def _forward(self) -> Waits:
        self.order.enter(Stage.DRAINING)
        with self.journal.phase("drain_ms"):
            yield from self._drain()
            self._reach(FailPoint.DRAINED)
        self.order.enter(Stage.EVICTING)
        with self.journal.phase("evict_ms"):
            self._evict()
            self._reach(FailPoint.EVICTED)
        if self.incoming is not None:
            yield from self._bring_in(self.incoming)
            yield from self._try_canary(self.incoming)
        self._reach(FailPoint.COMMITTING)
        self.order.seal()
        self._commit()

    def _drain(self) -> Waits:
        residents = [one for one, _ in self._outgoing]
        request = self._request
        for deadline in drain(
            residents,
            request.in_flight,
            request.drain_timeout_s,
            self._desk,
            self._clock,
            self.journal.counts,
        ):
            self.order.requests_left = sum(len(self._desk.of_model(one.model)) for one in residents)
            yield deadline
            self.order.check()
        self.order.requests_left = 0

    def _evict(self) -> None:
        """Pass the pages on in one turn of the loop, so that no engine's KV takes them between."""
        residency, outgoing = self._residency, [one for one, _ in self._outgoing]
        self._owing = [
            one
            for one in outgoing
            if one.status is EngineStatus.STAGED and one.model not in self._spare
        ]
        for one in outgoing:
            if one.status is EngineStatus.STAGED:
                one.stand_by_staged(self._clock())
        residency.plan(self._request, outgoing)  # which a neighbour's KV may have upset meanwhile
        if not self._request.keep_staged:
            for one in outgoing:
                keep_kv = not self._request.discard
                self.journal.evicted_bytes += one.evict(keep_kv=keep_kv)
        incoming = self.incoming
        if incoming is None or not incoming.needs_pages:
            self._hold_back(0)
            return
        self._mapped, incoming.spare = True, False
        lacking = incoming.pages_missing - residency.pool.free_pages
        # Everybody's weights go before KV does.
        self.journal.evicted_bytes += residency.room.drop_spares(lacking, then=outgoing)
        missing = incoming.pages_missing - residency.pool.free_pages
        if missing > 0:
            begun = residency.room.vacate(missing, incoming, outgoing)
            self._evacuation = Evacuation(
                begun,
                self._wake,
                lambda: self._failpoints.reach(FailPoint.PARKING, self.order.hang),
            )
            for resident in self._evacuation.residents:
                resident.claimed = True
        self._hand_over(incoming)

    def _hand_over(self, incoming: Resident) -> bool:
        """Give the incoming model the pages that are free by now; whether nothing is to come."""
        evacuation = self._evacuation
        ended = evacuation is None or evacuation.release()
        self._residency.room.hold_back(0)
        complete = incoming.map_more()
        if complete and (evacuation is None or ended or incoming not in evacuation.residents):
            incoming.allow_steps()
        self._hold_back(incoming.pages)
        return ended

    def _hold_back(self, taken: int) -> None:
        """Keep the pages that a rollback would need besides those it takes from the incoming
        model, whose KV gives way too."""
        room = self._residency.room
        room.hold_back(0)
        owed = sum(one.pages_missing for one in self._owing)
        room.hold_back(min(owed - taken, room.pool.free_pages))

    def _bring_in(self, incoming: Resident) -> Waits:
        """Have the incoming model STAGED, with every page it needs."""
        self.journal.staged_bytes = incoming.weights.staged_bytes
        copied = not incoming.weights.whole
        if copied:
            self.order.enter(Stage.COPYING)
            link = self._residency.link
            self._copy = Copy(incoming, self.order, self._wake, link, self._moving)
            incoming.step_behind()
            self._reach(FailPoint.COPYING)
        if self._evacuation is not None:
            while not self._hand_over(incoming):
                yield None
            self._note_parked(self._evacuation)
            assert not incoming.pages_missing, "the plan found pages that are not there"
        if not copied:
            return
        assert self._copy is not None
        yield from self._copy.wait()
        self.journal.waited(self._copy.turn)
        self.journal.pageable_bytes = incoming.image.pageable_bytes
        self.journal.copied(self._copy.bytes_total, self._copy.seconds)
        self._reach(FailPoint.COPIED)
        self.order.enter(Stage.VERIFYING)
        with self.journal.phase("verify_ms"):
            self._verify(incoming)
            self._verified = True
        incoming.landed()

    def _moving(self, place: str, cancelled: threading.Event) -> None:
        """The transfer's threads have come to `place`."""
        if place == "unpacking":
            self._failpoints.reach(FailPoint.UNPACKING, cancelled.wait)

    def _try_canary(self, incoming: Resident) -> Waits:
        """Have the model prove itself by its own tokens, if it has a canary."""
        canary = self._request.canary
        if canary is None:
            return
        if self.order.stage is not Stage.VERIFYING:  # nothing was copied
            self.order.enter(Stage.VERIFYING)
        with self.journal.phase("canary_ms"):
            self._reach(FailPoint.CANARY)
            self.journal.canary = yield from try_canary(
                canary, incoming, self._clock, self.order.check
            )

    def _note_parked(self, evacuation: Evacuation) -> None:
        self.journal.parked(evacuation.parked_bytes, evacuation.seconds)

    def _commit(self) -> None:
        if self.incoming is not None:
            held = self.incoming.serve()
            self.journal.sent(held)
            self._desk.deliver(held)
        self._residency.room.hold_back(0)
        if self._request.discard:
            for resident, _ in self._outgoing:
                self.journal.counts.kept = 0
                self.journal.counts.lost += self._residency.discard(resident)
        else:
            self.journal.preserved = sum(one.preserved for one, _ in self._outgoing)
        pages = sum(one.pages for one, _ in self._outgoing)
        self.journal.residue_bytes = pages * self._residency.pool.page_bytes
        self.order.enter(Stage.COMMITTED)

    # Back.

    def _roll_back(self, error: Exception) -> Waits:
        self.order.reopen()
        self.order.enter(Stage.ROLLING_BACK)
        if self._copy is not None:
            yield from self._copy.stop()
        if self._evacuation is not None:
            yield from self._evacuation.wait()
            self._note_parked(self._evacuation)
        if self.incoming is not None:
            stepped = self.incoming.engine.statistics().steps_total != self._steps_before
            wrong = isinstance(error, CorruptWeights) or (stepped and self._doubtful(error))
            self._residency.turn_away(
                self.incoming,
                error,
                evict=self._mapped,
                keep_kv=not stepped,
                damaged=self.damaged or wrong,
            )
        self._residency.room.hold_back(0)
        leaving = [
            (resident, before)
            for resident, before in self._outgoing
            if before is not EngineStatus.STANDBY and resident.model not in self._spare
        ]
        for resident, _ in leaving:
            if resident.needs_pages:
                self._residency.room.make_room(resident)
                resident.map()
        for resident, before in leaving:
            yield from self._restore(resident, before)

    def _doubtful(self, error: Exception) -> bool:
        """Whether what the incoming model computed behind its copy must not be kept: its weights
        are all there, or it would not have stepped, but perhaps nobody has verified them."""
        assert self.incoming is not None
        if self._copy is not None and not self._verified:
            try:
                self._verify(self.incoming)
            except SwapError as found:
                log.error("what %s computed is dropped: %s", self.incoming.model, found)
                return True
        return isinstance(error, CanaryFailed)

    def _restore(self, resident: Resident, before: EngineStatus) -> Waits:
        """Have an outgoing model serve again; it becomes FAILED when that fails as well.

        It does not step before its weights are verified: what it computed behind a copy that went
        wrong would be part of its requests by the time of the second one.
        """
        for attempt in range(1, ROLLBACK_TRIES_MAX + 1):
            try:
                self._reach(FailPoint.ROLLING_BACK)
                if not resident.weights.whole:
                    link = self._residency.link
                    yield from Copy(resident, self.order, self._wake, link).wait()
                    self._verify(resident)
                    resident.landed()
                if before is EngineStatus.ACTIVE and resident.status is not EngineStatus.FAILED:
                    self._desk.deliver(resident.serve())
            except Exception as error:
                log.exception("bringing %s back failed (attempt %d)", resident.model, attempt)
                self.order.reopen()
                if attempt == ROLLBACK_TRIES_MAX:
                    self._residency.fail(resident, error)
            else:
                return

    def _verify(self, resident: Resident) -> None:
        device, salt = self._residency.pool.device, self._request.operation
        verify_weights(device, resident.image, resident.weights.address, salt)

    def _reach(self, point: FailPoint) -> None:
        self._failpoints.reach(point, self.order.hang)
        self.order.check()
