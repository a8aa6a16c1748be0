"""Whole engines against transformers: the same greedy tokens, whatever happens around a request."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.engine import Engine
from engine.errors import KvTooSmall
from engine.kv_layout import KvLayout
from engine.kv_space import PlainKvSpace, RegionKvSpace
from engine.limits import EngineLimits
from engine.link.tokens import Finish, Sampling
from swap.arena import PagePool, Region
from swap.host_device import HostDevice
from tests.engine.checkpoints import (
    PAGE_BYTES,
    SHAPES,
    VOCABULARY,
    Checkpoint,
    greedy,
    make_engine,
    prompt,
    run,
    tokens_of,
)

Make = Callable[[str], Checkpoint]
NEW_TOKENS = 24
PROMPTS = [prompt(100 + index, length) for index, length in enumerate(
    [1, 5, 31, 32, 33, 64, 70, 3, 90, 2, 40, 17, 8, 55, 32, 1]
)]  # fmt: skip


def assert_greedy(engine: Engine, made: Checkpoint, count: int, first: int = 0) -> None:
    """Run the first `count` of the prompts together and compare each with the oracle."""
    for index in range(count):
        engine.submit(first + index, PROMPTS[index % len(PROMPTS)], greedy(NEW_TOKENS))
    outputs = run(engine)
    for index in range(count):
        expected = made.greedy(PROMPTS[index % len(PROMPTS)], NEW_TOKENS)
        own = outputs[first + index]
        assert tokens_of(own) == expected, index
        assert [output.finish for output in own] == [None] * (NEW_TOKENS - 1) + [Finish.LENGTH]


def crowded_engine(made: Checkpoint) -> Engine:
    """Small blocks, and just enough of them for one of the longest requests."""
    page_bytes = 1 << 13
    pages = KvLayout.choose(made.spec, "float32", page_bytes).pages_for(120)
    return make_engine(made, pages=pages, page_bytes=page_bytes, context_tokens=120)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 8, 32])
def test_greedy_tokens_alone_and_among_others(shape: str, count: int, checkpoint: Make) -> None:
    assert_greedy(make_engine(checkpoint(shape)), checkpoint(shape), count)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step_tokens", [8, 33, 100])
def test_greedy_tokens_with_chunked_prompts(shape: str, step_tokens: int, checkpoint: Make) -> None:
    engine = make_engine(checkpoint(shape), step_tokens=step_tokens, running_requests_max=8)
    assert_greedy(engine, checkpoint(shape), 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_with_too_few_blocks(shape: str, checkpoint: Make) -> None:
    made = checkpoint(shape)
    engine = crowded_engine(made)
    assert_greedy(engine, made, 24)
    # With a window, what requests give back as they go on is enough for the others.
    assert (engine.statistics().preemptions_total > 0) == (made.spec.window_tokens == 0)
    assert engine.statistics().kv_bytes == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_through_pauses(shape: str, checkpoint: Make) -> None:
    """Paused in the middle of prompts and outputs, and resumed with weights at other addresses."""
    made = checkpoint(shape)
    engine = make_engine(made, step_tokens=48, running_requests_max=16)
    for index in range(16):
        engine.submit(index, PROMPTS[index], greedy(NEW_TOKENS))
    tokens: dict[int, list[int]] = {index: [] for index in range(16)}
    steps = 0
    while engine.has_work:
        for output in engine.step():
            tokens[output.request] += output.tokens
        steps += 1
        if steps % 7 == 0:
            engine.pause()
            assert engine.paused
            assert not engine.has_work
            assert engine.step() == []
            assert (engine.running, engine.statistics().kv_bytes) == (0, 0)
            engine.resume({name: weight.clone() for name, weight in made.weights.items()})
    assert tokens == {index: made.greedy(PROMPTS[index], NEW_TOKENS) for index in range(16)}


def test_unused_memory_may_hold_anything(checkpoint: Make) -> None:
    made = checkpoint("llama")
    space = PlainKvSpace(PAGE_BYTES, 40)
    space.memory().view(torch.float32).fill_(float("nan"))
    limits = EngineLimits(256, 16, 64, 40)
    engine = Engine(made.spec, made.weights, space, limits)
    assert_greedy(engine, made, 16)
    engine.pause()
    engine.resume(made.weights)
    space.memory().view(torch.float32).fill_(float("nan"))
    assert_greedy(engine, made, 16, first=100)


def test_over_an_arena_region(checkpoint: Make) -> None:
    """The real memory: pages that come and go, and an address range that faults where none is."""
    made = checkpoint("qwen3")
    device = HostDevice(64 << 20)
    pool = PagePool(device)
    region = Region(pool, "kv", 48 << 20)
    engine = Engine(made.spec, made.weights, RegionKvSpace(region), EngineLimits(256, 32, 64, 64))
    assert_greedy(engine, made, 32)
    assert 0 < region.mapped_pages == engine.trim_cached(pool.total_pages)
    assert pool.free_pages == pool.total_pages
    engine.submit(500, PROMPTS[0], greedy(4))
    engine.step()
    assert region.mapped_pages > 0
    engine.pause()
    assert region.mapped_pages == 0
    engine.resume(made.weights)
    assert tokens_of(run(engine)[500]) == made.greedy(PROMPTS[0], 4)[1:]
    del engine
    region.release()
    device.close()


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_seeded_tokens_are_the_same_in_any_company(shape: str, checkpoint: Make) -> None:
    made = checkpoint(shape)
    sampling = Sampling(max_tokens=20, temperature=0.9, top_p=0.95, seed=1234, presence_penalty=0.3)
    engine = make_engine(made)
    engine.submit(0, PROMPTS[2], sampling)
    alone = tokens_of(run(engine)[0])
    assert alone != made.greedy(PROMPTS[2], 20)
    for seed in range(3):
        chance = random.Random(seed)
        engine = make_engine(made, pages=12, step_tokens=64, running_requests_max=32)
        place = chance.randrange(20)
        for index in range(20):
            if index == place:
                engine.submit(99, PROMPTS[2], sampling)
            engine.submit(index, PROMPTS[index % 16], Sampling(max_tokens=20, seed=index))
        assert tokens_of(run(engine)[99]) == alone
    engine.submit(7, PROMPTS[2], Sampling(max_tokens=20, temperature=0.9, seed=1235))
    assert tokens_of(run(engine)[7]) != alone


def test_how_requests_end(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = make_engine(made)
    expected = made.greedy(PROMPTS[3], 12)
    stop = expected[5]
    first = expected.index(stop)
    engine.submit(1, PROMPTS[3], greedy(12, stop_token_ids=(stop,)))
    engine.submit(2, PROMPTS[3], greedy(12, stop_token_ids=(stop,), min_tokens=12))
    engine.submit(3, PROMPTS[3], greedy(1))
    engine.submit(4, PROMPTS[3], greedy(100_000))
    outputs = run(engine)
    assert tokens_of(outputs[1]) == expected[:first]
    assert (outputs[1][-1].finish, outputs[1][-1].tokens) == (Finish.STOP, ())
    assert stop not in tokens_of(outputs[2])
    assert outputs[2][-1].finish is Finish.LENGTH
    assert tokens_of(outputs[3]) == expected[:1]
    assert len(PROMPTS[3]) + len(tokens_of(outputs[4])) == engine.limits.context_tokens
    assert outputs[4][-1].finish is Finish.LENGTH


def test_end_of_sequence_ends_unless_ignored(checkpoint: Make) -> None:
    made = checkpoint("llama")
    expected = made.greedy(PROMPTS[3], 12)
    unused = next(token for token in range(VOCABULARY) if token not in expected)
    spec = replace(made.spec, eos_token_ids=(unused, expected[4]))
    limits = EngineLimits(256, 8, 8, 64)
    engine = Engine(spec, made.weights, PlainKvSpace(PAGE_BYTES, 20), limits)
    engine.submit(1, PROMPTS[3], greedy(12))
    engine.submit(2, PROMPTS[3], greedy(12, ignore_eos=True))
    outputs = run(engine)
    assert tokens_of(outputs[1]) == expected[: expected.index(expected[4])]
    assert outputs[1][-1].finish is Finish.STOP
    assert tokens_of(outputs[2]) == expected


def test_log_probabilities_travel_with_their_tokens(checkpoint: Make) -> None:
    made = checkpoint("qwen2")
    engine = make_engine(made)
    engine.submit(1, PROMPTS[1], greedy(5, logprobs=3))
    outputs = run(engine)[1]
    sequence = PROMPTS[1] + tokens_of(outputs)
    raw = torch.log_softmax(made.logits(sequence), -1)[len(PROMPTS[1]) - 1 :]
    for index, output in enumerate(outputs):
        (report,) = output.logprobs
        assert report.logprob == pytest.approx(float(raw[index, output.tokens[0]]), abs=1e-4)
        assert [token for token, _ in report.top] == raw[index].topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "why"),
    [
        ([], 5, "no tokens"),
        ([1] * 256, 5, "256 tokens, and the context of 256"),
        ([1, VOCABULARY], 5, "outside the vocabulary of 211"),
        ([1, -1], 5, "outside the vocabulary"),
        ([1], 0, "max_tokens is 0"),
    ],
)
def test_what_cannot_be_run_ends_alone(
    tokens: list[int], max_tokens: int, why: str, checkpoint: Make
) -> None:
    made = checkpoint("llama")
    engine = make_engine(made)
    engine.submit(1, PROMPTS[1], greedy(5))
    engine.submit(2, tokens, greedy(max_tokens))
    outputs = run(engine)
    assert [output.finish for output in outputs[2]] == [Finish.ERROR]
    assert why in outputs[2][0].error
    assert tokens_of(outputs[1]) == made.greedy(PROMPTS[1], 5)


def test_a_full_queue_and_a_number_in_use(checkpoint: Make) -> None:
    engine = make_engine(checkpoint("llama"), waiting_requests_max=2)
    for request in range(3):
        engine.submit(request, PROMPTS[1], greedy(2))
    with pytest.raises(ValueError, match="request 1 is running or waiting already"):
        engine.submit(1, PROMPTS[1], greedy(2))
    outputs = run(engine)
    assert "2 requests wait already" in outputs[2][0].error
    assert [outputs[request][-1].finish for request in (0, 1)] == [Finish.LENGTH] * 2


def test_not_a_number_ends_its_own_request_alone(checkpoint: Make) -> None:
    """A broken row of the embedding reaches only those who have its token."""
    made = checkpoint("llama")
    weights = dict(made.weights)
    weights["embedding"] = weights["embedding"].clone()
    poisoned = next(token for token in range(VOCABULARY) if token not in PROMPTS[1])
    weights["embedding"][poisoned] = float("nan")
    limits = EngineLimits(256, 8, 8, 64)
    engine = Engine(made.spec, weights, PlainKvSpace(PAGE_BYTES, 20), limits)
    engine.submit(1, PROMPTS[1], greedy(6))
    engine.submit(2, [*PROMPTS[1], poisoned], greedy(6))
    engine.submit(3, [poisoned] * 40, Sampling(max_tokens=6))
    outputs = run(engine)
    expected = made.greedy(PROMPTS[1], 6)
    if poisoned not in expected:
        assert tokens_of(outputs[1]) == expected
    for request in (2, 3):
        assert [output.finish for output in outputs[request]] == [Finish.ERROR]
        assert "not a number" in outputs[request][0].error
    engine.submit(4, PROMPTS[1], greedy(2))
    assert tokens_of(run(engine)[4]) == expected[:2], "the blocks they left harm nobody"


def test_cancelling_at_any_time_frees_everything(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = make_engine(made, pages=12, step_tokens=40, running_requests_max=8)
    chance = random.Random(8)
    for index in range(16):
        engine.submit(index, PROMPTS[index], greedy(NEW_TOKENS))
    alive = set(range(16))
    cancelled: set[int] = set()
    tokens: dict[int, list[int]] = {index: [] for index in range(16)}
    while engine.has_work:
        if alive and chance.random() < 0.3:
            gone = chance.choice(sorted(alive))
            assert engine.cancel(gone)
            assert not engine.cancel(gone)
            alive.discard(gone)
            cancelled.add(gone)
        for output in engine.step():
            assert output.request not in cancelled
            tokens[output.request] += output.tokens
            if output.finish:
                alive.discard(output.request)
    assert cancelled
    for index in set(range(16)) - cancelled:
        assert tokens[index] == made.greedy(PROMPTS[index], NEW_TOKENS)
    figures = engine.statistics()
    assert (figures.running, figures.waiting, figures.kv_used_bytes, figures.kv_bytes) == (0,) * 4


def test_cancelling_the_last_one_gives_pages_back_without_a_step(checkpoint: Make) -> None:
    engine = make_engine(checkpoint("llama"))
    engine.submit(1, PROMPTS[5], greedy(50))
    engine.submit(2, [], greedy(50))
    engine.step()
    assert engine.statistics().kv_used_bytes > 0
    assert engine.running_requests == {1}
    engine.cancel(1)
    assert engine.statistics().kv_bytes == 0
    assert not engine.has_work


def test_statistics_count_each_prompt_once(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = crowded_engine(made)
    assert_greedy(engine, made, 16)
    figures = engine.statistics()
    assert figures.preemptions_total > 0
    assert figures.prompt_tokens_total == sum(map(len, PROMPTS))
    assert figures.generation_tokens_total == 16 * NEW_TOKENS


def test_a_context_that_memory_cannot_hold_is_refused_with_the_figure(checkpoint: Make) -> None:
    with pytest.raises(KvTooSmall, match="raise it to") as caught:
        make_engine(checkpoint("llama"), pages=2, context_tokens=512)
    assert caught.value.reason == "INSUFFICIENT_KV"
    assert int(caught.value.metadata["needed_bytes"]) > int(
        caught.value.metadata["available_bytes"]
    )


class ClosingGate:
    """A gate behind which the weights of a layer never come, until it is told otherwise."""

    def __init__(self, layer: int) -> None:
        self.closed: int | None = layer

    def wait(self, layer: int) -> None:
        if layer == self.closed:
            raise TimeoutError("it does not come")


@pytest.mark.parametrize("layer", [-1, 0, 2, 3])
def test_weights_that_do_not_come_cost_no_request(layer: int, checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = make_engine(made, step_tokens=64)
    for index in range(8):
        engine.submit(index, PROMPTS[index], greedy(NEW_TOKENS))
    tokens: dict[int, list[int]] = {index: [] for index in range(8)}
    for _ in range(4):
        for output in engine.step():
            tokens[output.request] += output.tokens
    engine.pause()
    gate = ClosingGate(layer)
    engine.submit(50, [], greedy(1))
    engine.resume(made.weights, gate)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            engine.step()
    gate.closed = None
    refused = 0
    while engine.has_work:
        for output in engine.step():
            if output.request == 50:
                refused += 1
            else:
                tokens[output.request] += output.tokens
    assert refused == 1
    assert tokens == {index: made.greedy(PROMPTS[index], NEW_TOKENS) for index in range(8)}


def test_an_engine_without_weights_waits_for_them(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = Engine(made.spec, None, PlainKvSpace(PAGE_BYTES, 40), EngineLimits(256))
    engine.submit(1, PROMPTS[1], greedy(3))
    assert not engine.has_work
    assert (engine.running, engine.waiting) == (0, 1)
    engine.resume(made.weights)
    assert tokens_of(run(engine)[1]) == made.greedy(PROMPTS[1], 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_its_own_model_closely(dtype: str, checkpoint: Make) -> None:
    """In half precision near ties may fall either way: most first tokens must still agree."""
    made = checkpoint("qwen3")
    kind = getattr(torch, dtype)
    weights = {name: weight.to(kind) for name, weight in made.weights.items()}
    engine = Engine(
        made.spec, weights, PlainKvSpace(PAGE_BYTES, 40), EngineLimits(256), dtype=dtype
    )
    for index, tokens in enumerate(PROMPTS):
        engine.submit(index, tokens, greedy(2))
    outputs = run(engine)
    agreed = sum(
        tokens_of(outputs[index])[0] == made.greedy(tokens, 1)[0]
        for index, tokens in enumerate(PROMPTS)
    )
    assert agreed >= 14
