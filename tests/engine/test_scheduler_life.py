"""200,000 seeded steps of the scheduler over a memory that only remembers what was written to it.

In place of keys and values each slot has a number that stands for the salt and all tokens up to it.
Before a chunk is computed, everything that its tokens look at must be there: so a block that was
shared, copied, parked or taken away wrongly is found the first time anybody would read it. Whose KV
is parked, and which copies fail, is drawn.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest

from engine.block_pool import BlockPool
from engine.filling import Filling
from engine.giving_way import GivingWay
from engine.kv_layout import KvLayout
from engine.kv_space import PlainKvSpace
from engine.kv_window import KvWindow
from engine.limits import EngineLimits
from engine.link.tokens import Sampling
from engine.parking import KvLane
from engine.prefix_keys import PrefixKeys
from engine.request import Request
from engine.scheduler import Chunk, Scheduler, StepPlan
from swap.parking import ParkingArea

BLOCK_TOKENS = 4
BLOCKS_PER_PAGE = 3
LAYOUT = KvLayout(1, 1, 1, "float32", BLOCK_TOKENS, BLOCKS_PER_PAGE * 2 * 4 * BLOCK_TOKENS)
AREA_BLOCKS = 12
FAILING = 0.02
"""Of all times that KV is copied to or from host memory."""
CONTEXT = 64
PRIORITIES = (0, 0, 0, 1, 2)
LIVE_MAX = 24
STEP_S = 0.05
WAIT_STEPS_MAX = 2000
"""Of any request, the worst class included; the longest seen over half the seeds was 720."""


class Numbers:
    """What the slots of all blocks hold."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}

    def of(self, block: int) -> list[int]:
        first = block * BLOCK_TOKENS
        return [self.slots.get(slot, 0) for slot in range(first, first + BLOCK_TOKENS)]

    def put(self, block: int, numbers: Sequence[int]) -> None:
        for slot, number in enumerate(numbers, block * BLOCK_TOKENS):
            self.slots[slot] = number

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.put(target, self.of(source))


class NumbersLane(KvLane):
    """Parks numbers. What the link is said to do, and whether it does it, is drawn."""

    def __init__(self, numbers: Numbers, chance: random.Random) -> None:
        device: Any = self
        super().__init__(
            device,
            ParkingArea(AREA_BLOCKS * LAYOUT.block_bytes),
            LAYOUT,
            0,
            link_bytes_per_s=lambda: chance.choice([0.0, 1e-3, 1e12]),
            clock=lambda: 0.0,
        )
        self.giving_way = self.unparking = self._may_fail
        self._numbers, self._chance = numbers, chance
        self._parked: dict[int, list[int]] = {}

    def copy_out(self, block: int, address: int) -> None:
        self._parked[address] = self._numbers.of(block)

    def copy_in(self, block: int, address: int) -> None:
        self._numbers.put(block, self._parked[address])

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def _may_fail(self) -> None:
        if self._chance.random() < FAILING:
            raise OSError("the link is down")


