"""Images that one operation wants while another needs their memory: never taken from under it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from daemon.control.state.records import Intent, Kind, Operation
from daemon.control.state.running import Request
from engine.link import control
from tests.support.control_stage import Theatre, staged, until

QUIET = "[scheduling]\nswap_on_demand = false\n[limits]\nbuilds_max = 4\n"
IMAGE_BYTES = (1 << 20) + 4096


def play(
    root: Path, scenario: Callable[[Theatre], Awaitable[None]], *models: str, images: int = 2
) -> None:
    settings = QUIET + f"[host_store]\nbudget_bytes = {images * IMAGE_BYTES}\n"

    async def main() -> None:
        async with asyncio.timeout(120), staged(root, *models, settings=settings) as stage:
            await scenario(stage)

    asyncio.run(main())


async def begin(stage: Theatre, model: str, *, standby: bool = False) -> Operation:
    intent = Intent(Kind.LOAD, incoming=model, standby=standby)
    return await stage.node.parts.conductor.submit(Request("test"), intent)


async def end(stage: Theatre, operation: Operation) -> Operation:
    return await stage.node.parts.operations.wait(operation.name, None)


async def load(stage: Theatre, model: str, *, standby: bool = False) -> Operation:
    return await end(stage, await begin(stage, model, standby=standby))


async def mapped(stage: Theatre, count: int) -> None:
    """Wait until the worker maps so many images, in the background too."""
    await until(lambda: len(stage.worker.images) == count)


def test_an_image_that_was_just_built_is_not_taken_for_room(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        images, go_on = stage.node.parts.images, asyncio.Event()
        keep, kept = images._custody.keep, []

        async def slow_keep(digest: str, descriptor: int) -> None:
            kept.append(digest)
            if len(kept) == 1:
                await go_on.wait()
            await keep(digest, descriptor)

        images._custody.keep = slow_keep  # type: ignore[method-assign]
        first = await begin(stage, "one")
        await until(lambda: kept)
        await load(stage, "two", standby=True)
        await mapped(stage, 2)
        # Room for a third is the second's, though the first has been there for longer.
        third = await load(stage, "three", standby=True)
        assert third.failure is None
        assert kept[0] in stage.node.world.store
        assert kept[1] not in stage.node.world.store
        go_on.set()
        done = await end(stage, first)
        assert done.failure is None, done.failure
        assert stage.worker.active() == ["one@1"]

    play(tmp_path, scenario, "one", "two", "three")


def test_who_wants_an_image_that_is_leaving_waits_and_has_it_built_again(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        for model in ("one", "two"):
            await load(stage, model, standby=True)
        await mapped(stage, 2)
        client = stage.node.world.processes.workers["gpu0"]
        detach, go_on, detaching = client.detach, asyncio.Event(), asyncio.Event()

        async def slow_detach(digest: str) -> None:
            detaching.set()
            await go_on.wait()
            await detach(digest)

        client.detach = slow_detach  # type: ignore[method-assign]
        third = await begin(stage, "three", standby=True)
        await detaching.wait()
        wanted = await begin(stage, "one")
        await asyncio.sleep(0)
        go_on.set()
        assert (await end(stage, third)).failure is None
        done = await end(stage, wanted)
        assert done.failure is None, done.failure
        assert stage.worker.active() == ["one@1"]
        assert stage.builders.builds.count("one") == 2
        store = stage.node.world.store
        assert store.used_bytes <= store.budget_bytes
        assert all("operation" not in image.holders for image in store.images())

    play(tmp_path, scenario, "one", "two", "three")


def test_an_image_is_not_evicted_by_hand_while_it_is_being_brought(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        world = stage.node.world
        directory = stage.repository / "one" / "1"
        alias = await world.registry.register("alias", directory, 0)
        world.registry.put(alias)
        await load(stage, "one", standby=True)
        world.registry.learn_digest("alias@1", world.registry["one@1"].digest)
        await mapped(stage, 1)
        stage.worker.pause_at = control.Stage.COPYING
        bringing = await begin(stage, "alias")
        await stage.worker.paused.wait()
        intent = Intent(Kind.UNLOAD, outgoing=("one",), evict=True)
        unload = await end(stage, await stage.node.parts.conductor.submit(Request("test"), intent))
        assert unload.failure is not None
        assert unload.failure.reason == "IMAGE_IN_USE"
        assert "gpuctl op ls --running" in unload.failure.message
        stage.worker.go_on.set()
        assert (await end(stage, bringing)).failure is None
        assert stage.worker.active() == ["alias@1"]

    play(tmp_path, scenario, "one")


def test_the_image_of_a_model_whose_worker_died_is_not_taken_for_room(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "one")
        await load(stage, "two", standby=True)
        await mapped(stage, 2)
        placed = stage.node.world.registry["one@1"].digest
        await stage.fleet.lose("gpu0")
        third = await load(stage, "three", standby=True)
        assert third.failure is None
        assert placed in stage.node.world.store  # its worker, started again, wants it back
        assert stage.node.world.registry["two@1"].digest not in stage.node.world.store

    play(tmp_path, scenario, "one", "two", "three")


@pytest.mark.parametrize("fail_at", [control.Stage.COPYING, control.Stage.DRAINING])
def test_a_load_that_fails_leaves_no_image_and_no_claim_on_one(
    tmp_path: Path, fail_at: control.Stage
) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.worker.fail_at = fail_at
        done = await load(stage, "one")
        assert done.failure is not None
        assert stage.node.world.store.images() == ()
        assert stage.node.parts.images._in_use == {}
        stage.worker.fail_at = None
        assert (await load(stage, "one")).failure is None

    play(tmp_path, scenario, "one")
