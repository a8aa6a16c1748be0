"""Spare memory as hotbayd keeps it: there before a load, gone when anybody needs the room."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hotbay.v1 import node_pb2, node_pb2_grpc

import swap.spare
from daemon.control.errors import CallRefused
from daemon.control.state.records import Intent, Kind
from daemon.control.state.running import Request
from tests.support.control_stage import Theatre, staged, until

MIB = 1 << 20
QUIET = "[scheduling]\nswap_on_demand = false\n"
SMALL, LARGE = 2 * MIB, 5 * MIB
OVERHEAD = 4096
"""What an image of these takes beside its weights."""


@pytest.fixture(autouse=True)
def small_segments_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap.spare, "SPARE_BYTES_MIN", MIB)


def play(
    tmp_path: Path, scenario: Callable[[Theatre], Awaitable[None]], settings: str = ""
) -> None:
    async def main() -> None:
        async with (
            asyncio.timeout(120),
            staged(tmp_path, settings=QUIET + settings, start=False) as stage,
        ):
            stage.model("small", bytes=str(SMALL))
            stage.model("large", bytes=str(LARGE))
            await scenario(stage)

    asyncio.run(main())


async def load(stage: Theatre, model: str) -> Any:
    intent = Intent(Kind.LOAD, incoming=model, standby=True)
    operation = await stage.node.parts.conductor.submit(Request("test"), intent)
    return await stage.node.parts.operations.wait(operation.name, None)


async def evict(stage: Theatre, model: str) -> Any:
    intent = Intent(Kind.UNLOAD, outgoing=(model,), evict=True)
    operation = await stage.node.parts.conductor.submit(Request("test"), intent)
    return await stage.node.parts.operations.wait(operation.name, None)


def settled(stage: Theatre, *sizes: int) -> Callable[[], bool]:
    """Whether exactly these segments are spare, and nobody touches one."""

    def check() -> bool:
        spares = stage.node.world.spare._spares
        found = sorted(spare.segment.size_bytes for spare in spares)
        return found == sorted(sizes) and not any(spare.touched for spare in spares)

    return check


def present_bytes(stage: Theatre) -> int:
    """What images and spare segments take of the host."""
    world = stage.node.world
    descriptors = [world.store.descriptor(image.digest) for image in world.store.images()]
    descriptors += [spare.segment.descriptor for spare in world.spare._spares]
    return sum(os.fstat(each).st_blocks * 512 for each in descriptors)


def test_images_that_are_not_in_memory_find_theirs_ready(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await stage.start()
        await until(settled(stage, LARGE + OVERHEAD, SMALL + OVERHEAD))
        assert stage.builders.touches == [LARGE + OVERHEAD, SMALL + OVERHEAD]
        ready = {
            os.fstat(each.segment.descriptor).st_ino for each in stage.node.world.spare._spares
        }
        for name in ("small", "large"):
            assert (await load(stage, name)).failure is None
        store = stage.node.world.store
        images = {os.fstat(store.descriptor(image.digest)).st_ino for image in store.images()}
        assert images == ready
        await until(settled(stage))  # all is in memory: nothing is kept ready
        assert len(stage.builders.touches) == 2
        await evict(stage, "small")
        await until(settled(stage, SMALL + OVERHEAD))

    play(tmp_path, scenario)


def test_it_is_shown_and_counted_apart(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await stage.start()
        await until(settled(stage, LARGE + OVERHEAD, SMALL + OVERHEAD))
        await load(stage, "small")
        await until(settled(stage, LARGE + OVERHEAD))
        target = f"unix:{stage.root}/run/control.sock"
        async with grpc.aio.insecure_channel(target) as channel:
            asked = node_pb2_grpc.NodeServiceStub(channel).GetNode(node_pb2.GetNodeRequest())
            store = (await asked).host_store
        assert store.spare_bytes == LARGE + OVERHEAD
        assert store.used_bytes == SMALL + OVERHEAD
        assert "4 KiB pages" in store.pages
        assert [image.page_bytes for image in store.images] == [4096]
        lines = stage.node.parts.metrics.text().splitlines()
        shown = next(line for line in lines if 'bytes{kind="spare"}' in line)
        assert float(shown.split()[-1]) == LARGE + OVERHEAD

    play(tmp_path, scenario)


def test_the_stores_budget_holds_for_images_and_spare_memory_together(tmp_path: Path) -> None:
    budget = LARGE + SMALL // 2 + 2 * OVERHEAD

    async def scenario(stage: Theatre) -> None:
        await stage.start()
        await until(settled(stage, LARGE + OVERHEAD, SMALL // 2 + OVERHEAD))
        assert present_bytes(stage) <= budget
        await load(stage, "small")
        await until(settled(stage, LARGE - SMALL // 2 + OVERHEAD))
        assert present_bytes(stage) <= budget
        await load(stage, "large")  # makes room; what is spare is never in its way
        await until(settled(stage, SMALL // 2 + OVERHEAD))
        assert present_bytes(stage) <= budget
        assert len(stage.node.world.store.images()) == 1

    play(tmp_path, scenario, f"[host_store]\nbudget_bytes = {budget}\n")


@pytest.mark.parametrize(("spare", "expected"), [(0, []), (3 * MIB, [3 * MIB])])
def test_no_more_is_spare_than_is_allowed(tmp_path: Path, spare: int, expected: list[int]) -> None:
    async def scenario(stage: Theatre) -> None:
        await stage.start()
        await load(stage, "small")
        await until(settled(stage, *expected))
        if expected:
            await load(stage, "large")  # takes the part that was there
            assert len(stage.node.world.store.images()) == 2
        assert all(size <= spare for size in stage.builders.touches)

    play(tmp_path, scenario, f"[host_store]\nspare_bytes = {spare}\n")


def test_nothing_is_touched_during_a_load(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.builders.pause_touch = asyncio.Event()
        stage.builders.pause = asyncio.Event()
        await stage.start()
        await until(lambda: stage.builders.touches)
        loading = asyncio.create_task(load(stage, "small"))
        await until(lambda: stage.builders.builds)
        await until(settled(stage))  # given up, and its memory freed
        touches = len(stage.builders.touches)
        stage.node.parts.spare.wake()
        await asyncio.sleep(0.01)
        assert len(stage.builders.touches) == touches
        stage.builders.pause_touch.set()
        stage.builders.pause.set()
        assert (await loading).failure is None
        await until(settled(stage, LARGE + OVERHEAD))

    play(tmp_path, scenario)


def test_without_memory_to_spare_loads_work_as_ever(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.builders.refuse_touch = CallRefused("none", reason="INSUFFICIENT_HOST_MEMORY")
        await stage.start()
        await until(lambda: stage.builders.touches)
        await until(settled(stage))
        assert (await load(stage, "large")).failure is None
        assert (await load(stage, "small")).failure is None

    play(tmp_path, scenario)


def test_a_restart_with_a_smaller_budget_keeps_to_it_and_leaves_nothing_open(
    tmp_path: Path,
) -> None:
    async def scenario(stage: Theatre) -> None:
        await stage.start()
        await until(settled(stage, LARGE + OVERHEAD, SMALL + OVERHEAD))
        spares = list(stage.node.world.spare._spares)
        await stage.kill()
        assert stage.node.world.spare.bytes == 0
        assert all(spare.segment.closed for spare in spares)
        stage.settings += f"[host_store]\nbudget_bytes = {SMALL + OVERHEAD + MIB}\n"
        await stage.start()
        await until(settled(stage, SMALL + OVERHEAD + MIB))
        assert (await load(stage, "small")).failure is None
        assert present_bytes(stage) <= SMALL + OVERHEAD + MIB

    play(tmp_path, scenario)