class Life:
    """One engine's scheduler, and everything that happens around it, by seed."""

    def __init__(self, seed: int, *, prefix_cache: bool, windowed: bool) -> None:
        self.chance = random.Random(seed)
        blocks = self.chance.choice([18, 30, 60])
        step_tokens = self.chance.choice([8, 17, 64])
        self.space = PlainKvSpace(1 << 16, blocks // BLOCKS_PER_PAGE)
        self.pool = BlockPool(self.space, BLOCKS_PER_PAGE)
        self.limits = EngineLimits(CONTEXT, 8, 1000, step_tokens)
        keys = PrefixKeys(b"secret", BLOCK_TOKENS) if prefix_cache else None
        self.numbers = Numbers()
        self.lane = NumbersLane(self.numbers, self.chance)
        self.giving_way = GivingWay(self.pool, self.lane)
        self.giving_way.computed.note(1000, 1.0)
        self.window_tokens = self.chance.choice([1, 2, 5, 8, 19]) if windowed else 0
        window = KvWindow(self.window_tokens, step_tokens, BLOCK_TOKENS)
        self.scheduler = Scheduler(self.limits, self.pool, window, keys, self.giving_way.park)
        copies: Any = self.numbers
        self.filling = Filling(self.scheduler, copies)
        self.written: dict[int, list[int]] = {}
        """Of each request, the numbers of its tokens."""
        self.checked: dict[int, int] = {}
        """Of each running request, how many slots were seen to be right."""
        self.live: dict[int, Request] = {}
        self.begun: dict[int, int] = {}
        self.step = 0
        self.finished = self.cancelled = self.arrivals = 0
        self.wait_steps = 0
        # Few beginnings, so that most prompts share something.
        self.beginnings = [
            [self.chance.randrange(3) for _ in range(self.chance.randrange(4, 30))]
            for _ in range(3)
        ]

    def submit(self) -> None:
        chance = self.chance
        tokens = list(chance.choice(self.beginnings))
        tokens += [chance.randrange(3) for _ in range(chance.choice([0, 0, 1, 3, 9]))]
        salt = chance.choice(["", "", "other"])
        samples = chance.choice([1, 1, 1, 4])
        for _ in range(samples):
            request = Request(
                id=self.arrivals,
                prompt_tokens=len(tokens),
                tokens=list(tokens),
                sampling=Sampling(max_tokens=1),
                priority=chance.choice(PRIORITIES),
                arrival=self.arrivals,
                tokens_max=len(tokens) + chance.randrange(1, CONTEXT - len(tokens)),
                stop_token_ids=frozenset(),
                arrived_s=self.step * STEP_S,
                cache_salt=salt,
            )
            self.arrivals += 1
            self.live[request.id] = request
            self.begun[request.id] = self.step
            self.written[request.id] = []
            self.scheduler.add(request)

    def expected(self, request: Request) -> list[int]:
        """What the slots of all of its tokens have to hold."""
        known = self.written[request.id]
        for token in request.tokens[len(known) :]:
            known.append(hash((known[-1] if known else hash(request.cache_salt), token)))
        return known

    def gone(self, request: Request) -> None:
        assert not request.blocks
        assert request.source is None
        assert request.parked is None
        self.wait_steps = max(self.wait_steps, self.step - self.begun.pop(request.id))
        del self.live[request.id], self.written[request.id]
        self.checked.pop(request.id, None)

    def cancel(self) -> None:
        request = self.chance.choice(list(self.live.values()))
        self.scheduler.remove(request)
        self.gone(request)
        self.cancelled += 1

    def advance(self) -> StepPlan:
        """One step: plan it, check it, and let the model answer."""
        self.step += 1
        plan = self.scheduler.schedule()
        self.giving_way.copy()
        for request in self.scheduler.running:
            if request.source is not None:
                assert self.pool.holds(request.blocks[request.named]) == 1
            if request.incomplete:
                self.checked.pop(request.id, None)
        lost = self.filling.fill()
        for request in self.scheduler.waiting:
            self.checked.pop(request.id, None)
        chunks = tuple(chunk for chunk in plan.chunks if chunk.request not in lost)
        for chunk in chunks:
            self._write(chunk)
        for chunk in chunks:
            draws = chunk.draws
            self.scheduler.advance(chunk)
            if draws:
                request = chunk.request
                request.tokens.append(self.chance.randrange(3))
                if len(request.tokens) >= request.tokens_max:
                    self.scheduler.remove(request)
                    self.gone(request)
                    self.finished += 1
        return plan

    def _write(self, chunk: Chunk) -> None:
        request = chunk.request
        assert chunk.start == request.computed
        assert len(request.blocks) * BLOCK_TOKENS >= chunk.end
        numbers, slots = self.expected(request), self.numbers.slots
        first = self.checked.get(request.id, 0)
        if self.window_tokens:
            # All that is seen, each time: what has not been given back must not be another's.
            first = max(0, chunk.start - self.window_tokens + 1)
        for place in range(first, chunk.start):
            assert slots[self._slot(request, place)] == numbers[place], "wrong contents"
        for place in range(chunk.start, chunk.end):
            assert self.pool.holds(request.blocks[place // BLOCK_TOKENS]) == 1, "it is shared"
            slots[self._slot(request, place)] = numbers[place]
        self.checked[request.id] = chunk.end

    @staticmethod
    def _slot(request: Request, place: int) -> int:
        return request.blocks[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS

    def check(self, plan: StepPlan) -> None:
        """What must hold after every step."""
        scheduler = self.scheduler
        assert not plan.exhausted
        assert sum(chunk.count for chunk in plan.chunks) <= self.limits.step_tokens
        assert len({chunk.request.id for chunk in plan.chunks}) == len(plan.chunks)
        assert len(scheduler.running) <= self.limits.running_requests_max
        assert plan.chunks or not self.live, "there was work, and nothing was computed"
        queues = [*scheduler.running, *scheduler.waiting]
        assert {request.id for request in queues} == set(self.live)
        for queue in (scheduler.running, scheduler.waiting):
            ranks = [request.rank for request in queue]
            assert ranks == sorted(ranks)
        held = [block for request in scheduler.running for block in request.held]
        for request in scheduler.running:
            assert len(request.held) <= (scheduler.window.blocks_max or CONTEXT)
            assert request.unseen == 0 or self.window_tokens
        assert len(set(held)) == self.pool.used
        parked = [one.parked for one in scheduler.waiting if one.parked is not None]
        assert sum(one.size_bytes for one in parked) == self.lane.area.used_bytes
        assert not any(request.incomplete for request in scheduler.running)
        if self.step % 50 == 0:
            self.pool.check()
            for block in set(held):
                assert self.pool.holds(block) == held.count(block)


@pytest.mark.parametrize("seed", range(20))
def test_a_long_random_life(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Arrivals never end while it lasts, so that whoever could be passed over for ever would be.

    The latter half of the seeds look back no farther than a window.
    """
    caplog.set_level(logging.CRITICAL, "engine")  # of copies that fail there are thousands
    life = Life(seed, prefix_cache=seed % 5 != 4, windowed=seed >= 10)
    scheduler, chance = life.scheduler, life.chance
    for _ in range(10_000):
        if len(life.live) < LIVE_MAX and chance.random() < 0.4:
            life.submit()
        if life.live and chance.random() < 0.03:
            life.cancel()
        if chance.random() < 0.002:
            scheduler.preempt_all()
            life.pool.trim()
            assert (life.pool.used, life.pool.idle, life.pool.pages) == (0, 0, 0)
        if chance.random() < 0.01:
            life.pool.trim(chance.randrange(3))
        life.check(life.advance())
        oldest = min(life.begun.values(), default=life.step)
        assert life.step - oldest < WAIT_STEPS_MAX, "somebody starves"
    for _ in range(5_000):
        if not life.live:
            break
        life.check(life.advance())
    assert life.finished + life.cancelled == life.arrivals
    assert scheduler.preemptions > life.giving_way.parked > 0
    assert (scheduler.prefixes.hit_tokens > 0) == (seed % 5 != 4)
    assert life.pool.used == 0
    assert not scheduler.prefixes._computing
    life.lane.area.close()
    life.pool.trim()
    life.pool.check()
    assert (life.pool.pages, life.pool.idle) == (0, 0)
