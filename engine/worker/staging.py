"""Staging: a model's weights on the device before anybody asks for it, in pages that nobody needs.

Owns the order of its steps and their undoing. Unlike an exchange it touches no model that serves,
and gives way to everything: it copies a few bytes at a time, stands still while an exchange runs,
and is over when its pages are needed. Invariant: only the weights are mapped, as a spare model's;
what is STAGED when it has ended is verified.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator

from engine.link.control import EngineStatus, ExchangeResult, Stage
from engine.worker.copying import Copy, Waits
from engine.worker.errors import Displaced, InvalidState, OperationInProgress, message_of
from engine.worker.failpoints import FailPoint, FailPoints
from engine.worker.ledger import Journal
from engine.worker.order import Order
from engine.worker.residency import Residency
from engine.worker.resident import Resident
from engine.worker.room import fits
from engine.worker.verify import verify_weights
from engine.worker.weights import room_bytes
from swap.image import Manifest

log = logging.getLogger(__name__)


class Staging:
    """One model on its way to STAGED, on the step thread. `order.request` has only an incoming."""

    def __init__(
        self,
        order: Order,
        residency: Residency,
        wake: Callable[[], None],
        *,
        displace: bool,
        bytes_max: int = 0,
        failpoints: FailPoints,
    ) -> None:
        assert order.request.incoming is not None
        self.order = order
        self.journal = Journal(order, residency.link_bytes_per_s, residency.clock)
        self._spec = order.request.incoming
        self._residency = residency
        self._wake = wake
        self._displace = displace
        self._bytes_max = bytes_max
        self._failpoints = failpoints
        self._copy: Copy | None = None
        self._paused = False

    def run(self) -> Generator[float | None, None, ExchangeResult]:
        """Stage the model, or leave nothing of it; the job's value is the result.

        Raises what it is refused with, before anything has changed.
        """
        resident = self._begin()
        failure: Exception | None = None
        if not self._enough(resident):
            try:
                yield from self._bring_in(resident)
            except Exception as error:
                failure = error
                log.info("staging %s was given up: %s", resident.model, message_of(error))
                if self._copy is not None:
                    yield from self._copy.stop()
                # Whoever needed its pages, or wants to serve it, has seen to what has landed.
                if self._copy is None or self._copy.is_of(resident):
                    resident.evict()
        if failure is None:
            resident.used_at = self._residency.clock()
            self.order.enter(Stage.COMMITTED)
        return self.journal.end(failure)

    def pause(self, paused: bool) -> None:
        """Stand still, or go on."""
        self._paused = paused
        if self._copy is not None:
            self._copy.pause(paused)

    def _begin(self) -> Resident:
        """The resident, with pages for its weights unless it is STAGED already."""
        residency, model = self._residency, self._spec.model
        if residency.closing:
            raise OperationInProgress("the worker is ending")
        present = residency.residents.get(model)
        if present is not None and present.claimed:
            raise OperationInProgress(
                f"another call works on {model}; wait for its end", model=model
            )
        if present is not None and fits(present, self._spec):
            if present.spare and self._enough(present):
                return present
            if present.status is not EngineStatus.STANDBY and not present.spare:
                raise InvalidState(f"{model} is {present.status} here already", model=model)
        elif present is not None and present.pages and not present.spare:
            raise InvalidState(f"{model} is on the device, with other limits", model=model)
        # Before one is made, for which one with other limits would have to go.
        self._plan(present)
        resident = residency.make(self._spec)
        resident.claimed = True  # its own pages are not spare for it
        try:
            self._take_pages(resident)
        except BaseException:
            if resident is not present:
                residency.discard(resident)
            raise
        finally:
            resident.claimed = False
        return resident

    def _plan(self, present: Resident | None) -> None:
        """Refuse what there is no room for; nothing has changed then."""
        pool, manifest = self._residency.pool, self._residency.manifest(self._spec)
        there_bytes = 0
        if present is not None and fits(present, self._spec):
            there_bytes = present.weights.staged_bytes
        pages = pool.pages_for(room_bytes(manifest, there_bytes, self._wanted_bytes(manifest)))
        if present is not None:
            pages -= present.weights.pages
        size_bytes = max(pages, 0) * pool.page_bytes
        self._residency.room.plan_staging(self._spec, size_bytes, displace=self._displace)

    def _take_pages(self, resident: Resident) -> None:
        """Give it the pages that it lacks, as planned."""
        weights, room = resident.weights, self._residency.room
        pages = weights.pages_for(self._wanted_bytes(weights.manifest)) - weights.pages
        self.journal.evicted_bytes = room.drop_spares(pages - room.pool.free_pages)
        self.journal.staged_bytes = weights.staged_bytes
        resident.map_weights(max(pages, 0))

    def _enough(self, resident: Resident) -> bool:
        weights = resident.weights
        wanted_bytes = self._wanted_bytes(weights.manifest)
        return weights.whole or weights.staged_bytes >= wanted_bytes

    def _wanted_bytes(self, manifest: Manifest) -> int:
        """Of its weights, what is to be there."""
        size_bytes = manifest.weights_bytes
        return min(self._bytes_max or size_bytes, size_bytes)

    def _bring_in(self, resident: Resident) -> Waits:
        self.order.enter(Stage.COPYING)
        link = self._residency.link
        self._copy = Copy(resident, self.order, self._wake, link, self._moving)
        self.pause(self._paused)
        yield from self._copy.wait(self._still_wanted(resident, self._copy))
        self.journal.waited(self._copy.turn)
        self.journal.copied(self._copy.bytes_total, self._copy.seconds)
        self.order.enter(Stage.VERIFYING)
        with self.journal.phase("verify_ms"):
            # Part of them is verified with the rest, in the swap.
            if resident.weights.transfer is not None and resident.weights.transfer.complete:
                verify_weights(
                    self._residency.pool.device,
                    resident.image,
                    resident.weights.address,
                    self.order.request.operation,
                )
        self.order.seal()
        resident.landed()

    def _moving(self, place: str, cancelled: threading.Event) -> None:
        """The transfer's threads have come to `place`."""
        if place == "copying":
            self._failpoints.reach(FailPoint.STAGING, cancelled.wait)

    def _still_wanted(self, resident: Resident, copy: Copy) -> Callable[[], None]:
        def check() -> None:
            if not copy.is_of(resident):
                raise Displaced(
                    f"{resident.model} was not staged, or in part: its pages were needed by a "
                    "model that serves, or is to serve; stage it again once there are pages to "
                    "spare",
                    model=resident.model,
                )

        return check
