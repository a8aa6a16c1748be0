"""Canaries on a worker: recorded once, tried at every swap, and what other tokens lead to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.canary import Continuation
from engine.link import control
from engine.link.control import CANARY_TOKENS, Canary, EngineStatus
from engine.worker.errors import OptionInvalid
from tests.support.worker_stage import greedy, load, worker_process
from tests.worker.conftest import Model
from tests.worker.preserving import Bench

PROMPT = (3, 1, 4, 1, 5)
"""A canary."""
ASKED = [9, 8, 7, 6, 5, 4]
MIB = 1 << 20


@pytest.fixture
def bench(prose: Model, code: Model) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**values: Any) -> Bench:
        made.append(Bench([prose, code], 12, 64 * MIB, **values))
        return made[-1]

    yield make
    for one in made:
        one.close()


def recorded(one: Bench, model: Model) -> Canary:
    """Bring a model in for the first time; the canary with what it drew."""
    result = one.swap(None, model, canary=Canary(PROMPT))
    assert result.error == ""
    assert result.canary is not None
    assert result.ledger.canary_ms > 0
    return Canary(PROMPT, {result.canary.runtime: result.canary.tokens})


def other(canary: Canary) -> Canary:
    """The same with another token at position 5."""
    ((runtime, tokens),) = canary.expected.items()
    return Canary(canary.prompt, {runtime: (*tokens[:5], tokens[5] + 1, *tokens[6:])})


def test_a_canary_draws_what_the_oracle_does_and_is_tried_again(
    bench: Callable[..., Bench], prose: Model, code: Model
) -> None:
    one = bench()
    canary = recorded(one, prose)
    assert list(*canary.expected.values()) == prose.expected(list(PROMPT), CANARY_TOKENS)
    free = one.pool.free_pages
    ledger = one.swap(prose, code).ledger
    assert ledger.canary_ms == 0, "costs nothing where there is none"
    for keep_staged in (False, True):
        back = one.swap(code, prose, canary=canary, keep_staged=True)
        assert (back.error, back.canary) == ("", None)
        assert back.ledger.canary_ms > 0
        assert (back.ledger.copied_bytes == 0) == keep_staged
        one.swap(prose, code, keep_staged=True)
    one.swap(code, prose)
    assert one.pool.free_pages == free, "no page is taken for it"
    one.finish()


def test_requests_that_wait_are_not_disturbed_by_it(
    bench: Callable[..., Bench], prose: Model, code: Model
) -> None:
    one = bench(link_bytes_per_s=20 * MIB)
    canary = recorded(one, prose)
    running = [one.submit(prose, [*ASKED, number], 40) for number in range(4)]
    one.step(5)
    computed = one.resident(prose).state().computed_tokens_total
    one.swap(prose, code)

    def early() -> None:
        running.append(one.submit(prose, [5, *ASKED], 30))

    assert one.swap(code, prose, canary=canary, during=early).error == ""
    one.run(lambda: not any(one.sent[number].open for number in running))
    needed = sum(len(one.sent[number].prompt) + one.sent[number].count - 1 for number in running)
    state = one.resident(prose).state()
    assert state.computed_tokens_total + state.prefix_hit_tokens_total == needed > computed
    one.finish()


@pytest.mark.parametrize("staged", [False, True])
def test_other_tokens_bring_the_old_model_back_and_say_where(
    bench: Callable[..., Bench], prose: Model, code: Model, staged: bool
) -> None:
    one = bench()
    canary = other(recorded(one, prose))
    kept = one.submit(prose, ASKED, 40)
    one.step(4)
    one.swap(prose, code, keep_staged=staged)
    number = one.submit(code, ASKED, 30)
    one.step(3)
    result = one.swap(code, prose, canary=canary)
    assert (result.error_reason, result.rolled_back) == ("CANARY_FAILED", True)
    assert f"canary of {prose.key} failed: at position 5" in result.error
    assert "matches every checksum" in result.error
    assert "--canary" in result.error
    assert one.active() == [code.key]
    one.run(lambda: not one.sent[number].open)
    # Without a step behind the copy nothing of it is doubtful: what was paused goes on.
    if one.sent[kept].open:
        assert one.swap(code, prose).error == ""
        one.run(lambda: not one.sent[kept].open)
    else:
        assert not staged
    assert one.residency.images[prose.image.digest].being_read is False


def test_a_damaged_host_copy_is_named(
    runtime_dir: Path, prose: Model, code: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.worker import canaries
    from swap.errors import CorruptWeights

    one = Bench([prose, code], 12, 0)
    canary = other(recorded(one, prose))
    one.swap(prose, code)

    def damaged(image: object, stop: object) -> bool:
        raise CorruptWeights("tensor x does not match its checksum")

    monkeypatch.setattr(canaries, "verify_host", damaged)
    result = one.swap(code, prose, canary=canary)
    assert "the host's copy is damaged too (tensor x" in result.error
    assert "--evict" in result.error
    one.close()


@pytest.mark.parametrize("prompt", [(), (1,) * 65, (1, -1), (1, 1 << 20)])
def test_a_prompt_that_cannot_be_tried_is_refused_before_anything_changes(
    bench: Callable[..., Bench], prose: Model, code: Model, prompt: tuple[int, ...]
) -> None:
    one = bench()
    one.swap(None, prose)
    free = one.pool.free_pages
    with pytest.raises(OptionInvalid, match="canary of code@1"):
        one.swap(prose, code, canary=Canary(prompt))
    assert (one.active(), one.pool.free_pages) == ([prose.key], free)
    assert code.key not in one.residency.residents


def test_weights_that_make_no_numbers_have_no_canary(
    bench: Callable[..., Bench], prose: Model, code: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench()
    one.swap(None, code)
    monkeypatch.setattr(Continuation, "_next", lambda self, computed: None)
    result = one.swap(code, prose, canary=Canary(PROMPT))
    assert result.error_reason == "CANARY_FAILED"
    assert "position 0 the model's output is not a number" in result.error
    assert one.active() == [code.key]


def test_a_canary_in_a_process(runtime_dir: Path, prose: Model, code: Model) -> None:
    async def run() -> None:
        async with worker_process(runtime_dir) as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
            for model in (prose, code):
                await hotbayd.attach(model.image)
            first = msgspec.structs.replace(load(prose.key, prose.image), canary=Canary(PROMPT))
            record = (await hotbayd.exchange(first)).canary
            assert record is not None
            assert (await hotbayd.exchange(swap(prose, code, "1"))).error == ""
            stream = gateway.submit(code.key, ASKED, greedy(100))
            await gateway.begun(stream)
            wrong = other(Canary(PROMPT, {record.runtime: record.tokens}))
            back = msgspec.structs.replace(swap(code, prose, "2"), canary=wrong)
            result = await hotbayd.exchange(back)
            assert (result.error_reason, result.canary) == ("CANARY_FAILED", None)
            assert (await gateway.ended(stream)).tokens == code.expected(ASKED, 100)
            state = await hotbayd.describe()
            active = [one.model for one in state.engines if one.status is EngineStatus.ACTIVE]
            assert active == [code.key]
            await worker.clear()

    def swap(old: Model, new: Model, operation: str) -> control.Exchange:
        return load(new.key, new.image, operation, outgoing=(old.key,))

    asyncio.run(run())
