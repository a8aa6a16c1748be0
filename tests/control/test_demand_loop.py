"""Swaps on demand on a whole node: held requests bring models up, failures refuse them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from daemon.control.actions import demand_loop
from daemon.control.state.records import Cause, Intent, Kind, Operation
from daemon.control.state.running import Request
from engine.link import control
from engine.link.control import EngineStatus
from tests.support.control_stage import Theatre, staged, until

AT_ONCE = "[scheduling]\nmin_residency_s = 0\n"
ONE = AT_ONCE + "max_active_models = 1\n"


def play(
    root: Path,
    scenario: Callable[[Theatre], Awaitable[None]],
    *models: str,
    settings: str = AT_ONCE,
    gpus: int = 1,
) -> None:
    async def run() -> None:
        async with staged(root, *models, settings=settings, gpus=gpus) as stage:
            async with asyncio.timeout(120):
                await scenario(stage)

    asyncio.run(run())


async def load(stage: Theatre, model: str, **fields: object) -> Operation:
    intent = Intent(Kind.LOAD, incoming=model, **fields)  # type: ignore[arg-type]
    operation = await stage.node.parts.conductor.submit(Request("test"), intent)
    return await stage.node.parts.operations.wait(operation.name, 100)


def by_demand(stage: Theatre) -> list[Operation]:
    """Operations that demand brought about, oldest first."""
    everything = reversed(stage.node.parts.operations.all())
    return [each for each in everything if each.intent.cause is Cause.DEMAND]


def test_held_request_loads_a_model_from_disk(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.gateway.want(prose=0.1)
        await until(lambda: stage.worker.active() == ["prose@1"])
        await until(lambda: stage.gateway.route("prose@1").disposition == "serve")
        (operation,) = by_demand(stage)
        assert operation.intent.kind is Kind.LOAD
        assert stage.builders.builds == ["prose"]

    play(tmp_path, scenario, "prose")


def test_models_in_turn_where_one_may_be_active(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        for model in ("code", "prose", "code"):
            stage.gateway.want(**{model: 0.1})
            await until(lambda model=model: stage.worker.active() == [f"{model}@1"])
        await until(lambda: stage.node.parts.operations.open_count == 0)
        assert [each.intent.kind for each in by_demand(stage)] == [Kind.SWAP] * 3
        assert all(each.failure is None for each in by_demand(stage))

    play(tmp_path, scenario, "prose", "code", settings=ONE)


def test_nothing_leaves_before_its_residency_is_over(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        loop = stage.node.parts.demand
        stage.gateway.want(code=0.1)
        await until(lambda: stage.node.world.held)
        assert 0 < await loop.look() <= demand_loop.LOOK_INTERVAL_S
        assert by_demand(stage) == []
        stage.node.world.active_since_s["prose@1"] -= 3600
        loop.wake()
        await until(lambda: stage.worker.active() == ["code@1"])

    play(
        tmp_path,
        scenario,
        "prose",
        "code",
        settings="[scheduling]\nmin_residency_s = 3600\nmax_active_models = 1\n",
    )


def test_swaps_on_demand_can_be_switched_off(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.gateway.want(prose=9.0)
        await until(lambda: stage.node.world.held)
        await stage.node.parts.demand.look()
        assert stage.node.parts.operations.all() == []

    play(tmp_path, scenario, "prose", settings="[scheduling]\nswap_on_demand = false\n")


def test_model_that_cannot_come_up_is_refused_with_the_reason_and_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand_loop, "REFUSAL_S_MIN", 0.05)

    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        stage.worker.fail_at = control.Stage.VERIFYING
        stage.gateway.want(code=0.1)
        await until(lambda: stage.gateway.route("code@1").disposition == "refuse")
        assert "VERIFYING" in stage.gateway.route("code@1").reason
        assert stage.gateway.route("prose@1").disposition == "serve"
        stage.worker.fail_at = None
        await until(lambda: stage.gateway.route("code@1").disposition == "hold")
        await until(lambda: stage.worker.active() == ["code@1"])

    play(tmp_path, scenario, "prose", "code", settings=ONE)


def test_model_too_large_for_any_partition_is_refused_with_figures(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, start=False, settings=AT_ONCE) as stage:
            stage.model("huge", bytes=str(100 << 20))
            await stage.start()
            stage.gateway.want(huge=0.1)
            await until(lambda: stage.gateway.route("huge@1").disposition == "refuse")
            assert "bytes of device memory" in stage.gateway.route("huge@1").reason
            assert stage.builders.builds == []

    asyncio.run(run())


def test_worker_that_dies_meanwhile_is_no_reason_to_refuse(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.worker.die_at = control.Stage.COPYING
        stage.gateway.want(prose=0.1)
        await until(lambda: stage.worker.die_at is None)
        await stage.fleet.lose("gpu0")
        await stage.fleet.connect("gpu0")
        stage.gateway.want(prose=0.5)
        await until(lambda: stage.worker.active() == ["prose@1"])
        assert "refuse" not in stage.gateway.history("prose@1")

    play(tmp_path, scenario, "prose")


def test_requests_kept_at_a_worker_bring_their_model_back_there(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose", partition="gpu1")
        await load(stage, "code", standby=True)
        worker = stage.workers["gpu1"]
        digest = stage.node.world.registry["code@1"].digest
        worker.become("code@1", EngineStatus.STANDBY, digest=digest, waiting=2)
        worker.reply(worker.state())
        await until(lambda: worker.active() == ["code@1"])
        assert stage.workers["gpu0"].exchanges == []

    play(tmp_path, scenario, "prose", "code", settings=ONE, gpus=2)


def test_demand_waits_behind_a_commanded_operation(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.worker.pause_at = control.Stage.COPYING
        intent = Intent(Kind.LOAD, incoming="prose")
        operation = await stage.node.parts.conductor.submit(Request("test"), intent)
        await stage.worker.paused.wait()
        stage.gateway.want(code=0.1)
        await until(lambda: stage.node.world.held)
        await stage.node.parts.demand.look()
        assert by_demand(stage) == []
        stage.worker.go_on.set()
        operation = await stage.node.parts.operations.wait(operation.name, 100)
        assert operation.failure is None
        await until(lambda: "code@1" in stage.worker.active())

    play(tmp_path, scenario, "prose", "code")
