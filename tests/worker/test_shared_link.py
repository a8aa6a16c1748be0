"""Workers whose boards share a link: a swap waits for its turn, and the worker serves meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from engine.link.control import Stage
from swap.shared_link import SharedLink
from tests.support.worker_stage import WorkerStage, greedy, load, worker_process
from tests.worker.conftest import Model, serving

PROMPT = [5, 9, 101, 44, 7]
LINK = "0000:10:00.0"


@asynccontextmanager
async def link_taken(runtime_dir: Path) -> AsyncIterator[None]:
    """Have the link, as a swap of another worker has it."""
    turn = SharedLink(runtime_dir / "links" / LINK).turn()
    await asyncio.to_thread(turn.take, threading.Event())
    assert not turn.missed
    try:
        yield
    finally:
        turn.end()


def test_a_swap_waits_for_the_link_while_its_worker_serves(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with (
            worker_process(runtime_dir, "--link", LINK) as worker,
            serving(worker, prose, code) as (hotbayd, gateway),
        ):
            async with link_taken(runtime_dir):
                loading = asyncio.create_task(hotbayd.exchange(load(code.key, code.image, "op")))
                await hotbayd.stage("op", Stage.COPYING)
                # A request for what comes in waits for it; one for what is there does not.
                early = gateway.submit(code.key, PROMPT, greedy(5))
                answer = await gateway.run(prose.key, PROMPT, greedy(20))
                assert answer.tokens == prose.expected(PROMPT, 20)
                assert not loading.done()
            ledger = (await loading).ledger
            assert ledger.link_wait_ms > 0
            assert not ledger.link_missed
            assert ledger.copied_bytes == code.image.manifest.weights_bytes
            assert (await gateway.ended(early)).tokens == code.expected(PROMPT, 5)

    asyncio.run(run())


def test_a_swap_that_waits_for_the_link_goes_on_in_the_end(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with (
            worker_process(runtime_dir, "--link", LINK, "--link-wait-s", "0.5") as worker,
            serving(worker, prose, code) as (hotbayd, gateway),
        ):
            swap = load(code.key, code.image, "late", outgoing=(prose.key,))
            async with link_taken(runtime_dir):
                result = await hotbayd.exchange(swap)
            assert result.error == ""
            assert result.ledger.link_missed
            assert result.ledger.link_wait_ms >= 500
            assert result.ledger.copy_ms < result.ledger.total_ms - 500
            answer = await gateway.run(code.key, PROMPT, greedy(5))
            assert answer.tokens == code.expected(PROMPT, 5)

    asyncio.run(run())


def test_two_workers_take_turns(runtime_dir: Path, prose: Model, code: Model) -> None:
    async def swaps(
        worker: WorkerStage, own: Model, other: Model, meet: asyncio.Barrier
    ) -> list[float]:
        async with serving(worker, own, other) as (hotbayd, gateway):
            here, away, waited = own, other, []
            for number in range(3):
                await meet.wait()
                request = load(away.key, away.image, f"op-{number}", outgoing=(here.key,))
                result = await hotbayd.exchange(request)
                assert (result.error, result.ledger.link_missed) == ("", False)
                waited.append(result.ledger.link_wait_ms)
                here, away = away, here
                answer = await gateway.run(here.key, PROMPT, greedy(3))
                assert answer.tokens == here.expected(PROMPT, 3)
            return waited

    async def run() -> None:
        # So slow a link that the two are bound to meet on it.
        arguments = ("--link", LINK, "--link-bytes-per-s", "4e6")
        async with (
            worker_process(runtime_dir, *arguments, partition="p0") as one,
            worker_process(runtime_dir, *arguments, partition="p1") as other,
        ):
            meet = asyncio.Barrier(2)
            waited = await asyncio.gather(
                swaps(one, prose, code, meet), swaps(other, code, prose, meet)
            )
            assert max(map(max, waited)) > 1.0, f"nobody waited for the other: {waited}"

    asyncio.run(run())
