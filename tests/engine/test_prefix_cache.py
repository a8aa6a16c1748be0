"""Prefixes computed once: the same tokens, less computed, nothing shared that must not be."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from engine.block_copies import BlockCopies
from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.kv_layout import KvLayout
from engine.kv_space import PlainKvSpace
from engine.limits import EngineLimits
from engine.link.tokens import Finish, Sampling
from engine.prefix_keys import PrefixKeys
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
LONG = prompt(7, 100)
NEW_TOKENS = 12


def computed(engine: Engine) -> int:
    return engine.statistics().computed_tokens_total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step_tokens", [24, 512])
def test_a_hit_brings_the_same_tokens(shape: str, step_tokens: int, checkpoint: Make) -> None:
    made = checkpoint(shape)
    engine = make_engine(made, step_tokens=step_tokens, running_requests_max=8)
    size = engine.layout.block_tokens
    prompts = [LONG, [*LONG[: 2 * size], *prompt(8, 9)], LONG[: 2 * size], LONG[: size + 5], LONG]
    for number, tokens in enumerate(prompts):
        engine.submit(number, tokens, greedy(NEW_TOKENS))
        outputs = run(engine)[number]
        assert tokens_of(outputs) == made.greedy(tokens, NEW_TOKENS)
        cached = [output.cached_tokens for output in outputs]
        assert cached[1:] == [0] * (len(cached) - 1)
        # Whole blocks only, the last token never; the same prompt again, all but that token.
        assert cached[0] == (0, 2 * size, size, size, len(LONG) - 1)[number]
    figures = engine.statistics()
    assert figures.prefix_lookup_tokens_total == sum(map(len, prompts))
    assert figures.prefix_hit_tokens_total == 4 * size + len(LONG) - 1
    needed = figures.prefix_lookup_tokens_total + len(prompts) * (NEW_TOKENS - 1)
    assert figures.computed_tokens_total == needed - figures.prefix_hit_tokens_total
    assert (figures.kv_used_bytes, figures.kv_bytes) == (0, 0), "what is cached counts as free"
    assert figures.cached_bytes > 0


def test_what_was_answered_is_found_in_the_next_turn(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = make_engine(made)
    size = engine.layout.block_tokens
    engine.submit(1, LONG[:size], greedy(2 * size))
    answer = tokens_of(run(engine)[1])
    turn = [*LONG[:size], *answer, 5, 6]
    engine.submit(2, turn, greedy(4))
    outputs = run(engine)[2]
    assert tokens_of(outputs) == made.greedy(turn, 4)
    # The last token of the answer was drawn, and never computed.
    assert outputs[0].cached_tokens == 2 * size


def test_off_means_off(checkpoint: Make) -> None:
    engine = make_engine(checkpoint("llama"), prefix_cache=False)
    for number in range(2):
        engine.submit(number, LONG, greedy(2))
        assert run(engine)[number][0].cached_tokens == 0
    figures = engine.statistics()
    assert figures.computed_tokens_total == 2 * (len(LONG) + 1)
    assert (figures.prefix_lookup_tokens_total, figures.cached_bytes) == (0, 0)


def test_salts_share_nothing(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = make_engine(made)
    for number, salt in enumerate(["", "one", "two"]):
        engine.submit(number, LONG, greedy(4), 0, salt)
    outputs = run(engine)
    assert computed(engine) == 3 * (len(LONG) + 3)
    for number in range(3):
        assert tokens_of(outputs[number]) == made.greedy(LONG, 4)
        assert outputs[number][0].cached_tokens == 0
    for number, salt, hit in ((3, "three", 0), (4, "one", 99), (5, "", 99), (6, "two", 99)):
        engine.submit(number, LONG, greedy(4), 0, salt)
        assert run(engine)[number][0].cached_tokens == hit


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 34, 64, 65, 100])
@pytest.mark.parametrize("step_tokens", [16, 512])
def test_samples_of_one_prompt_compute_it_once(
    length: int, step_tokens: int, checkpoint: Make
) -> None:
    """The last block is copied and not shared: each sample goes on writing to its own."""
    made = checkpoint("llama")
    engine = make_engine(made, step_tokens=step_tokens, running_requests_max=8)
    tokens, samples = LONG[:length], 6
    alone = []
    for seed in range(samples):
        sampling = Sampling(max_tokens=8, temperature=1.5, seed=seed)
        reference = make_engine(made, prefix_cache=False)
        reference.submit(0, tokens, sampling)
        alone.append(tokens_of(run(reference)[0]))
        engine.submit(seed, tokens, sampling)
    outputs = run(engine)
    assert [tokens_of(outputs[seed]) for seed in range(samples)] == alone
    assert len({tuple(one) for one in alone}) > 1
    assert computed(engine) == length + (samples - 1) + samples * 7
    assert engine.statistics().kv_used_bytes == 0


def test_a_sample_whose_leader_is_cancelled_goes_on_by_itself(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = make_engine(made, step_tokens=8, running_requests_max=8)
    for number in range(3):
        engine.submit(number, LONG, greedy(4))
    for _ in range(3):
        engine.step()
    assert (engine.running, engine.waiting) == (1, 2)
    engine.cancel(0)
    outputs = run(engine)
    for number in (1, 2):
        assert tokens_of(outputs[number]) == made.greedy(LONG, 4)


def test_cached_blocks_give_way_before_anything_is_refused(checkpoint: Make) -> None:
    made = checkpoint("llama")
    page_bytes = 1 << 13
    pages = KvLayout.choose(made.spec, "float32", page_bytes).pages_for(120)
    engine = make_engine(made, pages=pages, page_bytes=page_bytes, context_tokens=120)
    for number in range(8):
        tokens = prompt(50 + number, 100)
        engine.submit(number, tokens, greedy(20))
        assert tokens_of(run(engine)[number]) == made.greedy(tokens, 20)
    assert engine.statistics().preemptions_total == 0
    # All of the memory is the request's: there is no block to copy from beside it.
    engine.submit(9, prompt(57, 100), greedy(20))
    assert tokens_of(run(engine)[9]) == made.greedy(prompt(57, 100), 20)


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@pytest.mark.parametrize("seed", [1, 2])
def test_shuffled_preempted_paused_and_shared(shape: str, seed: int, checkpoint: Make) -> None:
    """Whatever happens around a request, its tokens are transformers'."""
    made = checkpoint(shape)
    chance = random.Random(seed)
    page_bytes = 1 << 13
    pages = KvLayout.choose(made.spec, "float32", page_bytes).pages_for(150)
    engine = make_engine(
        made,
        pages=pages,
        page_bytes=page_bytes,
        context_tokens=140,
        step_tokens=chance.choice([16, 48]),
        running_requests_max=8,
    )
    ends = [[], [1], [2, 3], prompt(5, 20)]
    prompts = [LONG[:length] + end for length in (20, 64, 90) for end in ends] * 2
    chance.shuffle(prompts)
    for number, tokens in enumerate(prompts):
        engine.submit(number, tokens, greedy(NEW_TOKENS), chance.choice([0, 0, 1]))
    tokens: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    steps = 0
    while engine.has_work:
        steps += 1
        for output in engine.step():
            assert output.finish in (None, Finish.LENGTH)
            tokens[output.request] += output.tokens
        if steps % 20 == 0:
            engine.pause(keep_kv=steps % 40 == 0)
            engine.resume(made.weights)
    for number, given in enumerate(prompts):
        assert tokens[number] == made.greedy(given, NEW_TOKENS)
    figures = engine.statistics()
    assert figures.preemptions_total > 0
    assert figures.prefix_hit_tokens_total > 0
    assert figures.kv_used_bytes == 0


