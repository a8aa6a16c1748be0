"""Engines whose keys and values are stored as FP8: close to what is computed without, and the same
tokens whatever happens around a request.

Bounds are of models with random weights, whose attention looks everywhere at once and whose logits
lie close together: real ones lose less.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.engine import Engine
from engine.kernels.protocol import Span
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kv_layout import KvLayout
from engine.kv_space import PlainKvSpace, RegionKvSpace
from engine.limits import EngineLimits
from engine.link.control import EngineSpec
from engine.models.decoder import Decoder, OpenGate
from engine.parking import KvLane
from engine.worker.measures import kv_pages_min, limits_of
from swap.arena import PagePool, Region
from swap.host_device import HostDevice
from swap.parking import ParkingArea
from tests.engine.checkpoints import (
    SHAPES,
    Checkpoint,
    greedy,
    make_engine,
    prompt,
    run,
    tokens_of,
)
from tests.support.worker_stage import build_segment

Make = Callable[[str], Checkpoint]
NO_NUMBER = 0x7F
PAGE_BYTES = 1 << 12
LONG = prompt(7, 90)
NEW_TOKENS = 16
LOGITS_ERROR_MAX, LOGITS_ERROR_MEAN = 1.5, 0.1
"""Of a logit, over the standard deviation of all. It is FP8's own: scales 128 times as large bring
the same, and a quarter of them no numbers."""
SHORT_OF_BEST_MAX = 1.0
"""How far a drawn token's logit in full precision may lie below the best one's, over the same."""


def logits(made: Checkpoint, tokens: list[int], *, fill: int = NO_NUMBER) -> torch.Tensor:
    """The logits after each token, over FP8; `fill` is in every byte of memory before."""
    layout = KvLayout.choose(made.spec, "float32", 1 << 16, fp8=True)
    memory = torch.full((20 << 16,), fill, dtype=torch.uint8)
    kernels = ReferenceKernels(made.spec, layout, memory)
    decoder = Decoder(made.spec, made.weights, kernels, OpenGate())
    blocks = [7 * block % 19 for block in range(layout.blocks_for(len(tokens)))]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tokens), 30):
            own = torch.tensor(tokens[start : start + 30])
            plan = kernels.plan([Span(start, len(own), blocks)], start + torch.arange(len(own)))
            parts.append(decoder.forward(own, plan, torch.arange(len(own))))
    return torch.cat(parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_close_to_those_in_full_precision(shape: str, checkpoint: Make) -> None:
    made = checkpoint(shape)
    expected = made.logits(LONG)
    found = logits(made, LONG)
    error = (found - expected).abs() / expected.std()
    assert 1e-3 < error.mean() < LOGITS_ERROR_MEAN
    assert error.max() < LOGITS_ERROR_MAX
    assert torch.equal(logits(made, LONG, fill=0), found), "what is not used changes nothing"


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_as_good_as_the_best_in_full_precision(shape: str, checkpoint: Make) -> None:
    made = checkpoint(shape)
    engine = make_engine(made, fp8_kv=True, step_tokens=40, running_requests_max=8)
    prompts = [LONG, LONG[:33], prompt(9, 5)]
    for number, tokens in enumerate(prompts):
        engine.submit(number, tokens, greedy(NEW_TOKENS))
    outputs = run(engine)
    same = 0
    for number, tokens in enumerate(prompts):
        drawn = tokens_of(outputs[number])
        plain = made.logits([*tokens, *drawn])[len(tokens) - 1 : -1]
        short = plain.amax(dim=1) - plain[torch.arange(NEW_TOKENS), drawn]
        assert short.max() < SHORT_OF_BEST_MAX * plain.std()
        same += int((short == 0).sum())
    assert same > 0.7 * len(prompts) * NEW_TOKENS


def strict_engine(made: Checkpoint, pages: int, space: RegionKvSpace | None = None) -> Engine:
    limits = EngineLimits(120, 8, 64, 24, fp8_kv=True, strict=True)
    chosen = space if space is not None else PlainKvSpace(PAGE_BYTES, pages)
    if space is None:
        chosen.memory().fill_(NO_NUMBER)
    return Engine(made.spec, made.weights, chosen, limits)


def alone(made: Checkpoint, tokens: list[int]) -> list[int]:
    engine = strict_engine(made, 200)
    engine.submit(0, tokens, greedy(NEW_TOKENS))
    return tokens_of(run(engine)[0])


PROMPTS = [LONG, LONG, LONG[:60], [*LONG[:60], 3, 4], LONG[:31], prompt(11, 40), prompt(12, 90)]


@pytest.mark.parametrize("shape", ["llama", "qwen3", "mistral-window"])
def test_preempted_paused_and_shared_the_tokens_are_the_same(shape: str, checkpoint: Make) -> None:
    made = checkpoint(shape)
    expected = [alone(made, tokens) for tokens in PROMPTS]
    engine = strict_engine(made, 20)
    for number, tokens in enumerate(PROMPTS):
        engine.submit(number, tokens, greedy(NEW_TOKENS))
    tokens: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}
    steps = 0
    while engine.has_work:
        for output in engine.step():
            assert not output.error
            tokens[output.request] += output.tokens
        steps += 1
        if steps % 12 == 0:
            engine.pause(keep_kv=steps % 24 == 0)
            engine.resume({name: weight.clone() for name, weight in made.weights.items()})
    assert [tokens[number] for number in range(len(PROMPTS))] == expected
    figures = engine.statistics()
    assert figures.preemptions_total > 0
    assert figures.prefix_hit_tokens_total > 0


def test_parked_it_takes_less_and_comes_back(checkpoint: Make) -> None:
    made = checkpoint("llama")
    device = HostDevice(8 << 20)
    region = Region(PagePool(device), "kv", 4 << 20)
    engine = strict_engine(made, 0, RegionKvSpace(region))
    area = ParkingArea(1 << 20)
    engine.lane = KvLane(device, area, engine.layout, region.address)
    engine.submit(0, LONG, greedy(NEW_TOKENS))
    tokens: list[int] = []
    for _ in range(7):
        tokens += [token for output in engine.step() for token in output.tokens]
    engine.pause(keep_kv=True)
    vacating = engine.vacate(engine._pool.pages)
    vacating.copy(lambda: None)
    vacating.release()
    assert region.mapped_pages == 0
    spec = made.spec
    blocks = engine.layout.blocks_for(len(LONG) + len(tokens) - 1)
    in_block = engine.layout.block_tokens * spec.kv_bytes_per_token("float32") // 4
    assert area.used_bytes == blocks * in_block
    engine.resume(made.weights)
    tokens += tokens_of(run(engine)[0])
    assert tokens == alone(made, LONG)
    del engine
    region.release()
    device.close()


def test_a_block_takes_half_or_a_quarter(checkpoint: Make) -> None:
    spec = checkpoint("llama").spec
    for dtype, times in (("bfloat16", 2), ("float32", 4)):
        plain = KvLayout.choose(spec, dtype, 1 << 16)
        narrow = KvLayout.choose(spec, dtype, 1 << 16, fp8=True)
        assert narrow.block_tokens == plain.block_tokens
        assert narrow.block_bytes * times == plain.block_bytes
        assert narrow.blocks_per_page >= times * plain.blocks_per_page
        assert narrow.stored_dtype == "float8_e4m3fn"
        assert plain.stored_dtype == dtype


def test_a_model_is_asked_for_as_fp8_and_is_promised_less(checkpoint: Make) -> None:
    made = checkpoint("llama")
    built = build_segment(made.directory)

    def spec(kv_dtype: str) -> EngineSpec:
        return EngineSpec("a", built.digest, 512, 8, 8, kv_dtype=kv_dtype)  # type: ignore[arg-type]

    def pages(kv_dtype: str) -> int:
        return kv_pages_min(spec(kv_dtype), built.manifest, PAGE_BYTES, 64)

    assert pages("auto") == 4 * pages("fp8") > 0
    for kv_dtype in ("auto", "fp8"):
        limits = limits_of(spec(kv_dtype), 64, prefix_cache=True)
        assert limits.fp8_kv == (kv_dtype == "fp8")
    built.segment.close()
