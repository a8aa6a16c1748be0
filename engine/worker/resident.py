"""One model on this worker: its engine, the addresses it has for good, the pages it has now.

Owns the engine and its regions, and keeps what the engine computes behind a copy until the copy was
verified. It never decides when anything happens. Invariants: the engine's addresses stay as long as
the resident does, whether pages are mapped there or not; an engine has weights only while they are
there or landing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.device_tensors import bytes_at
from engine.engine import Engine
from engine.kv_layout import KvLayout
from engine.limits import EngineLimits
from engine.link.control import EngineSpec, EngineState, EngineStatus
from engine.link.tokens import Output, Submit
from engine.models.spec import ModelSpec
from engine.parking import KvLane, Vacating
from engine.worker.errors import OptionInvalid
from engine.worker.images import Image
from engine.worker.kv import FlooredKvSpace
from engine.worker.status import advance
from swap.arena import PagePool, Region
from swap.image import Manifest
from swap.parking import ParkingArea
from swap.transfer import Transfer


class Resident:
    """A model that has, or had, or is about to have its weights on the device.

    `area` is where KV can be parked, `reclaim` what frees pages when its KV wants to grow. Raises
    what the engine refuses the image or the limits with; holds nothing then.
    """

    def __init__(
        self,
        spec: EngineSpec,
        image: Image,
        pool: PagePool,
        step_tokens: int,
        area: ParkingArea,
        reclaim: Callable[[int], None] | None = None,
    ) -> None:
        self.spec = spec
        self.image = image
        self.status = EngineStatus.STANDBY
        self.claimed = False
        """A drain works on it, so that an exchange must not."""
        self.expected = False
        """An exchange is bringing it in: requests are taken, and wait."""
        self.served = False
        """Whether it was ever ACTIVE."""
        self.reason = ""
        """Why it is FAILED."""
        self.held: list[Output] = []
        """Outputs computed behind a copy that is not verified yet."""
        self._pool = pool
        manifest = image.manifest
        limits = _limits(spec, step_tokens)
        shape = ModelSpec.from_dict(manifest.model)
        self.kv_pages_min = kv_pages_min(spec, manifest, pool.page_bytes)
        self._weights = Region(pool, f"{spec.model} weights", manifest.weights_bytes)
        self._kv = Region(pool, f"{spec.model} KV", pool.total_pages * pool.page_bytes)
        try:
            self._space = FlooredKvSpace(self._kv, reclaim)
            self._tensors = weight_views(manifest, self._weights)
            self.engine = Engine(shape, None, self._space, limits, dtype=manifest.dtype)
        except BaseException:
            self._weights.release()
            self._kv.release()
            raise
        self._lane = KvLane(pool.device, area, self.engine.layout, self._kv.address)
        self._transfer: Transfer | None = None
        self._backed = False
        """Whether it has every page it needs to serve."""

    @property
    def model(self) -> str:
        return self.spec.model

    @property
    def address(self) -> int:
        """Where its weights are, or will be."""
        return self._weights.address

    @property
    def weights_bytes(self) -> int:
        return self.image.manifest.weights_bytes

    @property
    def pages(self) -> int:
        """Pages it has now."""
        return self._weights.mapped_pages + self._kv.mapped_pages

    @property
    def pages_min(self) -> int:
        """Pages it needs to serve."""
        return self._weights.pages_max + self.kv_pages_min

    @property
    def pages_missing(self) -> int:
        """Pages it would have to take now in order to serve."""
        weights = self._weights.pages_max - self._weights.mapped_pages
        return weights + max(0, self.kv_pages_min - self._kv.mapped_pages)

    @property
    def pages_spare(self) -> int:
        """KV pages that it keeps for paused requests only, and gives up when they are needed."""
        if self.status is EngineStatus.FAILED or not self.engine.paused:
            return 0
        return self._space.beyond_floor

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
        self.engine.submit(request.request, request.prompt, request.sampling, request.priority)

    def cancel(self, number: int) -> None:
        """Forget a request, and what is held back of it."""
        self.engine.cancel(number)
        self.held = [output for output in self.held if output.request != number]

    # Steps.

    @property
    def unverified(self) -> bool:
        """Whether outputs must be held back."""
        return self._transfer is not None

    @property
    def landing(self) -> bool:
        """Whether a step may have to wait for weights."""
        return self._transfer is not None and not self._transfer.complete

    @property
    def can_step(self) -> bool:
        """Whether a step would do something that may be done now."""
        able = self.status is not EngineStatus.FAILED and not self.engine.paused
        return able and self._backed and not self.held and self.engine.has_work

    # Pages and weights.

    def map(self) -> int:
        """Take all pages it needs to serve; returns how many it has.

        Raises InsufficientDeviceMemory, and has none then.
        """
        try:
            self._weights.grow(self._weights.pages_max - self._weights.mapped_pages)
            self._space.set_floor(self.kv_pages_min)
        except BaseException:
            self._weights.shrink(self._weights.mapped_pages)
            raise
        self._backed = True
        return self.pages

    def map_more(self) -> bool:
        """Take what is free of the pages it needs; whether it has all. It must not step before."""
        free = self._pool.free_pages
        weights = min(free, self._weights.pages_max - self._weights.mapped_pages)
        self._weights.grow(weights)
        if self._transfer is not None:
            self._transfer.backed(self._weights.mapped_bytes)
        if self.pages_missing > free - weights:
            return False
        self._space.set_floor(self.kv_pages_min)
        return True

    def allow_steps(self) -> None:
        """It has its pages, and nobody works on them any more."""
        self._backed = True

    def vacate(self, pages: int) -> Vacating:
        """Begin to give up KV pages of paused requests (see `Engine.vacate`): `pages` at least."""
        kept = self._space.mapped - pages
        return self.engine.vacate(max(0, self._space.pages - kept), self._lane)

    def evict(self, *, keep_kv: bool = True) -> int:
        """Pause the engine and give its pages back, but for those of paused requests where these
        are kept; no byte is copied. Returns bytes of weights.

        Nothing may be copying into its pages. One that FAILED has none.
        """
        if self.status is EngineStatus.FAILED:
            return 0
        self.pause(keep_kv=keep_kv)
        self._backed = False
        had = self._weights.mapped_pages > 0
        self._weights.shrink(self._weights.mapped_pages)
        self._space.set_floor(0)
        if self.status is EngineStatus.STAGED:
            self.move(EngineStatus.STANDBY)
        return self.weights_bytes if had else 0

    def give_up(self, reason: str) -> None:
        """Become FAILED and give every page back, whatever state the engine is in."""
        self.move(EngineStatus.FAILED)
        self.reason, self.expected, self._transfer, self.held = reason, False, None, []
        self.engine.forget_parked()
        self._weights.shrink(self._weights.mapped_pages)
        self._kv.shrink(self._kv.mapped_pages)

    def load(self) -> Transfer:
        """Begin to copy its weights in, and let it step behind them, outputs held back."""
        transfer = Transfer(
            self._pool.device,
            self.image.manifest,
            self.image.source,
            self._weights,
            growing=not self._backed,
        )
        transfer.start()
        self._transfer = transfer
        self.engine.resume(self._tensors, transfer.gate)
        return transfer

    def pause(self, *, keep_kv: bool) -> None:
        """Stop stepping; what runs waits with the tokens it has, and with their KV if kept."""
        self.engine.pause(keep_kv=keep_kv)
        self._transfer = None

    def serve(self) -> list[Output]:
        """Become ACTIVE on verified weights; returns what was held back, to be sent now."""
        if self.status is not EngineStatus.ACTIVE:
            self.move(EngineStatus.ACTIVE)
        self.served, self.expected, self._transfer = True, False, None
        if self.engine.paused:
            self.engine.resume(self._tensors)
        held, self.held = self.held, []
        return held

    @property
    def preserved(self) -> int:
        """Paused requests whose KV is kept, on the device or in host memory."""
        state = self.state()
        return state.paused + state.parked

    def close(self) -> None:
        """Give everything back, addresses too. The engine must not be used afterwards."""
        self.engine.forget_parked()
        self._tensors = {}
        self._weights.release()
        self._kv.release()

    def state(self) -> EngineState:
        """What is reported of it."""
        figures = self.engine.statistics()
        failed = self.status is EngineStatus.FAILED
        # A paused engine runs nothing: what keeps its KV waits like the rest.
        paused = figures.running if self.engine.paused else 0
        return EngineState(
            model=self.model,
            digest=self.image.digest,
            status=self.status,
            weights_bytes=self.weights_bytes if self._weights.mapped_pages else 0,
            kv_used_bytes=0 if failed else figures.kv_used_bytes,
            kv_bytes=self._kv.mapped_bytes,
            running=0 if failed else figures.running - paused,
            waiting=0 if failed else figures.waiting + paused,
            paused=0 if failed else paused,
            parked=0 if failed else figures.parked,
            parked_bytes=0 if failed else figures.parked_bytes,
            prompt_tokens_total=figures.prompt_tokens_total,
            generation_tokens_total=figures.generation_tokens_total,
            computed_tokens_total=figures.computed_tokens_total,
            preemptions_total=figures.preemptions_total,
            reason=self.reason,
        )


def kv_pages_min(spec: EngineSpec, manifest: Manifest, page_bytes: int) -> int:
    """Pages of KV that one request of the longest length takes."""
    layout = KvLayout.choose(ModelSpec.from_dict(manifest.model), manifest.dtype, page_bytes)
    return layout.pages_for(spec.context_tokens)


def weight_views(manifest: Manifest, region: Region) -> dict[str, torch.Tensor]:
    """The image's tensors in a region, by name; nothing is touched until they are used."""
    whole = bytes_at(region.pool.device.kind, region.address, manifest.weights_bytes)
    views: dict[str, torch.Tensor] = {}
    for entry in manifest.tensors:
        flat = whole[entry.offset_bytes : entry.offset_bytes + entry.size_bytes]
        views[entry.name] = flat.view(getattr(torch, entry.dtype)).view(entry.shape)
    return views


def _limits(spec: EngineSpec, step_tokens: int) -> EngineLimits:
    try:
        return EngineLimits(
            context_tokens=spec.context_tokens,
            running_requests_max=spec.running_requests_max,
            waiting_requests_max=spec.waiting_requests_max,
            step_tokens=max(step_tokens, spec.running_requests_max),
        )
    except ValueError as error:
        raise OptionInvalid(f"{spec.model} cannot be run: {error}") from error