def test_what_led_to_no_number_is_not_handed_on(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = make_engine(made)
    weights = dict(made.weights)
    weights["embedding"] = weights["embedding"].clone()
    poisoned = next(token for token in range(VOCABULARY) if token not in LONG)
    weights["embedding"][poisoned] = float("nan")
    engine.pause()
    engine.resume(weights)
    for number in (1, 2):
        engine.submit(number, [poisoned, *LONG], greedy(3))
        (output,) = run(engine)[number]
        assert (output.finish, output.cached_tokens) == (Finish.ERROR, 0)
        assert engine.statistics().cached_bytes == 0
    assert engine.statistics().prefix_hit_tokens_total == 0


def test_a_pause_that_keeps_nothing_forgets_all(checkpoint: Make) -> None:
    made = checkpoint("llama")
    engine = make_engine(made)
    engine.submit(1, LONG, greedy(2))
    run(engine)
    engine.pause(keep_kv=False)
    engine.resume(made.weights)
    engine.submit(2, LONG, greedy(2))
    assert run(engine)[2][0].cached_tokens == 0


def test_keys_depend_on_all_that_comes_before_and_on_the_secret() -> None:
    def keys(secret: bytes, salt: str, tokens: list[int]) -> list[bytes]:
        found: list[bytes] = []
        PrefixKeys(secret, 4).extend(found, salt, tokens, len(tokens) // 4)
        return found

    tokens = list(range(12))
    base = keys(b"s", "", tokens)
    assert len(set(base)) == 3
    assert keys(b"s", "", tokens) == base
    assert keys(b"s", "", [*tokens[:8], 0, 0, 0, 0])[:2] == base[:2]
    assert not set(keys(b"s", "", [9, *tokens[1:]])) & set(base)
    assert not set(keys(b"s", "x", tokens)) & set(base)
    assert not set(keys(b"t", "", tokens)) & set(base)
    made = PrefixKeys(b"s", 4)
    assert made.tail(base[:2], "", tokens[8:]) not in base
    assert made.tail([], "", [1]) != made.tail([], "x", [1])


def test_blocks_are_copied_whole_and_alone(checkpoint: Make) -> None:
    layout = KvLayout.choose(checkpoint("llama").spec, "float32", PAGE_BYTES)
    count, rest = layout.blocks_per_page, layout.page_bytes % layout.block_bytes
    assert (count, rest > 0) == (2, True)
    memory = PlainKvSpace(PAGE_BYTES, 3).memory()
    memory.random_(0, 255)
    before = memory.clone()
    copies = BlockCopies(layout, memory)
    copies.copy([])
    assert memory.equal(before)
    copies.copy([(0, count + 1), (1, 2 * count)])

    def rows(of: torch.Tensor, page: int, place: int) -> torch.Tensor:
        # [layer][K, V][block][head][slot][dim]
        used = of.view(3, -1)[page, : PAGE_BYTES - rest]
        return used.view(2 * layout.layers, count, -1)[:, place]

    assert rows(memory, 1, 1).equal(rows(before, 0, 0))
    assert rows(memory, 2, 0).equal(rows(before, 0, 1))
    rows(memory, 1, 1)[:] = rows(before, 1, 1)
    rows(memory, 2, 0)[:] = rows(before, 2, 0)
    assert memory.equal(before), "nothing else was touched"


def test_the_least_recently_used_goes_first_and_what_is_free_before_it() -> None:
    space = PlainKvSpace(1 << 16, 3)
    pool = BlockPool(space, 2)
    blocks = pool.take(4)
    assert blocks == [0, 1, 2, 3]
    for block in blocks:
        pool.name(b"%d" % block, block)
    pool.name(b"0", 3)
    assert pool.find(b"0") == 0, "the first to have a name keeps it"
    pool.give_back([2, 0, 1])
    assert (pool.used, pool.idle, pool.pages_held) == (1, 3, 2)
    pool.share([2])  # used again, so that it is forgotten last
    pool.give_back([2])
    assert pool.take(3) == [0, 4, 5]
    assert pool.find(b"0") is None
    pool.share([3])
    pool.give_back([3])
    assert pool.holds(3) == 1
    assert pool.take(3) is None
    pool.give_back([4, 5])
    pool.check()
    assert (pool.trim_empty(), pool.trim(0)) == (1, 0)
    pool.give_back([3, 0])
    assert (pool.trim_empty(), pool.trim(1), pool.trim()) == (0, 1, 1)
    assert (pool.find(b"1"), pool.idle, space.pages) == (None, 0, 0)
    with pytest.raises(ValueError, match="block 1 is neither held nor idle"):
        pool.share([1])
    with pytest.raises(ValueError, match="is not held"):
        pool.name(b"x", 1)


def test_others_pages_are_asked_for_only_after_what_is_cached() -> None:
    class Space(PlainKvSpace):
        taken = 0

        def grow(self, count: int) -> int:
            free = min(count, self.free_pages)
            grown = super().grow(free)
            if grown < count:
                others = min(count - grown, self.pages_max - self.pages)
                self.taken += others
                self.pages += others
                grown += others
            return grown

    space = Space(1 << 16, 4)
    space.pages_available = 2
    pool = BlockPool(space, 2)
    blocks = pool.take(4)
    assert blocks is not None
    for block in blocks:
        pool.name(b"%d" % block, block)
    pool.give_back(blocks)
    assert pool.take(4) is not None
    assert (space.taken, pool.idle) == (0, 0)
    assert pool.take(1) is not None
    assert space.taken > 0


@pytest.mark.parametrize("shape", ["llama"])
def test_one_request_alone_hears_that_it_does_not_fit(shape: str, checkpoint: Make) -> None:
    made = checkpoint(shape)
    page_bytes = 1 << 13
    layout = KvLayout.choose(made.spec, "float32", page_bytes)
    space = PlainKvSpace(page_bytes, layout.pages_for(256))
    engine = Engine(made.spec, made.weights, space, EngineLimits(256, 8, 8, 64))
    space.pages_available = layout.pages_for(64)
    engine.submit(1, LONG, greedy(4))
    engine.submit(2, LONG[:20], greedy(4))
    outputs = run(engine)
    (refused,) = outputs[1]
    assert refused.finish is Finish.ERROR
    assert f"its 100 tokens take {layout.blocks_for(100) * layout.block_bytes}" in refused.error
    assert tokens_of(outputs[2]) == made.greedy(LONG[:20], 4)
