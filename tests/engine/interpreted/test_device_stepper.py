"""Whole engines through the Triton kernels, launched and captured, overlapped and not.

The same requests through the reference tell which tokens are right. `RecordedGraphs` stands where
CUDA's graphs would: a replay does what was captured, and fails if any address moved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from engine.device_stepper import DeviceStepper
from engine.engine import Engine
from engine.limits import EngineLimits
from engine.link.tokens import Finish, Output, Sampling
from engine.recorded_graphs import RecordedGraphs
from engine.workspace import Workspace
from tests.engine.interpreted.tiny_model import (
    PAGE_BYTES,
    PROMPTS,
    SPEC,
    VOCABULARY,
    WEIGHTS,
    make_engine,
    weights_of,
)
from tests.engine.parking_stage import ParkingStage


def run(engine: Engine, after: Callable[[int], None] | None = None) -> dict[int, list[Output]]:
    found: dict[int, list[Output]] = {}
    steps = 0
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request, []).append(output)
        steps += 1
        assert steps < 500
        if after is not None:
            after(steps)
    engine._pool.check()
    assert engine.statistics().kv_used_bytes == 0
    return found


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def submit(engine: Engine, count: int, sampling: Sampling, prompts: Any = PROMPTS) -> None:
    for index in range(count):
        engine.submit(index, prompts[index], sampling)


def answers(engine: Engine, count: int, sampling: Sampling) -> list[list[int]]:
    submit(engine, count, sampling)
    outputs = run(engine)
    for index in range(count):
        assert [one.finish for one in outputs[index]][-1] is not None
        assert all(one.finish is None for one in outputs[index][:-1])
    return [tokens_of(outputs[index]) for index in range(count)]


@pytest.fixture(scope="module")
def greedy_answers() -> list[list[int]]:
    found = answers(make_engine(device=False), 5, GREEDY)
    assert len({tuple(one) for one in found}) > 1, "a model that always says the same tests nothing"
    return found


GREEDY = Sampling(max_tokens=6, temperature=0.0)


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("captured", [False, True])
def test_tokens_are_those_of_the_reference(
    count: int, captured: bool, greedy_answers: list[list[int]]
) -> None:
    graphs = RecordedGraphs() if captured else None
    engine = make_engine(graphs)
    assert answers(engine, count, GREEDY) == greedy_answers[:count]
    stepper: Any = engine._stepper
    assert stepper.inputs.copies == engine.statistics().steps_total
    assert engine.statistics().discarded_tokens_total == 0
    if graphs is not None:
        # Three buckets are passed through at most: a graph is replayed far more often than made.
        assert graphs.replays >= 3
        assert engine.statistics().stepper.replays == graphs.replays
        assert engine.statistics().stepper.graphs == len(graphs.captured) <= 3
        assert engine.statistics().stepper.capture_s > 0
        assert (
            engine.statistics().stepper.graph_bytes
            == sum(graph.size_bytes for graph in graphs.captured)
            > 0
        )


@pytest.mark.parametrize("captured", [False, True])
def test_within_a_window_what_is_given_back_is_not_missed(captured: bool) -> None:
    """In memory for little more than a window, of which each block serves several requests."""
    spec = replace(SPEC, windows=(5,))
    wanted = answers(make_engine(device=False, spec=spec), 5, GREEDY)
    assert wanted != answers(make_engine(device=False), 5, GREEDY)
    engine = make_engine(
        RecordedGraphs() if captured else None, spec=spec, pages=8, step_tokens=8,
        prefix_cache=False,
    )  # fmt: skip
    assert answers(engine, 5, GREEDY) == wanted
    assert engine.statistics().stepper.graphs > 0 or not captured


def test_over_fp8_it_draws_what_the_reference_does() -> None:
    """Paused and preempted, with NaN wherever nothing was stored."""
    wanted = answers(make_engine(device=False, fp8_kv=True), 5, GREEDY)
    engine = make_engine(RecordedGraphs(), fp8_kv=True, pages=16)
    assert engine.layout.block_bytes < make_engine(device=False).layout.block_bytes * 4
    submit(engine, 5, GREEDY)

    def pause(steps: int) -> None:
        if steps % 4 == 3:
            engine.pause(keep_kv=steps % 8 == 3)
            engine.resume(WEIGHTS)

    outputs = run(engine, pause)
    assert [tokens_of(outputs[index]) for index in range(5)] == wanted


def test_company_and_padding_change_nothing(greedy_answers: list[list[int]]) -> None:
    """Requests of different lengths, so that batches shrink through buckets with padded rows."""
    engine = make_engine(RecordedGraphs())
    for index in range(5):
        engine.submit(index, PROMPTS[index], Sampling(max_tokens=3 + index, temperature=0.0))
    outputs = run(engine)
    for index in range(5):
        own = tokens_of(outputs[index])
        count = min(len(own), 6)
        assert own[:count] == greedy_answers[index][:count]
        assert len(own) == 3 + index


def test_draws_are_the_same_captured_or_not() -> None:
    sampling = Sampling(
        max_tokens=6, temperature=0.9, top_p=0.9, top_k=20, seed=5, presence_penalty=0.4,
        repetition_penalty=1.2, logprobs=2, logit_bias={3: 1.0},
    )  # fmt: skip
    plain = answers(make_engine(), 3, sampling)
    captured = answers(make_engine(RecordedGraphs()), 3, sampling)
    apart = [answers(make_engine(), 1, sampling)[0]]
    assert captured == plain
    assert apart[0] == plain[0]
    assert plain == answers(make_engine(device=False), 3, sampling)


def test_logprobs_come_for_those_that_asked() -> None:
    engine = make_engine(RecordedGraphs())
    engine.submit(0, PROMPTS[1], Sampling(max_tokens=6, temperature=0.0, logprobs=3))
    engine.submit(1, PROMPTS[2], Sampling(max_tokens=6, temperature=0.0))
    outputs = run(engine)
    assert all(len(one.logprobs[0].top) == 3 for one in outputs[0])
    assert all(one.logprobs[0].logprob == one.logprobs[0].top[0][1] for one in outputs[0])
    assert all(not one.logprobs for one in outputs[1])


def test_a_stop_found_a_step_late_sends_no_token_too_many(greedy_answers: list[list[int]]) -> None:
    stop = greedy_answers[1][2]
    place = greedy_answers[1].index(stop)
    engine = make_engine(RecordedGraphs())
    sampling = Sampling(max_tokens=6, temperature=0.0, stop_token_ids=(stop,))
    engine.submit(1, PROMPTS[1], sampling)
    engine.submit(4, PROMPTS[4], GREEDY)
    outputs = run(engine)
    assert tokens_of(outputs[1]) == greedy_answers[1][:place]
    assert [one.finish for one in outputs[1]][-1] is Finish.STOP
    assert tokens_of(outputs[4]) == greedy_answers[4]
    assert engine.statistics().discarded_tokens_total == 1
    assert engine.statistics().generation_tokens_total == place + 6


def test_cancelled_while_computed(greedy_answers: list[list[int]]) -> None:
    engine = make_engine(RecordedGraphs())
    submit(engine, 3, GREEDY)

    def cancel(steps: int) -> None:
        if steps == 4:
            used = engine.statistics().kv_used_bytes
            assert engine.cancel(2)
            assert engine.statistics().kv_used_bytes < used, "KV is free within the step"
            engine.submit(9, PROMPTS[3], GREEDY)

    outputs = run(engine, cancel)
    assert tokens_of(outputs[0]) == greedy_answers[0]
    assert tokens_of(outputs[9]) == greedy_answers[3]
    assert len(tokens_of(outputs[2])) < 6
    engine.submit(0, PROMPTS[0], GREEDY)
    engine.step()
    engine.cancel(0)
    assert engine.has_work, "the step under way has to be waited for"
    assert engine.step() == []
    assert not engine.has_work
    assert engine.statistics().kv_bytes == 0


def test_paused_in_the_middle(greedy_answers: list[list[int]]) -> None:
    """Graphs stay through pauses, since weights come back to where they were."""
    graphs = RecordedGraphs()
    engine = make_engine(graphs)
    submit(engine, 5, GREEDY)

    def pause(steps: int) -> None:
        if steps % 4 == 3:
            engine.pause(keep_kv=steps % 8 == 3)
            assert not any(-1 in request.tokens for request in engine._answers)
            engine.resume(WEIGHTS)

    outputs = run(engine, pause)
    assert [tokens_of(outputs[index]) for index in range(5)] == greedy_answers[:5]
    captured = len(graphs.captured)
    assert answers(engine, 5, GREEDY) == greedy_answers[:5]
    assert len(graphs.captured) == captured


def test_prefixes_are_shared_while_a_step_is_under_way(greedy_answers: list[list[int]]) -> None:
    """Blocks are found that a step still under way writes, but none by a token not yet drawn."""
    engine = make_engine(RecordedGraphs())
    longest = PROMPTS[2]
    for number in range(3):
        engine.submit(number, longest, GREEDY)
    outputs = run(engine)
    assert [tokens_of(outputs[number]) for number in range(3)] == [greedy_answers[2]] * 3
    # The first has the prompt to compute, the others its last token; then each five of its own.
    assert engine.statistics().computed_tokens_total == len(longest) + 2 + 3 * 5
    turn = [*longest, *greedy_answers[2], 3]
    plain = make_engine(device=False, prefix_cache=False)
    plain.submit(3, turn, GREEDY)
    engine.submit(3, turn, GREEDY)
    found = run(engine)[3]
    assert tokens_of(found) == tokens_of(run(plain)[3])
    # 13 tokens and the first five drawn are computed, of which whole blocks have 16.
    assert found[0].cached_tokens == 16
    assert engine.statistics().discarded_tokens_total == 0


def test_weights_elsewhere_are_captured_anew(greedy_answers: list[list[int]]) -> None:
    graphs = RecordedGraphs()
    engine = make_engine(graphs)
    assert answers(engine, 2, GREEDY) == greedy_answers[:2]
    before = len(graphs.captured)
    engine.pause()
    engine.resume(copy.deepcopy(WEIGHTS))
    assert answers(engine, 2, GREEDY) == greedy_answers[:2]
    assert len(graphs.captured) == 2 * before


def test_with_too_few_blocks(greedy_answers: list[list[int]]) -> None:
    engine = make_engine(RecordedGraphs(), pages=7, context_tokens=28)
    sampling = Sampling(max_tokens=12, temperature=0.0)
    wanted = answers(make_engine(device=False, pages=7, context_tokens=28), 5, sampling)
    assert answers(engine, 5, sampling) == wanted
    assert [one[:6] for one in wanted] == greedy_answers


def test_what_gives_way_beside_a_step_is_parked(greedy_answers: list[list[int]]) -> None:
    """The step under way is collected first: its last tokens are parked with the others."""
    stage = ParkingStage(7, PAGE_BYTES)
    limits = EngineLimits(28, running_requests_max=8, prefix_cache=False)
    engine = stage.engine(
        SPEC, WEIGHTS, limits, make_stepper=partial(DeviceStepper, graphs=RecordedGraphs())
    )
    sampling = Sampling(max_tokens=12, temperature=0.0)
    found = answers(engine, 5, sampling)
    assert [one[:6] for one in found] == greedy_answers
    figures = engine.statistics()
    assert figures.preemptions_parked_total == figures.preemptions_total > 0
    assert figures.computed_tokens_total == sum(map(len, PROMPTS)) + 5 * 11
    engine.pause()
    stage.close()


def test_behind_a_gate_nothing_overlaps(greedy_answers: list[list[int]]) -> None:
    class Gate:
        def wait(self, layer: int) -> None:
            if self.shut:
                raise TimeoutError("the weights do not come")

        shut = True

    graphs = RecordedGraphs()
    engine = make_engine(graphs)
    engine.pause()
    gate = Gate()
    engine.resume(WEIGHTS, gate)
    submit(engine, 2, GREEDY)
    with pytest.raises(TimeoutError):
        engine.step()
    gate.shut = False
    first = engine.step()
    assert {output.request: list(output.tokens) for output in first} == {
        0: greedy_answers[0][:1], 1: greedy_answers[1][:1]
    }  # fmt: skip
    assert not graphs.captured
    engine.open_gate()
    outputs = run(engine)
    assert tokens_of(outputs[0]) == greedy_answers[0][1:]
    assert graphs.replays


def test_settling_sends_what_is_under_way(greedy_answers: list[list[int]]) -> None:
    engine = make_engine()
    engine.submit(0, PROMPTS[1], GREEDY)
    assert engine.step() == []
    assert tokens_of(engine.settle()) == greedy_answers[1][:1]
    assert engine.settle() == []
    assert tokens_of(run(engine)[0]) == greedy_answers[1][1:]


@pytest.mark.parametrize("largest_first", [False, True])
def test_engines_of_one_worker_compute_in_one_workspace(largest_first: bool) -> None:
    """Step by step in turn, captured: what one leaves there is nothing to the other."""
    larger = replace(SPEC, vocabulary=2 * VOCABULARY)
    specs = [larger, SPEC] if largest_first else [SPEC, larger]
    sampling = [GREEDY, Sampling(max_tokens=6, temperature=0.9, top_k=9, seed=3)]
    given: list[dict[str, Any]] = [{"spec": spec, "weights": weights_of(spec)} for spec in specs]
    wanted = [
        answers(make_engine(device=False, **shape), 2, how)
        for shape, how in zip(given, sampling, strict=True)
    ]
    graphs, workspace = RecordedGraphs(), Workspace()
    engines = [make_engine(graphs, workspace, **shape) for shape in given]
    for engine, how in zip(engines, sampling, strict=True):
        submit(engine, 2, how)
    found: list[list[Output]] = [[], []]
    while any(engine.has_work for engine in engines):
        for outputs, engine in zip(found, engines, strict=True):
            outputs += engine.step()
    for outputs, tokens in zip(found, wanted, strict=True):
        for request in range(2):
            own = [output for output in outputs if output.request == request]
            assert tokens_of(own) == tokens[request]
    assert graphs.replays
    alone = Workspace()
    make_engine(None, alone, **given[0 if largest_first else 1])
    assert workspace.size_bytes == alone.size_bytes


def test_who_is_penalised_first_has_room_made(greedy_answers: list[list[int]]) -> None:
    """After graphs were captured that know of no occurrences."""
    penalised = Sampling(max_tokens=6, temperature=0.0, repetition_penalty=1.7)
    wanted = answers(make_engine(device=False), 3, penalised)
    assert wanted != greedy_answers[:3]
    graphs = RecordedGraphs()
    engine = make_engine(graphs)
    assert answers(engine, 3, GREEDY) == greedy_answers[:3]
    assert answers(engine, 1, penalised) == wanted[:1]
    assert answers(engine, 3, penalised) == wanted
    assert answers(engine, 3, GREEDY) == greedy_answers[:3]


def test_room_is_made_beside_those_that_are_penalised_already() -> None:
    penalised = Sampling(max_tokens=8, temperature=0.0, frequency_penalty=1.5)
    wanted = answers(make_engine(device=False), 3, penalised)
    engine = make_engine(RecordedGraphs())
    engine.submit(0, PROMPTS[0], penalised)
    found = {0: engine.step() + engine.step() + engine.step()}
    for index in (1, 2):
        engine.submit(index, PROMPTS[index], penalised)
    for request, outputs in run(engine).items():
        found[request] = found.get(request, []) + outputs
    assert [tokens_of(found[index]) for index in range(3)] == wanted
