"""Requests that give way for want of KV memory: parked where that is worth it, and lost nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.kv_layout import KvLayout
from engine.limits import EngineLimits
from engine.parking import KvLane
from swap.errors import DeviceError
from tests.engine.checkpoints import Checkpoint, greedy, prompt
from tests.engine.parking_stage import SLOW_BYTES_PER_S, ParkingStage

Make = Callable[[str], Checkpoint]
PAGE_BYTES = 1 << 13
"""Small blocks, so that few of them make requests give way."""
CONTEXT = 120
NEW_TOKENS = 30
PROMPTS = [prompt(300 + index, 5 + 13 * index % 60) for index in range(12)]
NEEDED = sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW_TOKENS - 1)
"""Tokens that go through the model when nothing is computed twice."""


class Crowd:
    """An engine with room for little more than one of the longest requests, and twelve of them."""

    def __init__(self, made: Checkpoint, limits: dict[str, Any], **stage: Any) -> None:
        self.made = made
        layout = KvLayout.choose(made.spec, "float32", PAGE_BYTES)
        self.stage = ParkingStage(layout.pages_for(CONTEXT), PAGE_BYTES, **stage)
        self.engine = self.stage.engine(
            made.spec, made.weights, EngineLimits(CONTEXT, **({"prefix_cache": False} | limits))
        )
        for number, tokens in enumerate(PROMPTS):
            self.engine.submit(number, tokens, greedy(NEW_TOKENS))
        self.tokens: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}

    @property
    def lane(self) -> KvLane:
        assert self.engine.lane is not None
        return self.engine.lane

    @property
    def parked(self) -> int:
        return self.engine.statistics().parked

    def step(self) -> None:
        for output in self.engine.step():
            self.tokens[output.request] += output.tokens
        self.engine._pool.check()
        assert self.stage.area.used_bytes == self.engine.statistics().parked_bytes

    def until_parked(self) -> int:
        """Step until somebody's KV is parked; the number of one of those."""
        while not self.parked:
            assert self.engine.has_work
            self.step()
        return next(one.id for one in self.engine._scheduler.waiting if one.parked is not None)

    def finish(self, without: int = -1) -> None:
        """The rest of everybody, with the tokens that would have come anyway."""
        while self.engine.has_work:
            self.step()
        for number, tokens in enumerate(PROMPTS):
            if number != without:
                assert self.tokens[number] == self.made.greedy(tokens, NEW_TOKENS), number


@pytest.fixture
def crowd(checkpoint: Make) -> Iterator[Callable[..., Crowd]]:
    made: list[Crowd] = []

    def of(shape: str = "llama", limits: dict[str, Any] | None = None, **stage: Any) -> Crowd:
        made.append(Crowd(checkpoint(shape), limits or {}, **stage))
        return made[-1]

    yield of
    for one in made:
        one.engine.forget_parked()
        one.engine.pause()
        one.stage.close()


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_what_is_parked_is_not_computed_again(shape: str, crowd: Callable[..., Crowd]) -> None:
    one = crowd(shape)
    one.finish()
    figures = one.engine.statistics()
    assert figures.preemptions_total == figures.preemptions_parked_total >= 3
    assert figures.computed_tokens_total == NEEDED
    assert figures.parked_bytes == 0


def test_what_is_computed_sooner_than_copied_is_computed_again(
    crowd: Callable[..., Crowd],
) -> None:
    one = crowd(link_bytes_per_s=SLOW_BYTES_PER_S)
    one.finish()
    figures = one.engine.statistics()
    assert figures.preemptions_total > figures.preemptions_parked_total == 0
    assert figures.computed_tokens_total > NEEDED


def test_where_nothing_was_measured_it_is_computed_again(crowd: Callable[..., Crowd]) -> None:
    one = crowd(link_bytes_per_s=0.0)
    one.finish()
    assert one.engine.statistics().preemptions_parked_total == 0


def test_as_far_as_there_is_room(crowd: Callable[..., Crowd]) -> None:
    one = crowd()
    piece_bytes = one.engine.layout.block_bytes
    one = crowd(parking_bytes=4 * piece_bytes)
    one.finish()
    figures = one.engine.statistics()
    assert figures.preemptions_total > figures.preemptions_parked_total > 0
    assert figures.computed_tokens_total > NEEDED


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_beside_prefixes_and_strict(
    prefix_cache: bool, strict: bool, crowd: Callable[..., Crowd]
) -> None:
    one = crowd("llama", {"prefix_cache": prefix_cache, "strict": strict})
    one.finish()
    assert one.engine.statistics().preemptions_parked_total >= 3


def breaks(*_: Any) -> None:
    raise OSError("the link is down")


