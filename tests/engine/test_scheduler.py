"""Who is computed next: budgets, ranks and preemption."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.block_pool import BlockPool
from engine.kv_space import PlainKvSpace
from engine.kv_window import KvWindow
from engine.limits import EngineLimits
from engine.link.tokens import Sampling
from engine.request import CLASS_S, Request
from engine.scheduler import Scheduler, StepPlan

BLOCK_TOKENS = 4
BLOCKS_PER_PAGE = 2


class Stage:
    """A scheduler with `blocks` blocks, and a model that always answers with token 0."""

    def __init__(
        self,
        blocks: int,
        *,
        step_tokens: int = 16,
        running: int = 8,
        context: int = 64,
        window: int = 0,
    ) -> None:
        self.space = PlainKvSpace(1 << 16, blocks // BLOCKS_PER_PAGE)
        self.pool = BlockPool(self.space, BLOCKS_PER_PAGE)
        self.limits = EngineLimits(context, running, 1000, step_tokens)
        self.scheduler = Scheduler(
            self.limits, self.pool, KvWindow(window, step_tokens, BLOCK_TOKENS)
        )
        self.arrivals = 0
        self.finished: list[int] = []

    def submit(
        self, tokens: int, output: int = 4, priority: int = 0, arrived_s: float = 0.0
    ) -> Request:
        request = Request(
            id=self.arrivals,
            prompt_tokens=tokens,
            tokens=[1] * tokens,
            sampling=Sampling(max_tokens=output),
            priority=priority,
            arrival=self.arrivals,
            tokens_max=tokens + output,
            stop_token_ids=frozenset(),
            arrived_s=arrived_s,
        )
        self.arrivals += 1
        self.scheduler.add(request)
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for chunk in plan.chunks:
            assert len(chunk.request.blocks) * BLOCK_TOKENS >= chunk.end
            assert chunk.start == chunk.request.computed
        for chunk in plan.chunks:
            draws = chunk.draws
            self.scheduler.advance(chunk)
            if draws:
                chunk.request.tokens.append(0)
                if len(chunk.request.tokens) == chunk.request.tokens_max:
                    self.scheduler.remove(chunk.request)
                    self.finished.append(chunk.request.id)
        return plan

    def finish_all(self, steps_max: int = 1000) -> None:
        for _ in range(steps_max):
            if not self.scheduler.running and not self.scheduler.waiting:
                return
            self.step()
        raise AssertionError("somebody starves")


def ids(requests: Sequence[Request]) -> list[int]:
    return [request.id for request in requests]


def counts(plan: StepPlan) -> dict[int, int]:
    return {chunk.request.id: chunk.count for chunk in plan.chunks}


def test_one_budget_for_decodes_and_chunks() -> None:
    stage = Stage(100, step_tokens=10)
    for tokens in (3, 20, 6):
        stage.submit(tokens)
    assert counts(stage.step()) == {0: 3, 1: 7}
    assert counts(stage.step()) == {0: 1, 1: 9}
    assert counts(stage.step()) == {0: 1, 1: 4, 2: 5}
    assert counts(stage.step()) == {0: 1, 1: 1, 2: 1}


def test_a_prompt_of_one_token_is_computed_at_once() -> None:
    stage = Stage(100)
    stage.submit(1)
    assert counts(stage.step()) == {0: 1}


def test_a_better_priority_goes_first_and_equals_by_arrival() -> None:
    stage = Stage(100, step_tokens=8)
    for priority in (5, 0, 5, -1):
        stage.submit(8, priority=priority)
    assert counts(stage.step()) == {3: 8}
    assert counts(stage.step()) == {3: 1, 1: 7}
    assert ids(stage.scheduler.waiting) == [0, 2]


def test_a_late_prompt_of_better_priority_overtakes_one_in_progress() -> None:
    stage = Stage(100, step_tokens=8)
    stage.submit(40, priority=1)
    stage.step()
    stage.submit(6, priority=0)
    assert counts(stage.step()) == {1: 6, 0: 2}


def test_no_more_requests_run_than_allowed() -> None:
    stage = Stage(100, step_tokens=16, running=2)
    for _ in range(4):
        stage.submit(2, output=3)
    stage.step()
    assert ids(stage.scheduler.running) == [0, 1]
    assert ids(stage.scheduler.waiting) == [2, 3]
    stage.finish_all()
    assert stage.finished == [0, 1, 2, 3]


def test_out_of_blocks_the_newest_of_the_lowest_class_waits_again() -> None:
    stage = Stage(10, step_tokens=64)
    for priority in (1, 0, 1):
        stage.submit(8, output=12, priority=priority)
    stage.step()
    assert ids(stage.scheduler.running) == [1, 0, 2]
    while not stage.scheduler.preemptions:
        stage.step()
    assert ids(stage.scheduler.waiting) == [2]
    preempted = stage.scheduler.waiting[0]
    assert (preempted.computed, preempted.blocks) == (0, [])
    assert len(preempted.tokens) > 8, "it keeps what it has drawn"
    stage.finish_all()
    assert sorted(stage.finished) == [0, 1, 2]
    assert stage.pool.used == 0


def test_a_better_class_takes_the_place_of_a_lower_one_only_if_that_helps() -> None:
    stage = Stage(6, step_tokens=64, running=8)
    stage.submit(16, output=8, priority=1)
    stage.step()
    same = stage.submit(8, priority=1)
    stage.step()
    assert ids(stage.scheduler.running) == [0], "an equal waits"
    stage.scheduler.remove(same)
    better = stage.submit(22, output=1, priority=0)
    stage.step()
    assert better.id in stage.finished
    assert stage.scheduler.preemptions == 1
    assert ids(stage.scheduler.waiting) == [0]


def test_who_has_waited_long_enough_goes_before_a_better_class() -> None:
    stage = Stage(100, step_tokens=8, running=1)
    patient = stage.submit(8, output=1, priority=1, arrived_s=0.0)
    early = stage.submit(8, output=1, priority=0, arrived_s=CLASS_S - 1)
    late = stage.submit(8, output=1, priority=0, arrived_s=CLASS_S + 1)
    stage.finish_all()
    assert stage.finished == [early.id, patient.id, late.id]


def test_who_has_waited_long_enough_is_not_preempted_for_a_better_class() -> None:
    stage = Stage(6, step_tokens=64, running=8)
    patient = stage.submit(16, output=8, priority=1, arrived_s=0.0)
    stage.step()
    stage.submit(22, output=1, priority=0, arrived_s=CLASS_S + 1)
    stage.step()
    assert (ids(stage.scheduler.running), stage.scheduler.preemptions) == ([patient.id], 0)


def test_nobody_is_preempted_in_vain() -> None:
    stage = Stage(8, step_tokens=64)
    stage.submit(12, priority=0)
    stage.submit(8, priority=2)
    stage.step()
    stage.submit(20, priority=1)  # would not fit even without the request of priority 2
    stage.step()
    assert stage.scheduler.preemptions == 0
    assert ids(stage.scheduler.running) == [0, 1]


def test_the_head_of_the_queue_is_not_overtaken_by_smaller_ones() -> None:
    stage = Stage(6, step_tokens=64)
    stage.submit(12, output=8)
    stage.step()
    stage.submit(16)
    stage.submit(1)
    stage.step()
    assert ids(stage.scheduler.running) == [0]
    stage.finish_all()
    assert stage.finished == [0, 1, 2]


def test_alone_and_out_of_memory_a_request_ends_instead_of_waiting_for_ever() -> None:
    stage = Stage(2, step_tokens=64)
    waiting = stage.submit(9)
    assert ids(stage.step().exhausted) == [waiting.id]
    growing = stage.submit(8)
    stage.step()
    assert ids(stage.step().exhausted) == [growing.id]
    assert stage.pool.used == 0
    assert not stage.scheduler.running
    assert not stage.scheduler.waiting


def test_pausing_keeps_tokens_and_order() -> None:
    stage = Stage(100, step_tokens=64)
    requests = [stage.submit(5, output=9) for _ in range(3)]
    for _ in range(4):
        stage.step()
    stage.scheduler.preempt_all()
    assert stage.pool.used == 0
    assert ids(stage.scheduler.waiting) == [0, 1, 2]
    assert [len(request.tokens) for request in requests] == [9, 9, 9]
    assert counts(stage.step()) == {0: 9, 1: 9, 2: 9}
    stage.finish_all()
    assert stage.finished == [0, 1, 2]


def test_a_window_bounds_what_a_request_of_any_length_holds() -> None:
    """Ten times as long as memory: what is not seen any more goes, what is to come is not there."""
    window, step_tokens = 10, 8
    most = KvWindow(window, step_tokens, BLOCK_TOKENS).blocks_max
    assert most == 6, "17 tokens, begun within a block"
    stage = Stage(most, step_tokens=step_tokens, context=400, window=window)
    request = stage.submit(200, output=100)
    seen = set()
    while stage.scheduler.running or stage.scheduler.waiting:
        assert not stage.step().exhausted
        held = stage.pool.used
        assert held == len(request.held) <= most
        assert not request.blocks or held * BLOCK_TOKENS >= min(request.computed, window - 1)
        stage.pool.check()
        seen.add(held)
    assert max(seen) == most
    assert (stage.finished, stage.scheduler.preemptions) == ([0], 0)


def test_several_with_windows_in_little_memory_all_end() -> None:
    stage = Stage(14, step_tokens=8, context=400, window=10)
    for number in range(6):
        stage.submit(30 + 7 * number, output=20, priority=number % 2)
    stage.finish_all()
    assert sorted(stage.finished) == list(range(6))
    assert stage.pool.used == 0


@pytest.mark.parametrize("field", ["context_tokens", "running_requests_max", "step_tokens"])
def test_limits_are_checked_at_start(field: str) -> None:
    values = {"context_tokens": 64, "running_requests_max": 8, "step_tokens": 8}
    EngineLimits(**values)
    with pytest.raises(ValueError, match="step_tokens is 7" if field == "step_tokens" else field):
        EngineLimits(**(values | {field: 7 if field == "step_tokens" else 0}))
