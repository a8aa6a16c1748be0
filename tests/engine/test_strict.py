"""Strict engines: the same bits alone, in any company, in any chunks, preempted, swapped.

Logits are noted as they reach the sampler. The same matrix without `strict` must show differences,
or it would compare nothing that can differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

import engine.stepper as stepper_module
from engine.engine import Engine
from engine.kernels.reference.dense import choose_linear
from engine.kernels.strict import STRICT_ROWS, of_fixed_rows
from engine.kv_layout import KvLayout
from engine.limits import STRICT_STEP_TOKENS_MAX, EngineLimits
from engine.request import Request
from engine.sampler import Draw, sample
from tests.engine.checkpoints import (
    Checkpoint,
    greedy,
    make_engine,
    prompt,
    run,
    tokens_of,
)

Make = Callable[[str], Checkpoint]
NEW_TOKENS = 6
PROBE, OTHERS = prompt(7, 45), [prompt(200 + index, 1 + 7 * index % 60) for index in range(63)]
PROBE_ID = 1000
PAGE_BYTES = 1 << 13
"""Small blocks, so that few of them make requests give way."""


@dataclass
class Noted:
    """Logits of the probe, by how many tokens it had; doing one again must bring the same."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, logits: torch.Tensor, requests: list[Request]) -> list[Draw]:
        for row, request in zip(logits, requests, strict=True):
            if request.id == PROBE_ID:
                self.logits[len(request.tokens)] = row.clone()
        return sample(logits, requests)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    noted = Noted()
    monkeypatch.setattr(stepper_module, "sample", noted)
    return noted


def engine_of(
    made: Checkpoint, *, strict: bool, pages: int = 1500, step_tokens: int = 512
) -> Engine:
    limits = {"running_requests_max": 64, "step_tokens": step_tokens, "context_tokens": 120}
    return make_engine(made, pages=pages, page_bytes=PAGE_BYTES, strict=strict, **limits)


def company(engine: Engine, others: int, place: int, order: list[int]) -> list[int]:
    """Run the probe among others, submitted at `place`; returns its tokens."""
    for number, index in enumerate([*order[:others], -1]):
        if number == place:
            engine.submit(PROBE_ID, PROBE, greedy(NEW_TOKENS))
        if index >= 0:
            engine.submit(index, OTHERS[index], greedy(NEW_TOKENS))
    return tokens_of(run(engine)[PROBE_ID])


def matrix(made: Checkpoint, noted: Noted, *, strict: bool) -> Iterator[tuple[str, object]]:
    """(how, tokens and logits) of every way to compute the probe."""

    def ended(how: str, tokens: list[int]) -> tuple[str, object]:
        found, noted.logits = noted.logits, {}
        return how, (tokens, found)

    order = list(range(63))
    for others in (0, 1, 7, 63):
        yield ended(f"among {others}", company(engine_of(made, strict=strict), others, 0, order))
    random.Random(3).shuffle(order)
    yield ended("shuffled", company(engine_of(made, strict=strict), 63, 40, order))
    for chunk in (64, 70):
        engine = engine_of(made, strict=strict, step_tokens=chunk)
        yield ended(f"chunks of {chunk}", company(engine, 7, 5, order))
    pages = KvLayout.choose(made.spec, "float32", PAGE_BYTES).pages_for(120)
    small = engine_of(made, strict=strict, pages=pages)
    small.submit(PROBE_ID, PROBE, greedy(NEW_TOKENS), priority=1)
    tokens = [token for _ in range(3) for token in tokens_of(small.step())]
    small.submit(0, prompt(9, 100), greedy(NEW_TOKENS))
    yield ended("preempted", [*tokens, *tokens_of(run(small)[PROBE_ID])])
    assert small.statistics().preemptions_total == 1
    swapped = engine_of(made, strict=strict)
    swapped.submit(PROBE_ID, PROBE, greedy(NEW_TOKENS))
    tokens = []
    for step in range(3):
        tokens += tokens_of(swapped.step())
        swapped.pause(keep_kv=step == 1)
        swapped.resume({name: weight.clone() for name, weight in made.weights.items()})
    yield ended("swapped", [*tokens, *tokens_of(run(swapped)[PROBE_ID])])


def differing(first: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> int:
    assert first.keys() == other.keys()
    return sum(not torch.equal(first[place], other[place]) for place in first)


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_the_same_bits_in_any_company(shape: str, checkpoint: Make, noted: Noted) -> None:
    made = checkpoint(shape)
    results = list(matrix(made, noted, strict=True))
    tokens, logits = results[0][1]
    assert tokens == made.greedy(PROBE, NEW_TOKENS)
    assert len(logits) == NEW_TOKENS
    for how, (own, found) in results[1:]:
        assert own == tokens, how
        assert differing(logits, found) == 0, how


def test_by_default_the_same_tokens_and_other_bits(checkpoint: Make, noted: Noted) -> None:
    made = checkpoint("llama")
    results = list(matrix(made, noted, strict=False))
    tokens, logits = results[0][1]
    assert all(own == tokens for _, (own, _) in results)
    assert sum(differing(logits, found) for _, (_, found) in results[1:]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_fixed_rows(dtype: torch.dtype) -> None:
    linear = choose_linear(dtype, torch.device("cpu"))
    fixed = of_fixed_rows(linear, STRICT_ROWS["cpu"])
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(70, 96, generator=generator).to(dtype)
    weight = torch.randn(48, 96, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    whole = fixed(rows, weight, bias)
    torch.testing.assert_close(whole, torch.nn.functional.linear(rows, weight, bias))
    for first, count in ((0, 1), (3, 2), (5, 16), (9, 17), (1, 60)):
        part = fixed(rows[first : first + count], weight, bias)
        assert torch.equal(part, whole[first : first + count])
    assert fixed(rows[:0], weight).shape == (0, 48)
    columns = rows[:16].t().contiguous().t()
    assert torch.equal(fixed(columns, weight, bias), whole[:16])
    assert fixed(columns, weight).is_contiguous()


def test_steps_of_a_strict_engine_are_bounded() -> None:
    EngineLimits(128, step_tokens=STRICT_STEP_TOKENS_MAX, strict=True)
    with pytest.raises(ValueError, match="step_tokens"):
        EngineLimits(128, step_tokens=STRICT_STEP_TOKENS_MAX + 1, strict=True)
