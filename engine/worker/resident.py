"""One model on this worker: its engine, the addresses it has for good, the pages it has now.

Owns the engine and its regions, and keeps what the engine computes behind a copy until the copy was
verified. It never decides when anything happens. Invariants: the engine's addresses stay as long as
the resident does, whether pages are mapped there or not; an engine has weights only while they are
there or landing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from engine.canary import Continuation, runtime_of
from engine.choose_stepper import choose_stepper
from engine.engine import Engine
from engine.kv_layout import KvLayout
from engine.link.control import CANARY_TOKENS, EngineSpec, EngineState, EngineStatus
from engine.link.tokens import Output, Submit
from engine.models.spec import ModelSpec
from engine.parking import KvLane
from engine.stepper import MakeStepper
from engine.vacating import Vacating
from engine.worker.images import Image
from engine.worker.kv import FlooredKvSpace
from engine.worker.mapper import Mapper
from engine.worker.measures import kv_pages_min, limits_of
from engine.worker.report import state_of
from engine.worker.status import advance
from engine.worker.weights import ResidentWeights
from swap.arena import PagePool, Region
from swap.shared_link import Turn
from swap.transfer import Reached, Transfer


class Resident:
    """A model that has, or had, or is about to have its weights on the device.

    `make_lane(layout, address)` makes the way to where KV can be parked, `reclaim(pages)` frees
    pages when its KV wants to grow.
    Raises what the engine refuses the image or the limits with; holds nothing then.
    """

    def __init__(
        self,
        spec: EngineSpec,
        image: Image,
        pool: PagePool,
        step_tokens: int,
        make_lane: Callable[[KvLayout, int], KvLane],
        reclaim: Callable[[int], None] | None = None,
        mapper: Mapper | None = None,
        make_stepper: MakeStepper = choose_stepper,
        *,
        prefix_cache: bool = True,
        strict: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.image = image
        self.status = EngineStatus.STANDBY
        self.claimed = False
        """A drain works on it, so that an exchange must not."""
        self.expected = False
        """An exchange is bringing it in: requests are taken, and wait."""
        self.spare = False
        """Its pages hold weights, or are filled with them, only until somebody needs the pages."""
        self.used_at = 0.0
        """When it was last ACTIVE or staged; of spare models the oldest goes first."""
        self.served = False
        """Whether it was ever ACTIVE."""
        self.reason = ""
        """Why it is FAILED."""
        self.held: list[Output] = []
        """Outputs computed behind a copy that is not verified yet."""
        self._pool = pool
        manifest = image.manifest
        limits = limits_of(spec, step_tokens, prefix_cache=prefix_cache, strict=strict)
        shape = ModelSpec.from_dict(manifest.model)
        self.kv_pages_min = kv_pages_min(spec, manifest, pool.page_bytes, step_tokens)
        self.weights = ResidentWeights(spec.model, image, pool)
        kv_bytes_max = pool.total_pages * pool.page_bytes
        self._kv = Region(pool, f"{spec.model} KV", kv_bytes_max, from_end=True)
        try:
            self._space = FlooredKvSpace(self._kv, reclaim, mapper)
            self.engine = Engine(
                shape,
                None,
                self._space,
                limits,
                dtype=manifest.dtype,
                make_stepper=make_stepper,
                make_lane=lambda layout: make_lane(layout, self._kv.address),
                clock=clock,
            )
        except BaseException:
            self.weights.release()
            self._kv.release()
            raise
        self._backed = False
        """Whether it has every page it needs to serve."""

    @property
    def model(self) -> str:
        return self.spec.model

    @property
    def pages(self) -> int:
        """Pages it has now."""
        return self.weights.pages + self._kv.mapped_pages

    @property
    def pages_missing(self) -> int:
        """Pages it would have to take now in order to serve."""
        return self.weights.pages_missing + max(0, self.kv_pages_min - self._kv.mapped_pages)

    @property
    def pages_unused(self) -> int:
        """KV pages that no request needs and nobody was promised: as good as free."""
        if self.status is EngineStatus.FAILED:
            return 0
        return self._space.unused(self.engine.pages_held)

    def map_ahead(self) -> None:
        """Have KV pages mapped in the background, if it serves and no exchange runs."""
        self._space.map_ahead()

    def release_unused(self) -> None:
        """Give up KV pages with nothing in them."""
        if self.status is not EngineStatus.FAILED and not self._space.growing:
            self.engine.trim()
            self._space.release_unused()

    def release_cached(self, pages: int) -> None:
        """Give up at most `pages` KV pages in which only prefixes are cached."""
        if self.status is not EngineStatus.FAILED and not self._space.growing:
            self.engine.trim_cached(pages)
            self._space.release_unused()

    @property
    def pages_kept(self) -> int:
        """KV pages that it keeps for paused requests only, and gives up when they are needed."""
        if self.status is EngineStatus.FAILED or not self.engine.paused:
            return 0
        return self._space.beyond_floor

    @property
    def needs_pages(self) -> bool:
        """Whether it has not all pages with which it could serve: STANDBY, FAILED, or spare."""
        return self.spare or self.status in (EngineStatus.STANDBY, EngineStatus.FAILED)

    def move(self, status: EngineStatus) -> None:
        """Change the status. Raises InvalidState for a change that does not exist."""
        self.status = advance(self.model, self.status, status)

    # Requests.

    @property
    def admits(self) -> bool:
        """Whether requests are taken."""
        return self.expected or (self.status is EngineStatus.ACTIVE)

    @property
    def full(self) -> bool:
        """Whether no further request may wait here; the gateway's queue is the place for it."""
        return self.engine.waiting >= self.engine.limits.waiting_requests_max

    def submit(self, request: Submit) -> None:
        number, salt = request.request, request.cache_salt
        self.engine.submit(number, request.prompt, request.sampling, request.priority, salt)

    def cancel(self, number: int) -> None:
        """Forget a request, and what is held back of it."""
        self.engine.cancel(number)
        self.held = [output for output in self.held if output.request != number]

    # Steps.

    @property
    def unverified(self) -> bool:
        """Whether outputs must be held back."""
        return self.weights.transfer is not None

    @property
    def landing(self) -> bool:
        """Whether a step may have to wait for weights."""
        return self.weights.landing

    @property
    def can_step(self) -> bool:
        """Whether a step would do something that may be done now."""
        able = self.status is not EngineStatus.FAILED and not self.engine.paused
        # A step waits for the weights, which holds up the step thread: not for the link's too.
        transfer = self.weights.transfer
        able = able and (transfer is None or not transfer.turn.waiting)
        return able and self._backed and not self.held and self.engine.has_work

    # Pages and weights.

    def map(self) -> int:
        """Take all pages it needs to serve; returns how many it has.

        Raises InsufficientDeviceMemory, and has then what it had before.
        """
        missing = self.weights.pages_missing
        self.weights.grow(missing)
        try:
            self._space.set_floor(self.kv_pages_min)
        except BaseException:
            self.weights.shrink(missing)
            raise
        self._backed, self.spare = True, False
        return self.pages

    def map_weights(self, pages: int) -> None:
        """Have so many pages more for its weights, as a spare model. Raises
        InsufficientDeviceMemory."""
        self.weights.grow(pages)
        self.spare = True

    def map_more(self) -> bool:
        """Take what is free of the pages it needs; whether it has all. It must not step before."""
        free = self._pool.free_pages
        weights = min(free, self.weights.pages_missing)
        self.weights.grow(weights)
        if self.pages_missing > free - weights:
            return False
        self._space.set_floor(self.kv_pages_min)
        self.spare = False
        return True

    def allow_steps(self) -> None:
        """It has its pages, and nobody works on them any more."""
        self._backed = True

    def stand_by_staged(self, now: float) -> None:
        """Pause the engine and promise its KV pages to nobody any more, what paused requests keep
        of them included; the weights stay, as a spare model's."""
        self.pause(keep_kv=True)
        self._backed = False
        self._space.set_floor(0)
        self.spare, self.used_at = True, now

    def settle(self) -> None:
        """End staging that is under way: what has landed stays (see `ResidentWeights.settle`)."""
        if self.spare:
            self.weights.settle()
            if self.weights.staged_bytes and self.status is EngineStatus.STANDBY:
                self.move(EngineStatus.STAGED)

    def give(self, pages: int) -> int:
        """Give up to so many pages of a spare model's weights back, from the last one on. Returns
        bytes of weights."""
        self.settle()
        if self.weights.pages <= pages or not self.weights.staged_bytes:
            return self.evict()
        return self.weights.shrink(pages)

    def vacate(self, pages: int) -> Vacating:
        """Begin to give up KV pages of paused requests (see `Engine.vacate`): `pages` at least."""
        kept = self._space.mapped - pages
        return self.engine.vacate(max(0, self._space.pages - kept))

    def evict(self, *, keep_kv: bool = True) -> int:
        """Pause the engine and give its pages back, but for those of paused requests where these
        are kept; no byte is copied. Returns bytes of weights.

        Staging that is under way is given up first, which takes one copy call at most; nothing else
        may be copying into its pages. One that FAILED has none.
        """
        if self.status is EngineStatus.FAILED:
            return 0
        self.settle()
        self.pause(keep_kv=keep_kv)
        self._backed = self.spare = False
        had_bytes = self.weights.shrink(self.weights.pages)
        self._space.set_floor(0)
        if self.status is EngineStatus.STAGED:
            self.move(EngineStatus.STANDBY)
        return had_bytes

    def give_up(self, reason: str) -> None:
        """Become FAILED and give every page back, whatever state the engine is in."""
        self.move(EngineStatus.FAILED)
        self.reason, self.expected, self.spare, self.held = reason, False, False, []
        self.weights.transfer = None
        self.engine.abandon()
        self.engine.forget_parked()
        self.weights.shrink(self.weights.pages)
        self._space.serve(False)
        self._kv.shrink(self._kv.mapped_pages)

    def load(
        self,
        turn: Turn,
        under_way: Callable[[], None],
        reached: Reached = lambda place, cancelled: None,
    ) -> Transfer:
        """Begin to copy its weights in, at their turn; `under_way` is called once that has come.

        It does not step, unless `step_behind` lets it. A spare model is only staged: its copy gives
        way to others.
        """
        return self.weights.load(
            turn,
            under_way,
            reached,
            staging=self.spare,
            growing=not self._backed and not self.spare,
        )

    def step_behind(self) -> None:
        """Let it step behind the copy of its weights, outputs held back."""
        assert self.weights.transfer is not None
        self.engine.resume(self.weights.tensors, self.weights.transfer.gate)

    def landed(self) -> None:
        """What was copied is there, and verified if it is all of the weights."""
        self.weights.landed()
        if self.spare:
            self.weights.transfer = None
        if self.status is not EngineStatus.STAGED:
            self.move(EngineStatus.STAGED)

    def pause(self, *, keep_kv: bool) -> None:
        """Stop stepping; what runs waits with the tokens it has, and with their KV if kept."""
        self._space.serve(False)
        self.engine.pause(keep_kv=keep_kv)
        self.weights.transfer = None

    def serve(self) -> list[Output]:
        """Become ACTIVE on verified weights; returns what was held back, to be sent now."""
        if self.status is not EngineStatus.ACTIVE:
            self.move(EngineStatus.ACTIVE)
        self.served, self.expected, self.weights.transfer = True, False, None
        if self.engine.paused:
            self.engine.resume(self.weights.tensors)
        self.engine.open_gate()
        self._space.serve(True)
        held, self.held = self.held, []
        return held

    def on_unparking(self, call: Callable[[], None]) -> None:
        """Have `call` called before KV is copied back (see `KvLane.unparking`)."""
        assert self.engine.lane is not None
        self.engine.lane.unparking = call

    def canary(self, prompt: Sequence[int]) -> Iterator[int | None]:
        """The canary's tokens, one at a time; its weights must be there."""
        engine, tensors = self.engine, self.weights.tensors
        return iter(Continuation(engine.spec, tensors, engine.layout.dtype, prompt, CANARY_TOKENS))

    @property
    def runtime(self) -> str:
        """What computes here, as far as it may change a canary's tokens."""
        device = self.weights.tensors["embedding"].device
        return runtime_of(device, self.image.manifest.dtype)

    @property
    def preserved(self) -> int:
        """Paused requests whose KV is kept, on the device or in host memory."""
        state = self.state()
        return state.paused + state.parked

    def close(self) -> None:
        """Give everything back, addresses too. The engine must not be used afterwards."""
        self.engine.abandon()
        self.engine.forget_parked()
        self.weights.tensors = {}
        self.weights.release()
        self._kv.release()

    def state(self) -> EngineState:
        """What is reported of it."""
        kv_pages = self._space.needed(self.engine.pages_held)
        return state_of(self, kv_pages * self._space.page_bytes)
