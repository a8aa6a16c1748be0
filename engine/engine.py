"""One model's runtime on one partition: requests in, one step at a time, tokens out.

Owns the requests from submission to their last token, the KV account and the decoder over the
weights it was given. It never owns a thread, a socket or the memory of its weights: the worker
calls `step` while `has_work`, all from one thread. Invariants: a request is answered with exactly
one finish unless it is cancelled; what goes wrong with one request ends that one alone; a paused
engine holds no weight, its KV can be taken away page by page, and what it ran goes on afterwards
with the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.block_pool import BlockPool
from engine.device_tensors import placed
from engine.errors import KvTooSmall
from engine.kernels.protocol import Span
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kv_layout import KvLayout
from engine.kv_space import KvSpace
from engine.limits import EngineLimits
from engine.link.tokens import Finish, Output, Sampling
from engine.models.decoder import Decoder, Gate, OpenGate, Weights
from engine.models.spec import ModelSpec
from engine.parking import KvLane, Vacating
from engine.request import Request
from engine.sampler import Draw, sample
from engine.scheduler import Chunk, Scheduler


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """What an engine holds now and did since it was made."""

    running: int
    waiting: int
    kv_used_bytes: int
    """Of blocks that requests hold."""
    kv_bytes: int
    """Of pages mapped now."""
    prompt_tokens_total: int
    """Tokens of prompts whose computation was begun; doing it again does not count."""
    generation_tokens_total: int
    computed_tokens_total: int
    """Tokens that went through the model; doing it again does count."""
    preemptions_total: int
    steps_total: int
    parked: int
    """Waiting requests whose KV is in host memory."""
    parked_bytes: int
    unparked_s: float
    """Time spent on bringing KV back since it was made."""


class Engine:
    """Runs requests of one model.

        engine = Engine(spec, weights, kv, EngineLimits(context_tokens=2048))
        engine.submit(1, prompt, Sampling(max_tokens=16, temperature=0))
        while engine.has_work:
            for output in engine.step(): ...

    Made without `weights` it is paused until `resume`. `weights` has the tensors that
    `image_recipes` names, of `dtype`. Raises BlockTooLarge or KvTooSmall.
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
    ) -> None:
        self.spec = spec
        self.limits = limits
        self.layout = KvLayout.choose(spec, dtype, kv.page_bytes)
        pages_needed = self.layout.pages_for(limits.context_tokens)
        if pages_needed > kv.pages_max:
            raise KvTooSmall(
                f"the KV of {limits.context_tokens} tokens takes {pages_needed} pages of "
                f"{kv.page_bytes} bytes, and there is room for {kv.pages_max}: raise it to "
                f"{pages_needed * kv.page_bytes} bytes, or lower context_tokens",
                needed_bytes=pages_needed * kv.page_bytes,
                available_bytes=kv.pages_max * kv.page_bytes,
            )
        self._pool = BlockPool(kv, self.layout.blocks_per_page)
        self._scheduler = Scheduler(limits, self._pool, self.layout.block_tokens)
        memory = kv.memory()
        self._device = memory.device
        self._kernels = ReferenceKernels(spec, self.layout, memory)
        self._requests: dict[int, Request] = {}
        self._refused: list[Output] = []
        self._decoder: Decoder | None = None
        self._arrivals = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._computed_tokens = 0
        self._unparked_s = 0.0
        self._steps = 0
        if weights is not None:
            self.resume(weights, gate)

    # Requests.

    def submit(
        self, request_id: int, prompt: Sequence[int], sampling: Sampling, priority: int = 0
    ) -> None:
        """Let a request wait for its turn; what cannot be run ends with an error in the next step.

        Raises ValueError for an id that is in use: answers could not be told apart.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id} is running or waiting already")
        refusal = self._refusal(prompt, sampling)
        if refusal:
            self._refused.append(Output(request_id, finish=Finish.ERROR, error=refusal))
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
        )
        self._arrivals += 1
        self._requests[request_id] = request
        self._scheduler.add(request)

    def cancel(self, request_id: int) -> bool:
        """Forget a request and free its KV; nothing is answered. False when there is none."""
        self._refused = [output for output in self._refused if output.request != request_id]
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._scheduler.remove(request)
        self._release_idle()
        return True

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything: never while paused, but to answer refusals."""
        return bool(self._refused) or (self._decoder is not None and bool(self._requests))

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

        When it raises (a gate whose weights do not come), no request has changed and it can be
        called again.
        """
        outputs, self._refused = self._refused, []
        if self._decoder is None:
            return outputs
        plan = self._scheduler.schedule()
        self._unpark()
        for request in plan.exhausted:
            outputs.append(self._end(request, Finish.ERROR, "no KV memory is left to run it"))
        # Chunks of one shape lie side by side, so that they can be computed as one.
        chunks = sorted(plan.chunks, key=_shape)
        if chunks:
            try:
                draws = self._compute(self._decoder, chunks)
            except BaseException:
                self._refused = outputs
                raise
            outputs += self._commit(chunks, draws)
            self._steps += 1
        self._release_idle()
        return outputs

    # Weights.

    @property
    def paused(self) -> bool:
        """Whether it has no weights."""
        return self._decoder is None

    def pause(self, *, keep_kv: bool = False) -> None:
        """Let go of weights and, unless it is to be kept, of all KV; what runs waits with the
        tokens it has."""
        if not keep_kv:
            self._scheduler.preempt_all()
        self._decoder = None
        self._pool.trim()

    def vacate(self, pages: int, lane: KvLane) -> Vacating:
        """Begin to give up the last `pages` KV pages of a paused engine, by way of `lane`.

        Whoever calls sees to it that `copy` runs, and `release` until it has ended.
        """
        assert self.paused, "a step may be computing with these pages"
        return Vacating(self._scheduler, self._pool, lane, pages)

    def forget_parked(self) -> None:
        """Give up all KV in host memory."""
        for request in self._requests.values():
            request.forget_kv()

    def resume(self, weights: Weights, gate: Gate | None = None) -> None:
        """Go on with `weights`, each layer of which is used only once `gate` lets it."""
        self._decoder = Decoder(self.spec, weights, self._kernels, gate or OpenGate())

    def statistics(self) -> EngineStatistics:
        """Figures for the worker's state and metrics."""
        parked = [one.parked for one in self._scheduler.waiting if one.parked is not None]
        return EngineStatistics(
            running=self.running,
            waiting=self.waiting,
            kv_used_bytes=self._pool.used * self.layout.block_bytes,
            kv_bytes=self._pool.pages * self.layout.page_bytes,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            computed_tokens_total=self._computed_tokens,
            preemptions_total=self._scheduler.preemptions,
            steps_total=self._steps,
            parked=len(parked),
            parked_bytes=sum(one.size_bytes for one in parked),
            unparked_s=self._unparked_s,
        )

    # Inside.

    def _refusal(self, prompt: Sequence[int], sampling: Sampling) -> str:
        limits = self.limits
        if not prompt:
            return "the prompt has no tokens"
        if len(prompt) >= limits.context_tokens:
            return (
                f"the prompt has {len(prompt)} tokens, and the context of {limits.context_tokens} "
                "must hold at least one more: shorten it"
            )
        if sampling.max_tokens < 1:
            return f"max_tokens is {sampling.max_tokens}; it must be at least 1"
        if min(prompt) < 0 or max(prompt) >= self.spec.vocabulary:
            return f"the prompt holds a token outside the vocabulary of {self.spec.vocabulary}"
        if self.waiting >= limits.waiting_requests_max:
            return f"{self.waiting} requests wait already: try again later"
        return ""

    @torch.inference_mode()
    def _compute(self, decoder: Decoder, chunks: Sequence[Chunk]) -> list[Draw]:
        """Run the chunks; draws are those of the chunks that draw, in order."""
        spans = [Span(chunk.start, chunk.count, chunk.request.blocks) for chunk in chunks]
        counts = np.array([chunk.count for chunk in chunks])
        ends = np.cumsum(counts)
        starts = np.array([chunk.start for chunk in chunks])
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        tokens: list[int] = []
        for chunk in chunks:
            tokens += chunk.request.tokens[chunk.start : chunk.end]
        plan = self._kernels.plan(spans, torch.from_numpy(positions))
        drawing = [index for index, chunk in enumerate(chunks) if chunk.draws]
        rows = placed(torch.from_numpy(ends[np.array(drawing, dtype=np.int64)] - 1), self._device)
        logits = decoder.forward(placed(torch.tensor(tokens), self._device), plan, rows)
        return sample(logits, [chunks[index].request for index in drawing])

    def _commit(self, chunks: Sequence[Chunk], draws: Sequence[Draw]) -> list[Output]:
        """Note what was computed, and turn draws into outputs."""
        outputs = []
        for chunk in chunks:
            request = chunk.request
            request.computed = chunk.end
            self._computed_tokens += chunk.count
            if not request.counted:
                request.counted = True
                self._prompt_tokens += request.prompt_tokens
        ready = [chunk.request for chunk in chunks if chunk.draws]
        for request, draw in zip(ready, draws, strict=True):
            outputs.append(self._accept(request, draw))
        return outputs

    def _accept(self, request: Request, draw: Draw) -> Output:
        """Add one drawn token to its request, or end it."""
        if draw.token is None:
            return self._end(request, Finish.ERROR, "the model's output for it is not a number")
        if draw.token in request.stop_token_ids:
            return self._end(request, Finish.STOP)
        request.tokens.append(draw.token)
        self._generation_tokens += 1
        finish = None
        if len(request.tokens) >= request.tokens_max:
            finish = Finish.LENGTH
            self._end(request, finish)
        logprobs = () if draw.logprob is None else (draw.logprob,)
        return Output(request.id, (draw.token,), logprobs, finish)

    def _unpark(self) -> None:
        """Bring parked KV back for requests that were given blocks."""
        for request in self._scheduler.running:
            if request.parked is not None:
                started = time.monotonic()
                request.restore_kv()
                self._unparked_s += time.monotonic() - started

    def _end(self, request: Request, finish: Finish, error: str = "") -> Output:
        del self._requests[request.id]
        if request.blocks:
            self._scheduler.remove(request)
        return Output(request.id, finish=finish, error=error)

    def _release_idle(self) -> None:
        if not self._requests:
            self._pool.trim()


def _shape(chunk: Chunk) -> tuple[int, int]:
    return chunk.count, chunk.end
