"""Fail points of plain swaps, raising and hanging, in real processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.link import control
from engine.link.control import EngineStatus, Exchange, InFlight, Stage
from engine.link.tokens import Finish
from engine.worker.failpoints import FailPoint
from tests.support.worker_stage import (
    GatewaySide,
    HotbaydSide,
    WorkerStage,
    greedy,
    load,
    worker_process,
)
from tests.worker.conftest import Model

PROMPT = [3, 14, 15, 92, 65]
LONG = 200
IN_EXCHANGE = [
    FailPoint.PLANNED,
    FailPoint.DRAINED,
    FailPoint.EVICTED,
    FailPoint.COPYING,
    FailPoint.COPIED,
    FailPoint.COMMITTING,
]
"""What a swap of plain models with room enough comes by; `test_failing_anywhere` has all."""


def switched_on(action: str) -> str:
    """Every point, once the first load has passed it; on the way back, the first time."""
    points = [f"{point}+1={action}" for point in IN_EXCHANGE]
    return ",".join([*points, f"{FailPoint.ROLLING_BACK}={action}"])


def swap(operation: str, old: Model, new: Model) -> Exchange:
    return load(
        new.key,
        new.image,
        operation,
        outgoing=(old.key,),
        in_flight=InFlight.RECOMPUTE,
        drain_timeout_s=0.1,
    )


async def begin(worker: WorkerStage, old: Model, new: Model) -> tuple[HotbaydSide, GatewaySide]:
    """Both images attached, the old model ACTIVE."""
    hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
    for model in (old, new):
        await hotbayd.attach(model.image)
    assert (await hotbayd.exchange(load(old.key, old.image))).error == ""
    return hotbayd, gateway


async def check_old_serves(
    hotbayd: HotbaydSide, gateway: GatewaySide, old: Model, free_before: int
) -> None:
    state = await hotbayd.describe()
    assert state.exchanging == ""
    assert [(one.model, one.status) for one in state.engines] == [(old.key, EngineStatus.ACTIVE)]
    assert state.pages_free == free_before, "a failed exchange leaves no page behind"
    answer = await gateway.run(old.key, PROMPT, greedy(8))
    assert answer.tokens == old.expected(PROMPT, 8)


def test_wherever_an_exchange_fails_the_old_model_serves_on(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with worker_process(runtime_dir, "--failpoints", switched_on("raise")) as worker:
            hotbayd, gateway = await begin(worker, prose, code)
            free = (await hotbayd.describe()).pages_free
            # A stream that lives through all of it: paused, resumed, never lost.
            stream = gateway.submit(prose.key, PROMPT, greedy(LONG))
            await gateway.begun(stream)
            for point in IN_EXCHANGE:
                request = swap(f"swap-{point}", prose, code)
                early = gateway.submit(code.key, PROMPT, greedy(4))
                if point is FailPoint.PLANNED:
                    refusal = await hotbayd.failed(request)
                    assert refusal.reason == "EXCHANGE_FAILED"
                else:
                    result = await hotbayd.exchange(request)
                    assert (result.error_reason, result.rolled_back) == ("EXCHANGE_FAILED", True)
                    assert f"fail point {point} " in result.error
                    assert (await hotbayd.describe()).exchanged == result
                assert (await gateway.ended(early)).finish is Finish.REQUEUE
            answer = await gateway.ended(stream)
            assert answer.tokens == prose.expected(PROMPT, LONG)
            await check_old_serves(hotbayd, gateway, prose, free)
            assert Stage.ROLLING_BACK in {reached.stage for reached in hotbayd.stages}
            # Every point has fired, the one on the way back included: now nothing fails.
            assert (await hotbayd.exchange(swap("last", prose, code))).error == ""
            answer = await gateway.run(code.key, PROMPT, greedy(8))
            assert answer.tokens == code.expected(PROMPT, 8)

    asyncio.run(run())


@pytest.mark.slow
def test_a_stage_that_hangs_ends_at_its_deadline_on_the_way_back_too(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        # The way back has a deadline of its own. Where else things hang is of no account to the
        # clock; `test_failing_anywhere` has every point without one.
        points = f"{FailPoint.COPIED}+1=hang,{FailPoint.ROLLING_BACK}=hang"
        arguments = ("--failpoints", points, "--stage-timeout-s", "5")
        async with worker_process(runtime_dir, *arguments) as worker:
            hotbayd, gateway = await begin(worker, prose, code)
            free = (await hotbayd.describe()).pages_free
            result = await hotbayd.exchange(swap("swap", prose, code))
            assert (result.error_reason, result.rolled_back) == ("TIMED_OUT", True)
            await check_old_serves(hotbayd, gateway, prose, free)

    asyncio.run(run())


def test_a_stage_that_hangs_ends_when_it_is_abandoned(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        points = ",".join(f"{point}+1=hang" for point in IN_EXCHANGE)
        async with worker_process(runtime_dir, "--failpoints", points) as worker:
            hotbayd, gateway = await begin(worker, prose, code)
            free = (await hotbayd.describe()).pages_free
            for point in IN_EXCHANGE:
                request = swap(f"swap-{point}", prose, code)
                ending = asyncio.create_task(hotbayd.call(request))
                while isinstance(
                    await hotbayd.call(control.Abandon(request.operation)), control.Failed
                ):
                    pass  # it has not begun yet
                reply = await ending
                if isinstance(reply, control.Failed):
                    assert (point, reply.reason) == (FailPoint.PLANNED, "CANCELLED")
                else:
                    assert (reply.result.error_reason, reply.result.rolled_back) == (
                        "CANCELLED",
                        True,
                    )
            await check_old_serves(hotbayd, gateway, prose, free)

    asyncio.run(run())