@pytest.mark.parametrize("where", ["giving_way", "copy_out", "unparking", "copy_in"])
def test_copies_that_fail_cost_computing_alone(
    where: str, crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = crowd()
    monkeypatch.setattr(one.lane, where, breaks)
    one.finish()
    figures = one.engine.statistics()
    assert figures.computed_tokens_total > NEEDED
    assert (figures.preemptions_parked_total > 0) == (where in ("unparking", "copy_in"))


def test_host_memory_that_the_system_refuses(
    crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses() -> None:
        raise DeviceError("no addresses are left")

    one = crowd()
    monkeypatch.setattr(one.stage.area, "open", refuses)
    one.finish()
    assert one.engine.statistics().preemptions_parked_total == 0


def test_cancelled_while_parked(crowd: Callable[..., Crowd]) -> None:
    one = crowd()
    gone = one.until_parked()
    before = one.stage.area.used_bytes
    assert one.engine.cancel(gone)
    assert one.stage.area.used_bytes < before
    one.finish(without=gone)


def test_parked_through_a_pause_and_vacated_beside_it(crowd: Callable[..., Crowd]) -> None:
    """What gave way stays parked over a swap, and what ran joins it: nothing is computed twice."""
    one = crowd()
    one.until_parked()
    one.engine.pause(keep_kv=True)
    vacating = one.engine.vacate(one.stage.space.pages)
    vacating.copy(lambda: None)
    vacating.release()
    assert (vacating.dropped, one.stage.space.pages) == (0, 0)
    assert one.stage.area.used_bytes == one.engine.statistics().parked_bytes
    one.engine.resume({name: weight.clone() for name, weight in one.made.weights.items()})
    one.finish()
    assert one.engine.statistics().computed_tokens_total == NEEDED


def test_vacating_takes_the_place_of_those_that_gave_way(crowd: Callable[..., Crowd]) -> None:
    one = crowd()
    gave_way = one.until_parked()
    one.engine.pause(keep_kv=True)
    first = one.engine._scheduler.running[0]
    rest_bytes = one.stage.area.limit_bytes - one.stage.area.used_bytes
    held = one.stage.area.take(rest_bytes // 4096, 4096)
    assert held is not None
    vacating = one.engine.vacate(one.stage.space.pages)
    vacating.copy(lambda: None)
    vacating.release()
    parked = [one.id for one in one.engine._scheduler.waiting if one.parked is not None]
    assert first.id in parked
    assert gave_way not in parked
    assert vacating.dropped >= 1
    one.stage.area.give_back(held, 4096)
    one.engine.resume(one.made.weights)
    one.finish()


def test_copies_are_waited_for_where_one_of_them_fails(
    crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is given their blocks, and their places in host memory, must not be written to."""
    one, seen = crowd(), []
    one.step()
    one.engine.pause(keep_kv=True)
    vacating = one.engine.vacate(one.stage.space.pages)
    device = one.lane.device

    def fail_third(*arguments: Any) -> int:
        seen.append("copy")
        if len(seen) == 3:
            raise OSError("the link is down")
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(device, "copy_out_rows", fail_third)
        patched.setattr(device, "synchronize", lambda: seen.append(f"ended: {vacating.ended}"))
        vacating.copy(lambda: None)
    assert seen == ["copy", "copy", "copy", "ended: False"]
    vacating.release()
    assert (vacating.dropped > 0, one.stage.area.used_bytes) == (True, 0)
    one.engine.resume(one.made.weights)
    one.finish()


def test_behind_a_gate_nothing_is_parked(crowd: Callable[..., Crowd]) -> None:
    class Gate:
        def wait(self, layer: int) -> None:
            return

    one = crowd()
    one.step()  # by which it is known how fast it computes
    one.engine.pause()
    preempted = one.engine.statistics().preemptions_total
    one.engine.resume(one.made.weights, Gate())
    while one.engine.statistics().preemptions_total == preempted:
        one.step()
    assert one.parked == 0
    one.engine.open_gate()
    one.until_parked()
    one.finish()


def test_a_step_that_fails_before_the_copy_leaves_nothing_to_be_trusted(
    crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to be parked when collecting failed is computed again, even if it has blocks."""
    one = crowd()
    land, engine = one.engine._land, one.engine

    def fails(*arguments: Any, **given: Any) -> None:
        if engine._giving_way.wanted:
            raise RuntimeError("the device fell over")
        land(*arguments, **given)

    monkeypatch.setattr(engine, "_land", fails)
    with pytest.raises(RuntimeError, match="fell over"):
        one.finish()
    monkeypatch.undo()
    assert not engine._giving_way.wanted
    assert one.stage.area.used_bytes == engine.statistics().parked_bytes
    one.finish()
