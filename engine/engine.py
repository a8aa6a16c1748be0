"""One model's runtime on one partition: requests in, one step at a time, tokens out.

Owns the order of a step, the KV account and the decoder over the weights it was given; which
requests are open, and what is said of them, is `engine.answers`'. It never owns a thread, a socket
or the memory of its weights: the worker calls `step` while `has_work`, all from one thread. Where
computing overlaps, a step is planned and launched before the one before it is collected: what turns
out to have ended by then has its draw thrown away. Invariants: what goes wrong with one request
ends that one alone; pages are given up only while nothing is computed; a paused engine holds no
weight, its KV can be taken away page by page, and what it ran goes on afterwards with the same
tokens.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence

from engine.answers import Answers
from engine.block_copies import BlockCopies
from engine.block_pool import BlockPool
from engine.choose_stepper import choose_stepper
from engine.filling import Filling
from engine.flight import Flight
from engine.giving_way import GivingWay
from engine.kv_layout import KvLayout
from engine.kv_space import KvSpace
from engine.kv_window import KvWindow
from engine.limits import EngineLimits
from engine.link.tokens import Output, Sampling
from engine.models.decoder import Decoder, Gate, OpenGate, Weights
from engine.models.spec import ModelSpec
from engine.parking import KvLane
from engine.prefix_keys import SECRET_BYTES, PrefixKeys
from engine.refusals import no_room, refusal
from engine.request import UNDRAWN, Request
from engine.scheduler import Chunk, Scheduler
from engine.statistics import EngineStatistics
from engine.stepper import MakeStepper
from engine.vacating import Vacating

log = logging.getLogger(__name__)


class Engine:
    """Runs requests of one model.

        engine = Engine(spec, weights, kv, EngineLimits(context_tokens=2048))
        engine.submit(1, prompt, Sampling(max_tokens=16, temperature=0))
        while engine.has_work:
            for output in engine.step(): ...

    Made without `weights` it is paused until `resume`. `weights` has the tensors that
    `image_recipes` names, of `dtype`. By way of the lane that `make_lane` makes, KV is parked in
    host memory. Raises BlockTooLarge or KvTooSmall.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights | None,
        kv: KvSpace,
        limits: EngineLimits,
        *,
        gate: Gate | None = None,
        dtype: str = "float32",
        make_stepper: MakeStepper = choose_stepper,
        make_lane: Callable[[KvLayout], KvLane] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.limits = limits
        self.layout = KvLayout.choose(spec, dtype, kv.page_bytes, fp8=limits.fp8_kv)
        window = KvWindow(spec.window_tokens, limits.step_tokens, self.layout.block_tokens)
        blocks = window.blocks_for(limits.context_tokens)
        self.layout.require_room(limits.context_tokens, blocks, kv.pages_max)
        self._pool = BlockPool(kv, self.layout.blocks_per_page)
        keys = None
        if limits.prefix_cache:
            keys = PrefixKeys(secrets.token_bytes(SECRET_BYTES), self.layout.block_tokens)
        self.lane = make_lane(self.layout) if make_lane is not None else None
        self._giving_way = GivingWay(self._pool, self.lane)
        self._scheduler = Scheduler(limits, self._pool, window, keys, self._giving_way.park)
        self._filling = Filling(self._scheduler, BlockCopies(self.layout, kv.memory()))
        self._clock = clock
        self._stepper = make_stepper(spec, self.layout, kv.memory(), limits)
        self._answers = Answers(self._scheduler)
        self._flight: Flight | None = None
        self._landed_s = 0.0
        """When the last step was collected: the device begins the next one then at the earliest."""
        self._gated = False
        self._decoder: Decoder | None = None
        self._arrivals = 0
        self._prompt_tokens = 0
        self._computed_tokens = 0
        self._steps = 0
        if weights is not None:
            self.resume(weights, gate)

    # Requests.

    def submit(
        self,
        request_id: int,
        prompt: Sequence[int],
        sampling: Sampling,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Let a request wait for its turn; what cannot be run ends with an error in the next step.

        It shares cached prefixes with requests of the same `cache_salt` only.

        Raises ValueError for an id that is in use: answers could not be told apart.
        """
        if request_id in self._answers:
            raise ValueError(f"request {request_id} is running or waiting already")
        why_not = refusal(prompt, sampling, self.limits, self.spec, self.waiting)
        if why_not:
            self._answers.refuse(request_id, why_not)
            return
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(self.spec.eos_token_ids)
        request = Request(
            id=request_id,
            prompt_tokens=len(prompt),
            tokens=list(prompt),
            sampling=sampling,
            priority=priority,
            arrival=self._arrivals,
            tokens_max=min(len(prompt) + sampling.max_tokens, self.limits.context_tokens),
            stop_token_ids=frozenset(stops),
            arrived_s=self._clock(),
            cache_salt=cache_salt,
        )
        self._arrivals += 1
        self._answers.add(request)

    def cancel(self, request_id: int) -> bool:
        """Forget a request and free its KV; nothing is answered. False when there is none."""
        dropped = self._answers.drop(request_id)
        self._release_idle()
        return dropped

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything: never while paused, but to answer refusals."""
        return self._answers.ready or (
            self._decoder is not None and (len(self._answers) > 0 or self._flight is not None)
        )

    @property
    def running_requests(self) -> frozenset[int]:
        """Ids of requests that hold KV."""
        return frozenset(request.id for request in self._scheduler.running)

    @property
    def running(self) -> int:
        """How many requests hold KV."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return len(self._scheduler.waiting)

    # Steps.

    def step(self) -> list[Output]:
        """Compute one step: at most one token for each request, and chunks of prompts.

        Where computing overlaps, what is returned is of the step before: it is collected once the
        next is under way. When it raises (a gate whose weights do not come), no request has changed
        and it can be called again.
        """
        if self._decoder is None:
            return self._answers.take()
        launched = self._launch(self._decoder)
        try:
            self._land()
        finally:
            self._flight = launched
        if not self._overlapping:
            self._land()
        self._release_idle()
        return self._answers.take()

    def settle(self) -> list[Output]:
        """Wait for the step that is under way, if one is; returns what is to be sent.

        Afterwards every request has the tokens it was told of, and nothing is computed.
        """
        self._land()
        self._release_idle()
        return self._answers.take()

    # Weights.

    @property
    def paused(self) -> bool:
        """Whether it has no weights."""
        return self._decoder is None

    def pause(self, *, keep_kv: bool = False) -> None:
        """Let go of weights and, unless it is to be kept, of all KV; what runs waits with the
        tokens it has. A step that is under way is waited for; what it brought is returned by the
        next call of `step`. Cached prefixes stay only in pages that hold KV which is kept."""
        self._land()
        if not keep_kv:
            self._scheduler.preempt_all()
        self._decoder = None
        self._pool.trim()

    @property
    def pages_held(self) -> int:
        """KV pages up to the last that a request needs: only those behind it can be given up."""
        return self._pool.pages_held

    def trim(self) -> None:
        """Give up the last pages of KV in which there is nothing."""
        self._land()
        self._pool.trim_empty()

    def trim_cached(self, pages: int) -> int:
        """Give up the last pages of KV in which there are cached prefixes alone, at most `pages`;
        returns how many."""
        self._land()
        return self._pool.trim(pages)

    def abandon(self) -> None:
        """Wait until nothing is computed, whatever becomes of it: its pages go."""
        flight, self._flight = self._flight, None
        if flight is not None:
            try:
                self._stepper.collect(flight.launched)
            except Exception:
                log.exception("the last step of a model that is given up failed")

    def vacate(self, pages: int) -> Vacating:
        """Begin to give up the last `pages` KV pages of a paused engine, by way of its lane.

        Whoever calls sees to it that `copy` runs, and `release` until it has ended.
        """
        assert self.paused, "a step may be computing with these pages"
        assert self.lane is not None, "there is no way to host memory"
        return Vacating(self._scheduler, self._pool, self.lane, pages)

    def forget_parked(self) -> None:
        """Give up all KV in host memory."""
        for request in self._answers:
            self._scheduler.forget_parked(request)

    def resume(self, weights: Weights, gate: Gate | None = None) -> None:
        """Go on with `weights`, each layer of which is used only once `gate` lets it.

        Behind a gate nothing overlaps, and nothing is parked: what is computed there may have to be
        taken back.
        """
        self._decoder = Decoder(self.spec, weights, self._stepper.kernels, gate or OpenGate())
        self._gated = gate is not None
        self._giving_way.allowed = not self._gated

    def open_gate(self) -> None:
        """The weights are all there, and are what they should be."""
        self._gated = False
        self._giving_way.allowed = True

    def statistics(self) -> EngineStatistics:
        """Figures for the worker's state and metrics."""
        parked = [one.parked for one in self._scheduler.waiting if one.parked is not None]
        return EngineStatistics(
            running=self.running,
            waiting=self.waiting,
            kv_used_bytes=self._pool.used * self.layout.block_bytes,
            kv_bytes=self._pool.pages_held * self.layout.page_bytes,
            cached_bytes=self._pool.idle * self.layout.block_bytes,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._answers.generation_tokens,
            computed_tokens_total=self._computed_tokens,
            prefix_lookup_tokens_total=self._scheduler.prefixes.lookup_tokens,
            prefix_hit_tokens_total=self._scheduler.prefixes.hit_tokens,
            preemptions_total=self._scheduler.preemptions,
            preemptions_parked_total=self._giving_way.parked,
            steps_total=self._steps,
            parked=len(parked),
            parked_bytes=sum(one.size_bytes for one in parked),
            unparked_s=self._filling.unparked_s,
            discarded_tokens_total=self._answers.discarded_tokens,
            stepper=self._stepper.statistics,
        )

    # Inside.

    @property
    def _overlapping(self) -> bool:
        return self._stepper.overlaps and not self._gated

    def _launch(self, decoder: Decoder) -> Flight | None:
        """Plan a step and begin it; None when there is nothing to compute."""
        try:
            plan = self._scheduler.schedule()
            if plan.exhausted or self._giving_way.wanted or self._filling.wanted:
                # They may end by the step before it; and no KV comes or goes beside it.
                self._land(gone=plan.exhausted)
        except BaseException:
            self._giving_way.drop()
            raise
        self._giving_way.copy()
        lost = self._filling.fill()
        for request in plan.exhausted:
            tokens = len(request.tokens)
            blocks = self._scheduler.window.blocks_for(tokens)
            self._answers.end_dropped(request, no_room(tokens, blocks * self.layout.block_bytes))
        # Chunks of one shape lie side by side, so that they can be computed as one.
        planned = [one for one in plan.chunks if one.request not in lost]
        chunks = sorted((one for one in planned if self._answers.is_open(one.request)), key=_shape)
        if not chunks:
            return None
        launched_s = self._clock()
        launched = self._stepper.launch(decoder, chunks, steady=not self._gated)
        draws = tuple((chunk.request, chunk.end) for chunk in chunks if chunk.draws)
        for chunk in chunks:
            # What is computed later comes after it on the device, and may use it already.
            self._scheduler.advance(chunk)
        for request, place in draws:
            # One that ends by its length has no token to be computed after this.
            if self._overlapping and place + 1 < request.tokens_max:
                request.tokens.append(UNDRAWN)
        self._steps += 1
        return Flight(tuple(chunks), draws, launched, launched_s)

    def _land(self, gone: Sequence[Request] = ()) -> None:
        """Collect the step that is under way: note what was computed, and make outputs of draws.

        `gone` are requests that the scheduler has dropped already.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        draws = self._stepper.collect(flight.launched)
        self._note_pace(flight)
        for chunk in flight.chunks:
            request = chunk.request
            self._computed_tokens += chunk.count
            if not request.counted:
                request.counted = True
                self._prompt_tokens += request.prompt_tokens
        for (request, place), draw in zip(flight.draws, draws, strict=True):
            self._answers.accept(request, draw, place, gone)

    def _note_pace(self, flight: Flight) -> None:
        """Measure a step with prompts in it: what waits for weights is none that tells anything."""
        begun_s, self._landed_s = max(flight.launched_s, self._landed_s), self._clock()
        if not self._gated and any(chunk.count > 1 for chunk in flight.chunks):
            tokens = sum(chunk.count for chunk in flight.chunks)
            self._giving_way.computed.note(tokens, self._landed_s - begun_s)

    def _release_idle(self) -> None:
        # A step that is under way may write to pages of what has been cancelled.
        if not self._answers and self._flight is None:
            self._pool.trim_empty()


def _shape(chunk: Chunk) -> tuple[int, int]:
    return chunk.count, chunk.end
