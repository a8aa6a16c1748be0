"""Operations on models, on a whole node with scripted peers: orders of effects, failures, leaks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from daemon.control.errors import CallRefused, ControlError
from daemon.control.state.records import Intent, Kind, Operation, Stage
from daemon.control.state.running import Request
from engine.link import control
from engine.link.control import InFlight
from swap.errors import InsufficientDeviceMemory
from tests.support.control_stage import Theatre, staged, until
from tests.support.descriptors import open_descriptors

Scenario = Callable[[Theatre], Awaitable[None]]
# Commanded swaps only: nothing comes up by itself, and what is not ACTIVE is held.
QUIET = "[scheduling]\nmin_residency_s = 3600\n"


def play(root: Path, scenario: Scenario, *models: str, **options: object) -> None:
    async def run() -> None:
        options.setdefault("settings", QUIET)
        async with staged(root, *models, **options) as stage:  # type: ignore[arg-type]
            async with asyncio.timeout(120):
                await scenario(stage)

    asyncio.run(run())


async def begin(stage: Theatre, intent: Intent, request: Request | None = None) -> Operation:
    return await stage.node.parts.conductor.submit(request or Request("test"), intent)


async def end(stage: Theatre, operation: Operation) -> Operation:
    return await stage.node.parts.operations.wait(operation.name, 100)


async def do(stage: Theatre, kind: Kind, **fields: object) -> Operation:
    return await end(stage, await begin(stage, Intent(kind, **fields)))  # type: ignore[arg-type]


async def load(stage: Theatre, model: str, **fields: object) -> Operation:
    return await do(stage, Kind.LOAD, incoming=model, **fields)


async def swap(stage: Theatre, outgoing: str, incoming: str) -> Operation:
    return await do(stage, Kind.SWAP, outgoing=(outgoing,), incoming=incoming)


def test_load_builds_keeps_attaches_and_serves(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        assert stage.gateway.route("prose@1").disposition == "hold"
        operation = await load(stage, "prose")
        assert operation.failure is None
        assert operation.result is not None
        assert operation.result.state == "ACTIVE"
        assert operation.result.partition == "gpu0"
        assert stage.builders.builds == ["prose"]
        digest = stage.node.world.registry["prose@1"].digest
        assert list(stage.worker.images) == list(stage.gateway.segments) == [digest]
        assert stage.worker.active() == ["prose@1"]
        await stage.node.parts.router.publish()
        route = stage.gateway.route("prose@1")
        assert (route.disposition, route.partition, route.state) == ("serve", "gpu0", "ACTIVE")
        again = await load(stage, "prose")
        assert again.result is not None
        assert "already" in again.result.message
        assert stage.builders.builds == ["prose"]

    play(tmp_path, scenario, "prose")


def test_swap_holds_before_it_exchanges_and_serves_while_weights_land(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        await load(stage, "code", standby=True)
        stage.worker.pause_at = control.Stage.COPYING
        operation = await begin(
            stage, Intent(Kind.SWAP, outgoing=("prose",), incoming="code", drain_timeout_s=3)
        )
        await stage.worker.paused.wait()
        await until(lambda: stage.gateway.route("code@1").disposition == "serve")
        assert stage.gateway.route("prose@1").disposition == "hold"
        assert stage.worker.exchanges[-1].drain_timeout_s == 3
        assert stage.worker.exchanges[-1].discard is False
        stage.worker.go_on.set()
        operation = await end(stage, operation)
        assert operation.failure is None
        assert operation.result is not None
        assert operation.result.ledger is not None
        assert operation.result.ledger.copied_bytes == 1000
        await stage.node.parts.router.publish()
        assert stage.gateway.history("prose@1") == ["hold", "serve", "hold"]
        assert stage.gateway.history("code@1") == ["hold", "serve"]
        versions = [table.version for table in stage.gateway.tables]
        assert versions == sorted(set(versions))
        assert stage.node.world.placements.keys() == {"code@1"}

    play(tmp_path, scenario, "prose", "code")


@pytest.mark.parametrize("stage_of_failure", list(control.Stage)[:5])
def test_failed_swap_leaves_the_old_model_serving(
    tmp_path: Path, stage_of_failure: control.Stage
) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        before = len(open_descriptors())
        stage.worker.fail_at = stage_of_failure
        operation = await swap(stage, "prose", "code")
        assert operation.failure is not None
        assert operation.failure.reason == "TRANSFER_FAILED"
        assert stage_of_failure.value in operation.failure.message
        assert "prose@1 serves again" in operation.failure.message
        assert stage.worker.active() == ["prose@1"]
        await stage.node.parts.router.publish()
        assert stage.gateway.route("prose@1").disposition == "serve"
        assert stage.gateway.route("code@1").disposition == "hold"
        # The image was built by this operation, so it goes with it: nothing stays behind.
        assert len(stage.gateway.segments) == len(stage.worker.images) == 1
        assert len(stage.node.world.store.images()) == 1
        assert stage.node.world.store.reserved_bytes == 0
        assert len(open_descriptors()) == before
        stage.worker.fail_at = None
        assert (await swap(stage, "prose", "code")).failure is None

    play(tmp_path, scenario, "prose", "code")


def test_failed_build_gives_everything_back(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        before = len(open_descriptors())
        stage.builders.refuse = CallRefused("tensor w is short", reason="CHECKPOINT_INVALID")
        operation = await load(stage, "prose")
        assert operation.failure is not None
        assert operation.failure.reason == "CHECKPOINT_INVALID"
        assert operation.stage is Stage.ROLLED_BACK
        assert stage.node.world.store.used_bytes == 0
        assert stage.gateway.segments == {}
        assert len(open_descriptors()) == before

    play(tmp_path, scenario, "prose")


def test_model_larger_than_the_partition_is_refused_with_figures(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        with pytest.raises(InsufficientDeviceMemory, match="at least") as refused:
            await load(stage, "huge")
        assert int(refused.value.metadata["needed_bytes"]) > 64 << 20
        assert stage.builders.builds == []
        assert stage.node.parts.operations.all() == []

    async def run() -> None:
        async with staged(tmp_path, start=False, settings=QUIET) as stage:
            stage.model("huge", bytes=str(100 << 20))
            await stage.start()
            await scenario(stage)

    asyncio.run(run())


def test_model_larger_than_the_budget_is_refused_with_figures(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        with pytest.raises(ControlError, match="raise the budget by") as refused:
            await load(stage, "code")
        assert refused.value.reason == "INSUFFICIENT_HOST_MEMORY"
        assert refused.value.metadata["budget_bytes"] == str(3 << 19)
        assert stage.worker.active() == ["prose@1"]

    settings = QUIET + f"[host_store]\nbudget_bytes = {3 << 19}\n"
    play(tmp_path, scenario, "prose", "code", settings=settings)


def test_least_recently_used_image_makes_room(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        for model in ("one", "two"):
            await load(stage, model, standby=True)
        await until(lambda: len(stage.worker.images) == 2)
        world = stage.node.world
        first = world.registry["one@1"].digest
        _, plan = stage.node.parts.conductor.prepare(
            Intent(Kind.LOAD, incoming="three", standby=True)
        )
        assert plan.host_evictions == ("one@1",)
        operation = await load(stage, "three", standby=True)
        assert operation.failure is None
        assert first not in world.store
        assert first not in stage.worker.images
        assert first not in stage.gateway.segments
        assert world.state(world.registry["one@1"])[0] == "COLD"
        assert world.state(world.registry["two@1"])[0] == "STANDBY"

    settings = QUIET + f"[host_store]\nbudget_bytes = {5 << 19}\n"
    play(tmp_path, scenario, "one", "two", "three", settings=settings)


def test_load_that_fits_nowhere_beside_others_stays_standby(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        operation = await load(stage, "code")
        assert operation.result is not None
        assert operation.result.state == "STANDBY"
        assert "max_active_models" in operation.result.message
        assert stage.worker.active() == ["prose@1"]

    settings = QUIET + "max_active_models = 1\n"
    play(tmp_path, scenario, "prose", "code", settings=settings)


def test_worker_that_has_no_room_after_all_leaves_it_standby(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.worker.refuse = control.Failed(0, "INSUFFICIENT_DEVICE_MEMORY", "KV is lent out")
        operation = await load(stage, "prose")
        assert operation.result is not None
        assert (operation.result.state, operation.failure) == ("STANDBY", None)
        assert "KV is lent out" in operation.result.message

    play(tmp_path, scenario, "prose")


def test_unload_takes_off_and_evict_drops_the_image_everywhere(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        before = len(open_descriptors())
        await load(stage, "prose")
        operation = await do(stage, Kind.UNLOAD, outgoing=("prose",))
        assert operation.result is not None
        assert operation.result.state == "STANDBY"
        assert stage.worker.exchanges[-1].discard is True
        assert stage.worker.engines == {}
        operation = await do(stage, Kind.UNLOAD, outgoing=("prose",), evict=True)
        assert operation.result is not None
        assert operation.result.state == "COLD"
        assert stage.worker.images == stage.gateway.segments == {}
        assert stage.node.world.store.used_bytes == 0
        assert len(open_descriptors()) == before

    play(tmp_path, scenario, "prose")


def test_drain_and_resume(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        operation = await do(stage, Kind.DRAIN, outgoing=("prose",), in_flight=InFlight.ABORT)
        assert operation.result is not None
        assert operation.result.state == "STAGED"
        await stage.node.parts.router.publish()
        route = stage.gateway.route("prose@1")
        assert (route.disposition, route.state) == ("hold", "STAGED")
        stage.gateway.want(prose=5.0)
        await asyncio.sleep(0.05)
        assert len(stage.worker.exchanges) == 1, "a drained model is not brought up by demand"
        with pytest.raises(ControlError, match="only an ACTIVE model"):
            await do(stage, Kind.DRAIN, outgoing=("prose",))
        operation = await do(stage, Kind.RESUME, incoming="prose")
        assert operation.failure is None
        await stage.node.parts.router.publish()
        assert stage.gateway.route("prose@1").disposition == "serve"

    play(tmp_path, scenario, "prose")


@pytest.mark.parametrize(
    ("intent", "reason"),
    [
        (Intent(Kind.LOAD, incoming="nope"), "MODEL_NOT_FOUND"),
        (Intent(Kind.LOAD, incoming="code", partition="gpu9"), "PARTITION_NOT_FOUND"),
        (Intent(Kind.SWAP, outgoing=("code",), incoming="bad"), "CHECKPOINT_INVALID"),
        (Intent(Kind.SWAP, outgoing=("code",), incoming="prose"), "INVALID_STATE"),
        (Intent(Kind.SWAP, outgoing=("more",), incoming="code"), "INVALID_STATE"),
        (Intent(Kind.RESUME, incoming="prose"), "INVALID_STATE"),
        (Intent(Kind.DRAIN, outgoing=("code",)), "INVALID_STATE"),
    ],
)
def test_wishes_that_make_no_sense_are_refused_at_once(
    tmp_path: Path, intent: Intent, reason: str
) -> None:
    async def run() -> None:
        async with staged(tmp_path, "prose", "code", "more", start=False, settings=QUIET) as stage:
            stage.model("bad", bad="1")
            await stage.start()
            await load(stage, "prose")
            with pytest.raises(ControlError) as refused:
                await begin(stage, intent)
            assert refused.value.reason == reason
            assert stage.worker.active() == ["prose@1"]
            assert len(stage.node.parts.operations.all()) == 1

    asyncio.run(run())


def test_cancel_while_copying_rolls_back(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        stage.worker.pause_at = control.Stage.COPYING
        operation = await begin(stage, Intent(Kind.SWAP, outgoing=("prose",), incoming="code"))
        await stage.worker.paused.wait()
        await stage.node.parts.operations.cancel(operation.name)
        operation = await end(stage, operation)
        assert operation.failure is not None
        assert operation.failure.reason == "CANCELLED"
        assert stage.worker.active() == ["prose@1"]
        with pytest.raises(ControlError, match="cannot be cancelled"):
            await stage.node.parts.operations.cancel(operation.name)

    play(tmp_path, scenario, "prose", "code")


def test_cancel_while_building_gives_the_memory_back(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.builders.pause = asyncio.Event()
        operation = await begin(stage, Intent(Kind.LOAD, incoming="prose"))
        await until(lambda: stage.builders.builds)
        assert stage.node.world.store.reserved_bytes > 0
        await stage.node.parts.operations.cancel(operation.name)
        operation = await end(stage, operation)
        assert operation.failure is not None
        assert operation.failure.reason == "CANCELLED"
        assert stage.node.world.store.used_bytes == 0

    play(tmp_path, scenario, "prose")


def test_partitions_work_side_by_side_and_one_refuses_a_second(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        for worker in stage.workers.values():
            worker.pause_at = control.Stage.COPYING
        first = await begin(stage, Intent(Kind.LOAD, incoming="one", partition="gpu0"))
        second = await begin(stage, Intent(Kind.LOAD, incoming="two", partition="gpu1"))
        for worker in stage.workers.values():
            await worker.paused.wait()
        with pytest.raises(ControlError, match=first.name) as refused:
            await begin(stage, Intent(Kind.LOAD, incoming="three", partition="gpu0"))
        assert refused.value.reason == "OPERATION_IN_PROGRESS"
        for worker in stage.workers.values():
            worker.go_on.set()
        for operation in (first, second):
            assert (await end(stage, operation)).failure is None
        assert stage.node.world.serving == {"one@1": "gpu0", "two@1": "gpu1"}

    play(tmp_path, scenario, "one", "two", "three", gpus=2)


def test_copies_under_way_are_foreseen_where_they_share_a_link(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        world = stage.node.world
        assert len({each.link for each in world.partitions.values()}) == 3
        for name in ("gpu0", "gpu1"):
            world.partitions[name] = dataclasses.replace(world.partitions[name], link="root")
        stage.worker.pause_at = control.Stage.COPYING
        loading = await begin(stage, Intent(Kind.LOAD, incoming="one", partition="gpu0"))
        await stage.worker.paused.wait()
        await until(lambda: world.copying)
        # The worker tells 1 of 2 bytes, and its link moves 1e9 a second.
        waits = {view.id: view.link_wait_ms for view in world.views()}
        assert waits == {"gpu0": 0.0, "gpu1": pytest.approx(1e-6), "gpu2": 0.0}
        stage.worker.go_on.set()
        assert (await end(stage, loading)).failure is None
        assert world.copying == {}

    play(tmp_path, scenario, "one", gpus=3)


def test_dry_run_changes_nothing(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        tables = len(stage.gateway.tables)
        intent = Intent(Kind.SWAP, outgoing=("prose",), incoming="code")
        operation = await stage.node.parts.conductor.submit(
            Request("test", "id-1"), intent, validate_only=True
        )
        assert operation.done
        assert operation.plan.outgoing == ("prose@1",)
        assert operation.plan.copy_bytes == 1 << 20
        assert operation.plan.build_bytes > 1 << 20
        assert operation.plan.predicted_ms > 0
        assert stage.builders.builds == ["prose"]
        assert len(stage.node.parts.operations.all()) == 1
        assert len(stage.gateway.tables) == tables
        # The dry run did not use the request's id up.
        assert not (await begin(stage, intent, Request("test", "id-1"))).done

    play(tmp_path, scenario, "prose", "code")
