"""Which images and models are on this worker.

Owns the table of attached images and the table of residents, and the few changes that concern
more than one of them; whose pages go to whom is `room`'s. It never orders those changes; the
exchange does. Invariants: a resident's image is attached; a model that FAILED has nothing on the
device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from engine.choose_stepper import choose_stepper
from engine.kv_layout import KvLayout
from engine.link.control import EngineSpec, EngineStatus, Exchange
from engine.link.tokens import Finish, Submit
from engine.parking import KvLane
from engine.stepper import MakeStepper
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
from engine.worker.resident import Resident
from engine.worker.room import Room, fits
from swap.arena import PagePool
from swap.image import Manifest
from swap.parking import ParkingArea
from swap.plan import SwapPlan
from swap.shared_link import Link, OwnLink

log = logging.getLogger(__name__)


class Residency:
    """Images and residents of one worker. On the step thread only.

    `giving_way` is called before KV of a request that gives way is parked (see `KvLane`).
    """

    def __init__(
        self,
        pool: PagePool,
        desk: Desk,
        step_tokens: int,
        parking_bytes: int = 0,
        link: Link | None = None,
        clock: Callable[[], float] = time.monotonic,
        make_stepper: MakeStepper = choose_stepper,
        *,
        prefix_cache: bool = True,
        strict: bool = False,
        giving_way: Callable[[], None] = lambda: None,
    ) -> None:
        self.pool = pool
        self.clock = clock
        self.area = ParkingArea(parking_bytes)
        self.images: dict[str, Image] = {}
        self.residents: dict[str, Resident] = {}
        self.room = Room(pool, self.residents, step_tokens)
        self.closing = False
        """The worker ends: no request is taken any more."""
        self.link: Link = link if link is not None else OwnLink()
        self.link_bytes_per_s = 0.0
        self._desk = desk
        self._step_tokens = step_tokens
        self._make_stepper = make_stepper
        self._prefix_cache = prefix_cache
        self._strict = strict
        self._giving_way = giving_way

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
        image = self.images.get(digest)
        if image is not None and image.being_read:
            raise ImageInUse(f"image {digest[:12]} is being checked: try again", digest=digest)
        users = [one for one in self.residents.values() if one.image.digest == digest]
        for resident in users:
            if resident.spare and not resident.claimed:
                resident.evict()
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

    def linked(self, link_bytes_per_s: float) -> None:
        """The partition's link was measured."""
        self.link_bytes_per_s = link_bytes_per_s

    # Exchanges.

    def check(self, request: Exchange) -> list[Resident]:
        """Whether an exchange can be done; returns the outgoing residents.

        Raises ImageUnknown, ModelUnknown, InvalidState, OperationInProgress, or
        InsufficientDeviceMemory with the figures.
        """
        if self.closing:
            raise OperationInProgress("the worker is ending")
        outgoing = [self._outgoing(model, request.discard) for model in request.outgoing]
        if request.incoming is not None:
            present = self.residents.get(request.incoming.model)
            if present is not None:
                self._unclaimed(present.model)
            if present is not None and present.status is EngineStatus.ACTIVE:
                raise InvalidState(f"{present.model} is ACTIVE here already", model=present.model)
            if request.incoming.model in request.outgoing:
                raise InvalidState(f"{request.incoming.model} cannot replace itself")
            if present is not None and present.spare:
                present.settle()
                if not fits(present, request.incoming):
                    present.evict()
        self.plan(request, outgoing)
        return outgoing

    def plan(self, request: Exchange, outgoing: Sequence[Resident]) -> SwapPlan:
        """Whose weights leave the device for an exchange (see `Room.plan`). Raises ImageUnknown."""
        spec = request.incoming
        manifest = self.manifest(spec) if spec is not None else None
        return self.room.plan(request, outgoing, manifest)

    def manifest(self, spec: EngineSpec) -> Manifest:
        """What the image of a spec holds. Raises ImageUnknown."""
        return self._image(spec).manifest

    def expect(self, spec: EngineSpec) -> Resident:
        """The resident that will come in, made if there is none like that; it takes requests."""
        resident = self.make(spec)
        resident.expected = True
        return resident

    def make(self, spec: EngineSpec) -> Resident:
        """The resident of a spec; one that is otherwise, or FAILED, is dropped first."""
        resident = self.residents.get(spec.model)
        if resident is not None and not fits(resident, spec):
            if resident.spare:
                resident.evict()
            self.discard(resident)
            resident = None
        if resident is None:
            resident = Resident(
                spec,
                self._image(spec),
                self.pool,
                self._step_tokens,
                self._lane,
                self.room.reclaim,
                self.room.mapper,
                self._make_stepper,
                prefix_cache=self._prefix_cache,
                strict=self._strict,
                clock=self.clock,
            )
            self.residents[spec.model] = resident
        resident.spec = spec
        return resident

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
        """Give an engine up: its requests end with the error, and its pages are given back.

        Those with no token sent can be sent again, once the model is loaded again; they are not
        handed back, since one of them may be what the engine failed by.
        """
        if resident.status is not EngineStatus.FAILED:
            reason = message_of(error)
            resident.give_up(reason)
            for number in self._desk.of_model(resident.model):
                finish = Finish.ERROR if self._desk.told(number) else Finish.ABORT
                self._desk.end(number, finish, f"{resident.model} failed: {reason}")

    def to_drain(self, model: str) -> Resident:
        """The resident a drain is to work on. Raises ModelUnknown or InvalidState."""
        resident = self._unclaimed(model)
        if resident.spare or resident.status not in (EngineStatus.ACTIVE, EngineStatus.STAGED):
            raise InvalidState(f"{model} is {resident.status} and has nothing to drain")
        return resident

    def resume(self, model: str) -> None:
        """Let a drained model serve again. Raises ModelUnknown or InvalidState."""
        resident = self._unclaimed(model)
        if resident.spare or resident.status not in (EngineStatus.ACTIVE, EngineStatus.STAGED):
            raise InvalidState(
                f"{model} is {resident.status}; only a drained model can be resumed: load it"
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

    def _lane(self, layout: KvLayout, address: int) -> KvLane:
        """The way between KV memory of this worker and its parking area."""
        lane = KvLane(
            self.pool.device,
            self.area,
            layout,
            address,
            link_bytes_per_s=lambda: self.link_bytes_per_s,
            clock=self.clock,
        )
        lane.giving_way = self._giving_way
        return lane

    def _image(self, spec: EngineSpec) -> Image:
        image = self.images.get(spec.digest)
        if image is None:
            raise ImageUnknown(
                f"image {spec.digest[:12]} of {spec.model} was not attached: attach it first",
                digest=spec.digest,
            )
        return image
