"""The ways in which one request may be computed, and what must hold in each: one table for every
kind of engine.

A row says in what company the request runs, in which chunks, what of it was computed before, and
what happens to it on the way. Whatever it says, the same tokens come; of a strict engine the same
logits, bit for bit. That each thing really happened is read from the engine's figures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.engine import Engine
from engine.limits import EngineLimits
from engine.models.spec import ModelSpec
from engine.request import Request
from tests.engine.checkpoints import greedy, run, tokens_of
from tests.engine.parking_stage import FAST_BYTES_PER_S, SLOW_BYTES_PER_S, ParkingStage

PROBE, EARLIER, RIVAL = 1000, 1001, 1002
STEPS_BEFORE = 3
"""Steps that the probe runs before anything happens to it."""
LEAST_PRIORITY = 9
PARKED, RECOMPUTED, KEPT = "parked", "recomputed", "kept"


@dataclass(frozen=True)
class Way:
    """One way to compute the probe; alone and in one chunk unless it says otherwise."""

    others: int = 0
    place: int = 0
    """How many of the others come before it."""
    shuffled: bool = False
    in_chunks: bool = False
    earlier: float = 0.0
    """What part of it somebody else asked before."""
    gives_way: str = ""
    """PARKED or RECOMPUTED: what becomes of its KV when a better one needs its blocks."""
    swaps: tuple[str, ...] = ()
    """KEPT, PARKED or RECOMPUTED, once each: what becomes of its KV when its model is paused."""


WAYS: Mapping[str, Way] = {
    "alone": Way(),
    "among 1": Way(others=1),
    "among 7": Way(others=7),
    "among 63": Way(others=63),
    "among 63, shuffled": Way(others=63, place=40, shuffled=True),
    "in chunks": Way(in_chunks=True),
    "in chunks among 7": Way(others=7, place=5, in_chunks=True),
    "half of it found": Way(earlier=0.5),
    "all of it found": Way(earlier=1.0),
    "found among 7": Way(earlier=1.0, others=7, place=3),
    "gives way, computed again": Way(gives_way=RECOMPUTED),
    "gives way, parked": Way(gives_way=PARKED),
    "swapped out, KV kept": Way(swaps=(KEPT,)),
    "swapped out, KV parked": Way(swaps=(PARKED,)),
    "swapped out, computed again": Way(swaps=(RECOMPUTED,)),
    "swapped thrice, found, in chunks": Way(
        others=2, place=1, in_chunks=True, earlier=0.5, swaps=(PARKED, KEPT, RECOMPUTED)
    ),
}


@dataclass
class Noted:
    """Logits of the probe by how many tokens it had; doing one again must bring the same."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)

    def note(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        for row, request in zip(logits, requests, strict=False):
            if request.id == PROBE:
                self.logits[len(request.tokens)] = row.clone()

    def differing(self, other: Noted) -> int:
        """Rows in which two ways do not agree bit for bit."""
        assert self.logits.keys() == other.logits.keys()
        return sum(not torch.equal(row, other.logits[place]) for place, row in self.logits.items())


@dataclass(frozen=True)
class Kind:
    """A kind of engine: what it computes, how, and with how much memory."""

    spec: ModelSpec
    weights: Mapping[str, torch.Tensor]
    probe: list[int]
    others: list[list[int]]
    rival: list[int]
    new_tokens: int
    others_tokens: int
    page_bytes: int
    pages: int
    pages_few: int
    """Enough for the rival alone."""
    context_tokens: int
    chunk_tokens: int
    strict: bool = True
    given: Callable[[Noted], dict[str, Any]] = lambda noted: {}
    """What its engines are made with."""
    captured: bool = False
    """Whether their steps are."""

    def compute(self, way: Way) -> tuple[list[int], Noted]:
        """The probe's tokens and logits."""
        noted, few = Noted(), way.gives_way != ""
        rate = SLOW_BYTES_PER_S if way.gives_way == RECOMPUTED else FAST_BYTES_PER_S
        pages = self.pages_few if few else self.pages
        stage = ParkingStage(pages, self.page_bytes, link_bytes_per_s=rate)
        running = 1 + max(way.others, 7)
        tokens = max(self.chunk_tokens, running) if way.in_chunks else 512
        limits = EngineLimits(self.context_tokens, running, step_tokens=tokens, strict=self.strict)
        engine = stage.engine(self.spec, self.weights, limits, **self.given(noted))
        if way.earlier:
            asked = self.probe[: round(way.earlier * len(self.probe))]
            engine.submit(EARLIER, asked, greedy(1))
            run(engine)
        self._submit(engine, way)
        found: list[int] = []
        for swap in way.swaps:
            found += self._steps(engine)
            self._swap(engine, swap)
        if way.gives_way:
            found += self._steps(engine)
            engine.submit(RIVAL, self.rival, greedy(2))
        found += tokens_of(run(engine).get(PROBE, []))
        self._check(way, engine)
        engine.pause()
        stage.close()
        return found, noted

    def _submit(self, engine: Engine, way: Way) -> None:
        order = list(range(len(self.others)))
        if way.shuffled:
            random.Random(3).shuffle(order)
        submitted = [(index, self.others[index], 0) for index in order[: way.others]]
        submitted.insert(way.place, (PROBE, self.probe, LEAST_PRIORITY if way.gives_way else 0))
        for number, prompt, priority in submitted:
            count = self.new_tokens if number == PROBE else self.others_tokens
            engine.submit(number, prompt, greedy(count), priority)

    def _steps(self, engine: Engine) -> list[int]:
        outputs = [output for _ in range(STEPS_BEFORE) for output in engine.step()]
        return tokens_of([output for output in outputs if output.request == PROBE])

    def _swap(self, engine: Engine, swap: str) -> None:
        """Weights go and come back elsewhere, and KV as it says."""
        engine.pause(keep_kv=swap != RECOMPUTED)
        if swap == PARKED:
            vacating = engine.vacate(engine.pages_held)
            vacating.copy(lambda: None)
            vacating.release()
            assert vacating.dropped == 0
            assert engine.statistics().parked > 0
        engine.resume({name: weight.clone() for name, weight in self.weights.items()})

    def _check(self, way: Way, engine: Engine) -> None:
        """What was to happen has."""
        figures = engine.statistics()
        assert (figures.prefix_hit_tokens_total > 0) == (way.earlier > 0)
        if way.gives_way:
            assert figures.preemptions_total == 1
            assert figures.preemptions_parked_total == (way.gives_way == PARKED)
        if engine._stepper.overlaps and self.captured:
            assert figures.stepper.replays > 0


def check(kind: Kind, name: str, expected: list[int], alone: Noted | None = None) -> Noted:
    """That a way brings the `expected` tokens, and from strict engines the logits of `alone`."""
    tokens, noted = kind.compute(WAYS[name])
    assert tokens == expected, name
    assert len(noted.logits) == len(expected), name
    if alone is not None and kind.strict:
        assert alone.differing(noted) == 0, name
    return noted
