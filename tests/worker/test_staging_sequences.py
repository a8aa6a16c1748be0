"""Any sequence of loads, swaps, stagings, unloads and drains: pages add up, promises hold.

After every change of a real worker: free pages and those of all engines are all pages, engines that
were promised KV have it, and whoever is ACTIVE answers with the oracle's tokens.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import msgspec
import pytest

from engine.link import control
from engine.link.control import EngineStatus, InFlight
from tests.support.worker_stage import HotbaydSide, greedy, load, worker_process
from tests.worker.conftest import Model

PAGE_BYTES = 2 << 20
STEPS = 60
TOKENS = 6
CONTEXTS = (256, 4096, 8192)
REFUSED = {"INSUFFICIENT_DEVICE_MEMORY", "INSUFFICIENT_KV", "INVALID_STATE", "MODEL_NOT_FOUND"}
MOVES = ("load", "swap", "swap", "stage", "stage", "unload", "drain", "resume")


def pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES)


def message(draw: random.Random, step: int, models: list[Model], contexts: list[int]) -> object:
    """A random call; many are refused, which must change nothing."""
    first, second = draw.sample(range(len(models)), 2)
    incoming, outgoing = models[first], models[second].key
    move = draw.choice(MOVES)
    policy = draw.choice([InFlight.DRAIN, InFlight.RECOMPUTE, InFlight.ABORT])
    bring = load(
        incoming.key,
        incoming.image,
        f"{step}",
        context_tokens=contexts[first],
        in_flight=policy,
        keep_staged=draw.random() < 0.8,
    )
    if move == "load":
        return bring
    if move == "swap":
        return msgspec.structs.replace(bring, outgoing=(outgoing,))
    if move == "stage":
        assert bring.incoming is not None
        return control.StageWeights(f"{step}", bring.incoming, displace=draw.random() < 0.5)
    if move == "unload":
        return control.Exchange(operation=f"{step}", outgoing=(outgoing,), discard=True)
    return control.Drain(outgoing, policy) if move == "drain" else control.Resume(outgoing)


async def check(hotbayd: HotbaydSide) -> control.WorkerState:
    state = await hotbayd.describe()
    owned = sum(pages(one.weights_bytes) + one.kv_bytes // PAGE_BYTES for one in state.engines)
    assert state.pages_free + owned == state.pages_total
    for one in state.engines:
        if one.spare:
            assert (one.status, one.kv_bytes) == (EngineStatus.STAGED, 0)
        promised = one.status in (EngineStatus.ACTIVE, EngineStatus.STAGED) and not one.spare
        if promised:
            assert one.weights_bytes > 0
            assert one.kv_bytes >= PAGE_BYTES
    return state


@pytest.mark.parametrize(("seed", "memory_pages"), [(1, 3), (2, 5), (3, 8), (4, 12)])
def test_any_sequence_keeps_every_account(
    runtime_dir: Path, prose: Model, code: Model, other: Model, seed: int, memory_pages: int
) -> None:
    async def run() -> None:
        draw, models = random.Random(seed), [prose, code, other]
        contexts = [draw.choice(CONTEXTS) for _ in models]
        promised: dict[str, int] = {}
        done: dict[str, int] = {}
        async with worker_process(runtime_dir, memory_bytes=memory_pages * PAGE_BYTES) as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
            for model in models:
                await hotbayd.attach(model.image)
            for step in range(STEPS):
                before = await check(hotbayd)
                request = message(draw, step, models, contexts)
                reply = await hotbayd.call(request)
                state = await check(hotbayd)
                if isinstance(reply, control.Failed):
                    assert reply.reason in REFUSED, reply
                    serving = [one for one in before.engines if one.status is EngineStatus.ACTIVE]
                    assert {one.model for one in serving} == {
                        one.model for one in state.engines if one.status is EngineStatus.ACTIVE
                    }
                else:
                    assert not isinstance(reply, control.Exchanged) or reply.result.error == ""
                    name = type(request).__name__
                    done[name] = done.get(name, 0) + 1
                for one in state.engines:
                    if one.status is not EngineStatus.ACTIVE:
                        promised.pop(one.model, None)
                        continue
                    # What it was given when it came in is the least it has from then on.
                    least = promised.setdefault(one.model, one.kv_bytes)
                    assert one.kv_bytes >= least
                    model = next(each for each in models if each.key == one.model)
                    prompt = [3, 1, 4, 1, 5, draw.randrange(200)]
                    answer = await gateway.run(one.model, prompt, greedy(TOKENS))
                    assert answer.tokens == model.expected(prompt, TOKENS)
        assert done.get("Exchange", 0) > 2
        assert done.get("StageWeights", 0) > 0

    asyncio.run(run())
