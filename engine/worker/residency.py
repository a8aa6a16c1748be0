"""Which images and models are on this worker, and who has its pages.

Owns the table of attached images and the table of residents, and the few changes that concern
more than one of them. It never orders those changes; the exchange does. Invariants: a resident's
image is attached; a model that FAILED has nothing on the device; pages held back belong to nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.link.control import EngineSpec, EngineStatus, Exchange
from engine.link.tokens import Finish, Submit
from engine.parking import Vacating
from engine.worker.desk import Desk
from engine.worker.errors import (
    ImageInUse,
    ImageUnknown,
    InvalidState,
    ModelUnknown,
    OperationInProgress,
    message_of,
)
from engine.worker.images import Image
from engine.worker.resident import Resident, kv_pages_min
from swap.arena import PagePool
from swap.parking import ParkingArea
from swap.plan import IncomingModel, Partition, ResidentModel, plan_swap

log = logging.getLogger(__name__)

HELD_BACK = "held back for a rollback"


class Residency:
    """Images and residents of one worker. On the step thread only."""

    def __init__(
        self, pool: PagePool, desk: Desk, step_tokens: int, parking_bytes: int = 0
    ) -> None:
        self.pool = pool
        self.area = ParkingArea(parking_bytes)
        self.images: dict[str, Image] = {}
        self.residents: dict[str, Resident] = {}
        self.closing = False
        """The worker ends: no request is taken any more."""
        self.link_bytes_per_s = 0.0
        self._desk = desk
        self._step_tokens = step_tokens
        self._held_back: tuple[int, ...] = ()

    # Requests.

    def submit(self, request: Submit) -> None:
        """Give a request to its engine, or answer it."""
        resident = self.residents.get(request.model)
        if resident is None or not resident.admits or resident.full or self.closing:
            self._desk.end(request.request, Finish.REQUEUE)
        else:
            try:
                resident.submit(request)
            except Exception as error:  # one request must not end the loop that runs all others
                log.exception("request %d was not taken by %s", request.request, request.model)
                self._desk.end(request.request, Finish.ERROR, message_of(error))

    def cancel(self, number: int) -> None:
        """Forget a request and free its KV."""
        resident = self.residents.get(self._desk.model_of(number) or "")
        if resident is not None:
            resident.cancel(number)
        self._desk.leave(number)

    def forget_requests(self) -> None:
        """The token link is gone: forget every request that came over it."""
        for model, numbers in self._desk.closed().items():
            for number in numbers:
                self.residents[model].cancel(number)

    def answer(self, resident: Resident, finish: Finish, error: str, *, parked: bool = True) -> int:
        """End a model's requests (without `parked` those with no token sent); returns how many
        were lost."""
        lost = 0
        for number in self._desk.of_model(resident.model):
            if parked or not self._desk.told(number):
                resident.cancel(number)
                lost += self._desk.end(number, finish, error)
        return lost

    def answer_all(self, error: str) -> None:
        """End every request, because the worker ends."""
        for resident in self.residents.values():
            self.answer(resident, Finish.REQUEUE, error)
        self._desk.flush()

    # Images.

    def attach(self, image: Image) -> bool:
        """Keep an image; False when there is one of that digest already, so that it is not kept."""
        return self.images.setdefault(image.digest, image) is image

    def detach(self, digest: str) -> Image | None:
        """Forget an image and the engines made from it; the caller closes it. None: unknown.

        Raises ImageInUse while one of them is on the device, or expected there.
        """
        users = [one for one in self.residents.values() if one.image.digest == digest]
        for resident in users:
            on_device = resident.status not in (EngineStatus.STANDBY, EngineStatus.FAILED)
            if on_device or resident.expected or resident.claimed:
                raise ImageInUse(
                    f"image {digest[:12]} is in use by {resident.model}, which is "
                    f"{resident.status}: take it off the device first",
                    model=resident.model,
                )
        for resident in users:
            self.discard(resident)
        return self.images.pop(digest, None)

    # Exchanges.

    def check(self, request: Exchange) -> list[Resident]:
        """Whether an exchange can be done; returns the outgoing residents.

        Raises ImageUnknown, ModelUnknown, InvalidState, OperationInProgress, or
        InsufficientDeviceMemory with the figures.
        """
        if self.closing:
            raise OperationInProgress("the worker is ending")
        outgoing = [self._outgoing(model, request.discard) for model in request.outgoing]
        incoming: IncomingModel | None = None
        if request.incoming is not None:
            present = self.residents.get(request.incoming.model)
            if present is not None:
                self._unclaimed(present.model)
            if present is not None and present.status is EngineStatus.ACTIVE:
                raise InvalidState(f"{present.model} is ACTIVE here already", model=present.model)
            if request.incoming.model in request.outgoing:
                raise InvalidState(f"{request.incoming.model} cannot replace itself")
            image = self._image(request.incoming)
            # What is STAGED has its pages already.
            if present is None or present.status in (EngineStatus.STANDBY, EngineStatus.FAILED):
                pages = kv_pages_min(request.incoming, image.manifest, self.pool.page_bytes)
                incoming = IncomingModel(
                    model=request.incoming.model,
                    weights_bytes=image.manifest.weights_bytes,
                    kv_bytes_min=pages * self.pool.page_bytes,
                )
        plan_swap(
            Partition(
                page_bytes=self.pool.page_bytes,
                pages_total=self.pool.total_pages,
                pages_free=self.pool.free_pages + self._spare_pages(outgoing),
                link_bytes_per_s=max(self.link_bytes_per_s, 1.0),
            ),
            tuple(
                ResidentModel(one.model, one.weights_bytes, one.pages)
                for one in self.residents.values()
                if one in outgoing or one.pages > one.pages_spare
            ),
            outgoing=tuple(one.model for one in outgoing),
            incoming=incoming,
        )
        return outgoing

    def expect(self, spec: EngineSpec) -> Resident:
        """The resident that will come in, made if there is none like that; it takes requests."""
        resident = self.residents.get(spec.model)
        if resident is not None and (
            resident.spec != spec or resident.status is EngineStatus.FAILED
        ):
            self.discard(resident)
            resident = None
        if resident is None:
            resident = Resident(
                spec, self._image(spec), self.pool, self._step_tokens, self.area, self.reclaim
            )
            self.residents[spec.model] = resident
        resident.expected = True
        return resident

    # Pages of paused engines.

    def vacate(
        self, pages: int, incoming: Resident, outgoing: Sequence[Resident]
    ) -> list[tuple[Resident, Vacating]]:
        """Begin to free `pages` KV pages of paused engines for `incoming`: of those whose turn is
        over, then of those that leave, and its own beyond what it needs itself."""
        others = [one for one in self._paused() if one is not incoming and one not in outgoing]
        begun = []
        for resident in (*others, *outgoing, incoming):
            spare = resident.pages_spare
            if resident is incoming:
                spare -= resident.kv_pages_min
            if pages > 0 and spare > 0:
                begun.append((resident, resident.vacate(min(pages, spare))))
                pages -= spare
        return begun

    def reclaim(self, pages: int) -> None:
        """Free up to `pages` KV pages of paused engines at once, for one that serves.

        What a call works on is left alone: its pages are part of that call's account.
        """
        for resident in self._paused():
            count = min(pages, resident.pages_spare)
            if count > 0 and not resident.claimed:
                vacating = resident.vacate(count)
                vacating.copy(lambda: None)
                vacating.release()
                pages -= count

    def make_room(self, resident: Resident) -> None:
        """Free what paused engines keep of the pages that a model on its way back needs."""
        missing = resident.pages_missing - self.pool.free_pages
        for other in self._paused():
            count = min(missing, other.pages_spare)
            if count > 0 and other is not resident:
                vacating = other.vacate(count)
                vacating.copy(lambda: None)
                vacating.release()
                missing = resident.pages_missing - self.pool.free_pages

    def _paused(self) -> list[Resident]:
        return [one for one in self.residents.values() if one.pages_spare]

    def _spare_pages(self, outgoing: Sequence[Resident]) -> int:
        """Pages that are as good as free, besides those of models that leave."""
        return sum(one.pages_spare for one in self._paused() if one not in outgoing)

    def hold_back(self, pages: int) -> None:
        """Keep pages out of everybody's reach: as many as given, 0 for none."""
        self.pool.give_back(HELD_BACK, self._held_back)
        self._held_back = ()
        self._held_back = self.pool.take(HELD_BACK, max(pages, 0))

    def turn_away(
        self, resident: Resident, error: Exception, *, evict: bool, keep_kv: bool, damaged: bool
    ) -> None:
        """Undo `expect`: what had no token sent is handed back, what had is kept for later.

        With `evict` its pages are given back, but for KV that is to be kept: what was computed
        behind a copy that nobody verified is not. With `damaged` nothing of it is kept: its tokens
        may have been drawn from wrong weights. Nothing may be copying into its pages.
        """
        resident.expected = False
        self.answer(resident, Finish.REQUEUE, message_of(error), parked=damaged)
        if evict:
            resident.evict(keep_kv=keep_kv)
        if damaged or not resident.served:
            self.discard(resident)

    def discard(self, resident: Resident) -> int:
        """Drop an engine, its addresses and its requests; returns how many of those were lost."""
        lost = self.answer(resident, Finish.REQUEUE, f"{resident.model} was unloaded")
        del self.residents[resident.model]
        resident.close()
        return lost

    def fail(self, resident: Resident, error: Exception) -> None:
        """Give an engine up: its requests end with the error, and its pages are given back."""
        if resident.status is not EngineStatus.FAILED:
            reason = message_of(error)
            resident.give_up(reason)
            for number in self._desk.of_model(resident.model):
                self._desk.end(number, Finish.ERROR, f"{resident.model} failed: {reason}")

    def to_drain(self, model: str) -> Resident:
        """The resident a drain is to work on. Raises ModelUnknown or InvalidState."""
        resident = self._unclaimed(model)
        if resident.status not in (EngineStatus.ACTIVE, EngineStatus.STAGED):
            raise InvalidState(f"{model} is {resident.status} and has nothing to drain")
        return resident

    def resume(self, model: str) -> None:
        """Let a drained model serve again. Raises ModelUnknown or InvalidState."""
        resident = self._unclaimed(model)
        if resident.status not in (EngineStatus.ACTIVE, EngineStatus.STAGED):
            raise InvalidState(
                f"{model} is {resident.status}; only a STAGED model can be resumed: load it"
            )
        self._desk.deliver(resident.serve())

    def _outgoing(self, model: str, discard: bool) -> Resident:
        resident = self._unclaimed(model)
        if resident.status is EngineStatus.STANDBY and not discard:
            raise InvalidState(f"{model} is STANDBY: there is nothing to take off the device")
        return resident

    def _unclaimed(self, model: str) -> Resident:
        resident = self.residents.get(model)
        if resident is None:
            raise ModelUnknown(f"{model} is not on this worker", model=model)
        if resident.claimed:
            raise OperationInProgress(
                f"another call works on {model}; wait for its end", model=model
            )
        return resident

    def _image(self, spec: EngineSpec) -> Image:
        image = self.images.get(spec.digest)
        if image is None:
            raise ImageUnknown(
                f"image {spec.digest[:12]} of {spec.model} was not attached: attach it first",
                digest=spec.digest,
            )
        return image
