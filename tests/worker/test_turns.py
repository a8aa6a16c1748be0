"""Engines of one worker share its time by weight, whatever their steps take; on a virtual clock."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from engine.worker.turns import STEP_S_MIN, Turns

PREFILL_S, DECODE_S = 0.1, 0.005


class Machine:
    """Engines that take steps of given lengths on a clock of their own."""

    def __init__(self, **weights: float) -> None:
        self.turns = Turns()
        self.weights = weights
        self.now = 0.0
        self.spent = dict.fromkeys(weights, 0.0)
        self.steps: list[tuple[str, float, float]] = []
        """Engine, beginning and end of each step."""

    def step(self, ready: list[str], lengths: Callable[[str], float]) -> str:
        name = self.turns.choose(ready)
        seconds = lengths(name)
        self.turns.count(name, seconds, self.weights[name])
        self.steps.append((name, self.now, self.now + seconds))
        self.now += seconds
        self.spent[name] += seconds
        return name

    def longest_wait_s(self, name: str) -> float:
        """Between two steps of one engine."""
        own = [(begin, end) for who, begin, end in self.steps if who == name]
        return max(begin - end for (_, end), (begin, _) in itertools.pairwise(own))


@pytest.mark.parametrize(
    "weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}, {"a": 0.5, "b": 1.0, "c": 4.0}]
)
def test_time_is_shared_by_weight_whatever_steps_take(weights: dict[str, float]) -> None:
    draw, machine = random.Random(7), Machine(**weights)
    means = {"a": PREFILL_S, "b": DECODE_S, "c": 0.02}
    while machine.now < 100.0:
        machine.step(list(weights), lambda name: draw.uniform(0.5, 1.5) * means[name])
    for name, weight in weights.items():
        share = machine.spent[name] / machine.now
        assert share == pytest.approx(weight / sum(weights.values()), rel=0.02)


def test_a_long_prefill_delays_anothers_decode_by_one_chunk() -> None:
    machine = Machine(chat=1.0, reader=1.0)
    lengths = {"chat": DECODE_S, "reader": PREFILL_S}
    for _ in range(1000):
        machine.step(["chat", "reader"], lengths.__getitem__)
    assert machine.longest_wait_s("chat") <= PREFILL_S + 1e-9
    assert machine.spent["reader"] > 10 * PREFILL_S
    # The chunks are far apart by as much as they take: in between the decodes get their half.
    assert machine.longest_wait_s("reader") == pytest.approx(PREFILL_S, rel=0.1)


def test_an_engine_that_did_nothing_is_owed_nothing() -> None:
    machine = Machine(busy=1.0, idle=1.0)
    for _ in range(1000):
        assert machine.step(["busy"], lambda name: PREFILL_S) == "busy"
    begun = machine.now
    for _ in range(2000):
        machine.step(["busy", "idle"], lambda name: DECODE_S)
    late = [name for name, begin, _ in machine.steps if begin >= begun]
    assert late.count("idle") == pytest.approx(1000, rel=0.02)
    # It is ahead by the chunk that the other had begun before; from there on they alternate.
    ahead = round(PREFILL_S / DECODE_S)
    assert set(late[:ahead]) == {"idle"}
    assert late[ahead + 2 :][:20].count("idle") == 10


def test_resting_does_not_clear_what_was_taken_beyond_a_share() -> None:
    # One asks for one long step, rests for a moment, and asks again.
    machine = Machine(steady=1.0, bursts=1.0)
    rests = 0
    while machine.now < 60.0:
        ready = ["steady"] if rests else ["bursts", "steady"]
        rests = max(0, rests - 1)
        chosen = machine.step(ready, lambda name: PREFILL_S if name == "bursts" else DECODE_S)
        rests = 1 if chosen == "bursts" else rests
    assert machine.spent["bursts"] / machine.now == pytest.approx(0.5, rel=0.05)


def test_steps_that_take_no_time_starve_nobody() -> None:
    machine = Machine(a=1.0, b=1.0, c=1.0)
    chosen = [machine.step(["a", "b", "c"], lambda name: 0.0) for _ in range(30)]
    assert {name: chosen.count(name) for name in "abc"} == dict.fromkeys("abc", 10)
    assert STEP_S_MIN > 0


def random_ready(draw: random.Random, names: list[str]) -> Iterator[list[str]]:
    while True:
        ready = [name for name in names if draw.random() < 0.7]
        if ready:
            yield ready


@pytest.mark.parametrize("seed", range(5))
def test_whoever_is_ready_waits_for_one_step_of_each_other_at_most(seed: int) -> None:
    # Among equals, whichever come and go: one that stays ready is passed over only by others that
    # had less, so after a step of its own it waits for its own step's length and a step of each.
    draw, names = random.Random(seed), ["a", "b", "c", "d"]
    machine = Machine(**dict.fromkeys(names, 1.0))
    waited_s = dict.fromkeys(names, 0.0)
    last_s = dict.fromkeys(names, 0.0)
    for ready in itertools.islice(random_ready(draw, names), 3000):
        chosen = machine.step(ready, lambda name: draw.uniform(0.001, 0.1))
        taken = machine.steps[-1][2] - machine.steps[-1][1]
        for name in names:
            if name == chosen or name not in ready:
                waited_s[name] = 0.0
            else:
                waited_s[name] += taken
            others = len(names) - 1
            assert waited_s[name] <= others * (last_s[name] + 0.1) + 1e-6
        last_s[chosen] = taken
