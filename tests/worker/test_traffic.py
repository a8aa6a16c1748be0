"""Swaps under traffic, many of them: nothing lost, nothing wrong, nothing left behind."""

from __future__ import annotations

import asyncio
import itertools

import psutil
import pytest

from engine.link.control import InFlight
from engine.link.tokens import Finish
from tests.support.worker_stage import GatewaySide, HotbaydSide, WorkerStage, greedy, load
from tests.worker.conftest import Model, serving

STREAMS = 16
EXCHANGES = 50
POLICIES = (InFlight.DRAIN, InFlight.RECOMPUTE, InFlight.PRESERVE)


async def alternate(
    hotbayd: HotbaydSide, models: list[Model], count: int, name: str
) -> dict[str, int]:
    """Exchange the ACTIVE model (the first) for the other one, `count` times."""
    totals = {"finished": 0, "kept": 0, "lost": 0}
    for number in range(count):
        old, new = models[number % 2], models[(number + 1) % 2]
        result = await hotbayd.exchange(
            load(
                new.key,
                new.image,
                f"{name}-{number}",
                outgoing=(old.key,),
                in_flight=POLICIES[number // 2 % 3],
                drain_timeout_s=0.05,
            )
        )
        assert result.error == "", result
        totals["finished"] += result.ledger.requests_finished
        totals["kept"] += result.ledger.requests_kept
        totals["lost"] += result.ledger.requests_lost
        # Let each have its turn with its streams.
        await asyncio.sleep(0.01)
    return totals


async def stream_until(
    gateway: GatewaySide, model: Model, prompt: list[int], stopped: asyncio.Event
) -> int:
    """Send requests one after the other and compare each with the oracle; returns how many."""
    for count in itertools.count(1):
        length = 10 + (prompt[0] + count) % 30
        answer = await gateway.run(model.key, prompt, greedy(length))
        assert (answer.finish, answer.error) == (Finish.LENGTH, "")
        assert answer.tokens == model.expected(prompt, length)
        if stopped.is_set():
            return count
    raise AssertionError


@pytest.mark.slow
def test_fifty_exchanges_under_sixteen_streams_lose_and_mix_nothing(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            stopped = asyncio.Event()
            streams = [
                asyncio.create_task(
                    stream_until(gateway, (prose, code)[number % 2], [number, 7, 1], stopped)
                )
                for number in range(STREAMS)
            ]
            totals = await alternate(hotbayd, [prose, code], EXCHANGES, "traffic")
            stopped.set()
            # Whoever waits for the model that is not there now gets its turn too.
            ending = asyncio.gather(*streams)
            for number in itertools.count():
                if ending.done():
                    break
                await alternate(hotbayd, [prose, code], 2, f"ending-{number}")
            counts = await ending
            assert min(counts) >= 1
            assert sum(counts) > STREAMS
            assert totals["lost"] == 0
            assert totals["kept"] > 0, "some were caught in the middle"
            state = await hotbayd.describe()
            assert all(one.running + one.waiting == 0 for one in state.engines)
            assert all(one.kv_used_bytes == 0 for one in state.engines)

    asyncio.run(run())


def holdings(worker: WorkerStage) -> dict[str, int]:
    process = psutil.Process(worker.pid)
    return {
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children()),
    }


@pytest.mark.slow
def test_after_a_hundred_swaps_everything_is_where_it_was(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            models = [prose, code]

            async def swaps(count: int, name: str) -> None:
                for number in range(count // 2):
                    await alternate(hotbayd, models, 1, f"{name}-{number}-a")
                    await gateway.run(code.key, [number % 50, 2], greedy(2))
                    await alternate(hotbayd, models[::-1], 1, f"{name}-{number}-b")

            await swaps(10, "settle")
            process = psutil.Process(shared_worker.pid)
            state, held = await hotbayd.describe(), holdings(shared_worker)
            resident, mappings = process.memory_info().rss, len(process.memory_maps(False))
            await swaps(100, "count")
            after = await hotbayd.describe()
            assert after.pages_free == state.pages_free
            assert holdings(shared_worker) == held
            # Allocators may keep a little more; a leak would be one of each a swap.
            assert process.memory_info().rss <= resident + (8 << 20)
            assert len(process.memory_maps(False)) <= mappings + 4

    asyncio.run(run())
