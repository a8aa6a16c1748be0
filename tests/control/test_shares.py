"""MPS shares through hotbayd: applied, kept, mended, refused. Daemons are the stand-ins, real ones.

The node is the real one over the simulated board; workers are scripted, and so no clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from hotbay.operations import operation_response
from hotbay.v1 import partition_pb2

from partitioner.mps.control import Limits
from partitioner.mps.places import MpsPlaces
from partitioner.simulation import ProcessSpec
from tests.control.test_layout_changes import SERVICE, apply, begin, clean, plan, reason_of
from tests.support.control_api import QUIET, Api, refusal
from tests.support.control_peers import Worker
from tests.support.control_stage import staged

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 240.0
"""Each control command is a process, and the machine may have much else to do."""
GIB = 1 << 30
HEAD = "version: 1\ngpus:\n- index: 0\n"
SHARED = HEAD + "  shares: [{memory: 60GiB, threads: 50, owner: team-a}, {memory: 60GiB}]\n"
WIDER = HEAD + "  shares: [{memory: 60GiB, threads: 50, owner: team-a}, {threads: 25}]\n"
IN_MIG = HEAD + "  partitions: [{profile: 3g.71gb, start: 4, shares: [{threads: 50}]}]\n"
STATIC = HEAD + "  shares: [{memory: 60GiB, sm: 96, owner: team-a}, {memory: 60GiB, sm: 32}]\n"
EVEN = HEAD + "  shares: [{memory: 60GiB, sm: 64, owner: team-a}, {memory: 60GiB, sm: 64}]\n"
WHOLE = "version: 1\ngpus: [{index: 0}]\n"
PARTS = ["gpu0/mps0", "gpu0/mps1"]


def play(root: Path, scenario: Callable[[Api], Awaitable[None]]) -> None:
    async def run() -> None:
        async with staged(root, "prose", settings=QUIET, start=False) as stage:
            for name in (*PARTS, "gpu0/3g.71gb@4/mps0"):
                stage.workers[name] = Worker(root / "run", name, 64 << 20)
            await stage.start()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    path = stage.config().control_socket
                    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                        api = Api(stage, channel)
                        api.timeout_s = PATIENCE_S
                        await scenario(api)
            finally:
                await stage.node.sharing.stop()

    asyncio.run(run())


def places(api: Api) -> MpsPlaces:
    return api.stage.node.sharing


async def limits(api: Api) -> tuple[Limits, ...]:
    (noted,) = places(api).noted()
    return await places(api)._control(noted).limits(1)


def test_shares_are_applied_kept_changed_and_taken_away(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        done = await apply(api, SHARED)
        response = operation_response(done)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        assert (list(response.created), list(response.destroyed)) == (PARTS, ["gpu0"])
        parts = stage.node.world.partitions
        assert list(parts) == PARTS
        assert [each.memory_bytes for each in parts.values()] == [60 * GIB, 60 * GIB]
        assert [each.sm_count for each in parts.values()] == [66, 132]
        assert await limits(api) == (Limits(60 * GIB, 100),), "the loosest: clients tighten"
        assert not (await plan(api, SHARED)).changes
        exported = await api.call(
            f"{SERVICE}/GetLayout", partition_pb2.GetLayoutRequest(), partition_pb2.Layout
        )
        assert "memory: 60GiB, threads: 50, owner: team-a" in exported.text
        assert not (await plan(api, exported.text)).changes
        # Found again by another daemon, and taken for what they are.
        await stage.kill()
        await stage.start()
        assert list(stage.node.world.partitions) == PARTS
        done = await apply(api, WIDER)
        response = operation_response(done)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        assert (list(response.created), list(response.destroyed)) == (PARTS[1:], PARTS[1:])
        assert stage.fleet.removed == PARTS[1:], "the worker of the other share serves on"
        assert set(stage.fleet.workers) == set(PARTS)
        assert stage.node.world.partitions[PARTS[1]].thread_percent == 25
        await apply(api, WHOLE)
        assert list(stage.node.world.partitions) == ["gpu0"]
        assert places(api).noted() == ()
        assert clean(stage)

    play(tmp_path, scenario)


def test_shares_inside_an_instance(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        done = await apply(api, IN_MIG)
        assert done.HasField("response"), done.error.message
        part = stage.node.world.partitions["gpu0/3g.71gb@4/mps0"]
        instance = stage.board.gpus[0].instances[0]
        (noted,) = places(api).noted()
        assert part.device_uuid == noted.device == instance.uuid
        assert (part.sm_count, noted.sm_count) == (30, 60)
        words = places(api).prefix(part.id)
        assert f"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT={instance.uuid}=" in " ".join(words)
        # Its server is no stranger on the instance when that goes.
        pids = places(api).pids()
        specs = [ProcessSpec(pid=pid, memory_mib=1, on=str(instance.place)) for pid in pids]
        stage.board.gpus[0].processes = tuple(specs)
        assert (await begin(api, (await plan(api, WHOLE)).plan_id, validate_only=True)).done

    play(tmp_path, scenario)


def test_without_a_control_program_nothing_is_touched(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        sharing = places(api)
        programs = sharing._programs
        object.__setattr__(programs, "control", ("/nowhere/nvidia-cuda-mps-control",))
        planned = await plan(api, SHARED)
        _, reason, _, message = await refusal(begin(api, planned.plan_id))
        assert (reason, "nvidia-compute-utils" in message) == ("MPS_UNAVAILABLE", True)
        assert api.stage.fleet.removed == []

    play(tmp_path, scenario)


def test_a_share_that_cannot_be_made_brings_the_old_layout_back(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        programs = places(api)._programs
        object.__setattr__(programs, "look", ("echo", "CUDA_ERROR_MPS_CONNECTION_FAILED"))
        done = await apply(api, SHARED)
        assert reason_of(done) == "LAYOUT_FAILED"
        assert "CUDA_ERROR_MPS_CONNECTION_FAILED" in done.error.message
        assert list(api.stage.node.world.partitions) == ["gpu0"]
        assert places(api).noted() == ()
        assert places(api).pids() == frozenset(), "no daemon is left"
        assert clean(api.stage)

    play(tmp_path, scenario)


def newer(api: Api) -> None:
    """Give the node the control program of a driver with static partitions."""
    programs = places(api)._programs
    words = tuple("13010" if word == "13000" else word for word in programs.control)
    object.__setattr__(programs, "control", words)


def test_shares_with_multiprocessors_to_themselves(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        newer(api)
        stage = api.stage
        done = await apply(api, STATIC)
        assert done.HasField("response"), done.error.message
        parts = stage.node.world.partitions
        assert [each.sm_count for each in parts.values()] == [96, 32]
        (noted,) = places(api).noted()
        words = places(api).prefix(PARTS[1])
        assert f"CUDA_MPS_SM_PARTITION={noted.sm_partitions[1]}" in words
        exported = await api.call(
            f"{SERVICE}/GetLayout", partition_pb2.GetLayoutRequest(), partition_pb2.Layout
        )
        assert "sm: 96" in exported.text
        assert not (await plan(api, exported.text)).changes
        # Another that fails, once, brings both back as they were, under a new daemon.
        programs, pids = places(api)._programs, places(api).pids()
        look = programs.look
        once = f'if mkdir {tmp_path}/once; then echo no; else exec "$@"; fi'
        object.__setattr__(programs, "look", ("sh", "-c", once, "sh", *look))
        assert reason_of(await apply(api, EVEN)) == "LAYOUT_FAILED"
        assert [each.sm_count for each in parts.values()] == [96, 32]
        assert [each.sm_count for each in places(api).noted()[0].shares] == [96, 32]
        assert not places(api).pids() & pids
        done = await apply(api, EVEN)
        response = operation_response(done)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        assert [each.sm_count for each in stage.node.world.partitions.values()] == [64, 64]
        assert set(response.destroyed) == set(PARTS), "none is made among the clients of another"
        await apply(api, WHOLE)
        assert places(api).pids() == frozenset()
        assert clean(stage)

    play(tmp_path, scenario)


def test_without_static_partitions_nothing_is_touched(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        planned = await plan(api, STATIC)
        _, reason, _, message = await refusal(begin(api, planned.plan_id))
        assert (reason, "driver 590" in message) == ("MPS_UNAVAILABLE", True)
        assert api.stage.fleet.removed == []
        assert places(api).pids() == frozenset()

    play(tmp_path, scenario)
