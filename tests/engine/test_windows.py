"""Engines of models that see no farther than a window: what they hold, give back and park.

That logits and tokens are transformers' is tested beside the other shapes; here memory is what
matters, and what nobody holds is filled with NaN after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from engine.engine import Engine
from engine.errors import KvTooSmall
from engine.kernels.reference.paged_attention import paged_views
from engine.kv_layout import KvLayout
from engine.kv_space import KvSpace, PlainKvSpace, RegionKvSpace
from engine.kv_window import KvWindow
from engine.limits import EngineLimits
from engine.link.control import EngineSpec
from engine.parking import KvLane
from engine.worker.measures import kv_pages_min
from swap.arena import PagePool, Region
from swap.host_device import HostDevice
from swap.parking import ParkingArea
from tests.engine.checkpoints import Checkpoint, greedy, prompt
from tests.support.worker_stage import build_segment

Make = Callable[[str], Checkpoint]
WINDOWED, MIXED = "mistral-window", "qwen2-window"
PAGE_BYTES = 1 << 13
CONTEXT, STEP_TOKENS, NEW_TOKENS = 300, 16, 40
LONG = prompt(3, 250)


@dataclass
class Stage:
    """An engine, its memory, and what it answered."""

    engine: Engine
    space: KvSpace
    tokens: dict[int, list[int]]
    blocks_max: int = 0
    """The most that were ever held."""

    @classmethod
    def make(
        cls,
        made: Checkpoint,
        space: KvSpace,
        make_lane: Callable[[KvLayout], KvLane] | None = None,
        **limits: int,
    ) -> Stage:
        values = {"context_tokens": CONTEXT, "running_requests_max": 8, "step_tokens": STEP_TOKENS}
        space.memory().view(torch.float32)[: space.pages * space.page_bytes // 4] = float("nan")
        chosen = EngineLimits(**(values | limits))
        return cls(Engine(made.spec, made.weights, space, chosen, make_lane=make_lane), space, {})

    @classmethod
    def parking(cls, made: Checkpoint, region: Region, area: ParkingArea, **limits: int) -> Stage:
        """By way of a lane to `area`."""
        device, address = region.pool.device, region.address
        return cls.make(
            made,
            RegionKvSpace(region),
            lambda layout: KvLane(device, area, layout, address),
            **limits,
        )

    def submit(self, number: int, tokens: list[int], count: int = NEW_TOKENS) -> None:
        self.tokens[number] = []
        self.engine.submit(number, tokens, greedy(count))

    def step(self) -> None:
        for output in self.engine.step():
            assert not output.error
            self.tokens[output.request] += output.tokens
        pool = self.engine._pool
        self.blocks_max = max(self.blocks_max, pool.used)
        pool.check()
        if not self.engine.limits.prefix_cache:
            self.poison()

    def run(self) -> None:
        while self.engine.has_work:
            self.step()
        assert self.engine.statistics().kv_used_bytes == 0

    def poison(self) -> None:
        layout = self.engine.layout
        mapped = self.space.memory()[: self.space.pages * self.space.page_bytes]
        if self.space.pages:
            views = paged_views(layout, mapped)
            for block in range(self.space.pages * layout.blocks_per_page):
                if not self.engine._pool.holds(block):
                    page, place = divmod(block, layout.blocks_per_page)
                    views[page, :, :, place] = float("nan")


def window_of(made: Checkpoint, engine: Engine) -> KvWindow:
    return KvWindow(made.spec.window_tokens, STEP_TOKENS, engine.layout.block_tokens)


def test_a_long_request_needs_a_window_and_a_chunk(checkpoint: Make) -> None:
    made = checkpoint(WINDOWED)
    stage = Stage.make(made, PlainKvSpace(PAGE_BYTES, 6), prefix_cache=False)
    window = window_of(made, stage.engine)
    assert window.blocks_max is not None
    assert window.blocks_max < stage.engine.layout.blocks_for(len(LONG)) // 3
    stage.submit(1, LONG)
    stage.run()
    assert stage.tokens[1] == made.greedy(LONG, NEW_TOKENS)
    assert stage.blocks_max == window.blocks_max
    assert stage.engine.statistics().preemptions_total == 0


def test_one_layer_that_sees_all_keeps_all(checkpoint: Make) -> None:
    made = checkpoint(MIXED)
    assert made.spec.window_tokens == 0
    pages = 60
    stage = Stage.make(made, PlainKvSpace(PAGE_BYTES, pages), prefix_cache=False)
    stage.submit(1, LONG)
    stage.run()
    assert stage.tokens[1] == made.greedy(LONG, NEW_TOKENS)
    # Looked at between steps, of which the last computes the last but one token.
    assert stage.blocks_max == stage.engine.layout.blocks_for(len(LONG) + NEW_TOKENS - 2)


def test_too_little_memory_for_a_window_is_refused_with_the_figure(checkpoint: Make) -> None:
    with pytest.raises(KvTooSmall, match="there is room for 1: raise it to"):
        Stage.make(checkpoint(WINDOWED), PlainKvSpace(PAGE_BYTES, 1))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_many_in_little_memory_preempted_and_paused(
    cached: bool, strict: bool, checkpoint: Make
) -> None:
    made = checkpoint(WINDOWED)
    stage = Stage.make(made, PlainKvSpace(PAGE_BYTES, 8), prefix_cache=cached, strict=strict)
    prompts = [[*LONG[: 31 * (1 + number % 5)], number % 3] for number in range(10)]
    for number, tokens in enumerate(prompts):
        stage.submit(number, tokens, 20)
    steps = 0
    while stage.engine.has_work:
        stage.step()
        steps += 1
        if steps % 15 == 0:
            stage.engine.pause(keep_kv=steps % 30 == 0)
            stage.engine.resume(made.weights)
    assert stage.tokens == {number: made.greedy(own, 20) for number, own in enumerate(prompts)}
    figures = stage.engine.statistics()
    assert figures.preemptions_total > 0
    assert (figures.prefix_hit_tokens_total > 0) == cached


def test_of_a_cached_prefix_only_what_is_seen_need_be_there(checkpoint: Make) -> None:
    """What a long prompt gave back first is forgotten first, and its end is found all the same."""
    made = checkpoint(WINDOWED)
    stage = Stage.make(made, PlainKvSpace(PAGE_BYTES, 6))
    stage.submit(1, LONG, 1)
    stage.run()
    keys_there = stage.engine._pool.idle
    assert keys_there < stage.engine.layout.blocks_for(len(LONG)), "not all of it fits"
    stage.submit(2, LONG, NEW_TOKENS)
    stage.run()
    assert stage.tokens[2] == made.greedy(LONG, NEW_TOKENS)
    assert stage.engine.statistics().prefix_hit_tokens_total == len(LONG) - 1
    branch = [*LONG[:240], 7, 8, 9]
    stage.submit(3, branch, NEW_TOKENS)
    stage.run()
    assert stage.tokens[3] == made.greedy(branch, NEW_TOKENS)


@pytest.fixture
def region() -> Iterator[Region]:
    device = HostDevice(8 << 20)
    region = Region(PagePool(device), "kv", 4 << 20)
    yield region
    region.release()
    device.close()


def test_what_is_still_seen_is_parked_and_comes_back(checkpoint: Make, region: Region) -> None:
    made = checkpoint(WINDOWED)
    stage = Stage.parking(made, region, area := ParkingArea(1 << 20), prefix_cache=False)
    engine = stage.engine
    window = window_of(made, engine)
    prompts = {1: LONG, 2: LONG[:70], 3: LONG[:9]}
    for number, tokens in prompts.items():
        stage.submit(number, tokens)
    for _ in range(4):
        for _ in range(9):
            stage.step()
        engine.pause(keep_kv=True)
        held = sum(len(one.held) for one in engine._scheduler.running)
        computed = engine.statistics().computed_tokens_total
        vacating = engine.vacate(engine._pool.pages)
        assert vacating.parked_bytes == area.used_bytes
        assert 0 < area.used_bytes <= held * engine.layout.block_bytes
        vacating.copy(lambda: None)
        vacating.release()
        assert (engine._pool.used, region.mapped_pages) == (0, 0)
        engine.resume(made.weights)
        parked = [one for one in engine._scheduler.waiting if one.parked is not None]
        assert parked
        assert all(one.unseen == window.unseen(one.computed) for one in parked)
    stage.run()
    for number, tokens in prompts.items():
        assert stage.tokens[number] == made.greedy(tokens, NEW_TOKENS)
    needed = sum(len(tokens) + NEW_TOKENS - 1 for tokens in prompts.values())
    assert computed < engine.statistics().computed_tokens_total == needed, "nothing twice"
    assert area.used_bytes == 0


def test_parked_kv_that_is_given_up_is_computed_from_the_beginning(
    checkpoint: Make, region: Region
) -> None:
    made = checkpoint(WINDOWED)
    stage = Stage.parking(made, region, area := ParkingArea(1 << 20), prefix_cache=False)
    engine = stage.engine
    lane = engine.lane
    assert lane is not None

    def refuse() -> None:
        raise OSError("no way back")

    stage.submit(1, LONG)
    for forget in (True, False):
        for _ in range(18):
            stage.step()
        engine.pause(keep_kv=True)
        vacating = engine.vacate(engine._pool.pages)
        vacating.copy(lambda: None)
        vacating.release()
        if forget:
            engine.forget_parked()
        else:
            lane.unparking = refuse
        engine.resume(made.weights)
    stage.run()
    assert stage.tokens[1] == made.greedy(LONG, NEW_TOKENS)
    assert engine.statistics().computed_tokens_total > 2 * len(LONG)
    assert area.used_bytes == 0


def test_what_a_worker_keeps_for_it(checkpoint: Make) -> None:
    """The KV that a model is guaranteed does not grow with its context."""
    made = checkpoint(WINDOWED)
    built = build_segment(made.directory)
    page_bytes = 1 << 13

    def pages(context_tokens: int) -> int:
        spec = EngineSpec("a", built.digest, context_tokens, 8, 8)
        return kv_pages_min(spec, built.manifest, page_bytes, STEP_TOKENS)

    assert pages(CONTEXT) == pages(500) > pages(8)
    needed = pages(CONTEXT) * page_bytes
    stage = Stage.make(made, PlainKvSpace(page_bytes, pages(CONTEXT)))
    assert needed == stage.space.pages_max * page_bytes
    built.segment.close()
