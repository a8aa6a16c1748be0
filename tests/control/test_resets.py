"""Layouts of a board whose MIG mode changes with a reset, through hotbayd."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
from hotbay.operations import operation_response
from hotbay.v1 import partition_pb2

from partitioner.catalogue import load_catalogue
from partitioner.simulation import ProcessSpec
from tests.control.test_layout_changes import apply, begin, board, clean, plan
from tests.support.control_api import QUIET, Api, refusal
from tests.support.control_peers import Worker
from tests.support.control_stage import staged, until

NAME = "gpu0/3g.40gb@4"
CUT = "version: 1\ngpus:\n- index: 0\n  partitions: [{profile: 3g.40gb, start: 4}]\n"
WHOLE = "version: 1\ngpus: [{index: 0}]\n"


def play(root: Path, scenario: Callable[[Api], Awaitable[None]], *models: str) -> None:
    async def run() -> None:
        async with staged(root, *models, settings=QUIET, start=False) as stage:
            stage.board.gpus[0].board = load_catalogue().board("a100-80")
            stage.workers[NAME] = Worker(root / "run", NAME, 64 << 20)
            await stage.start()
            async with asyncio.timeout(120):
                path = stage.config().control_socket
                async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                    await scenario(Api(stage, channel))

    asyncio.run(run())


def test_a_model_lives_through_a_reset_and_back(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await api.wait(await api.model("LoadModel", model="prose"))
        planned = await plan(api, CUT)
        assert (planned.gpus[0].mig_change, planned.gpus[0].reset) == ("enable", True)
        done = await api.wait(await begin(api, planned.plan_id))
        response = operation_response(done)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        assert (list(response.created), list(response.moved)) == ([NAME], ["prose@1"])
        assert board(stage) == ["3g.40gb@4"]
        world = stage.node.world
        await until(lambda: world.serving.get("prose@1") == NAME)
        assert operation_response(await apply(api, WHOLE)) is not None
        assert board(stage) == ["whole"]
        await until(lambda: world.serving.get("prose@1") == "gpu0")
        assert not stage.board.gpus[0].mig_pending

    play(tmp_path, scenario, "prose")


def test_who_is_on_the_gpu_is_named_and_can_be_ended(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        gpu = stage.board.gpus[0]
        gpu.processes = (ProcessSpec(pid=9, memory_mib=1),)
        planned = await plan(api, CUT)
        code, reason, metadata, message = await refusal(begin(api, planned.plan_id))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RESET_NEEDED")
        assert (metadata, "only with a reset" in message) == ({"pids": "9"}, True)
        assert (board(stage), gpu.mig_pending, stage.fleet.removed) == (["whole"], False, [])
        await api.wait(await begin(api, planned.plan_id, force=True))
        assert (board(stage), gpu.processes) == (["3g.40gb@4"], ())
        assert clean(stage)

    play(tmp_path, scenario)


def test_killed_while_the_mode_waits_it_is_taken_back(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        gpu = stage.board.gpus[0]
        stall = stage.board.stall("nvmlShutdown")
        planned = await plan(api, CUT)
        await begin(api, planned.plan_id)
        await until(stall.entered.is_set)
        assert (gpu.mig_current, gpu.mig_pending) == (False, True)
        # Somebody comes before the reset, which then is refused.
        gpu.processes = (ProcessSpec(pid=9, memory_mib=1),)
        stage.board.clear_injections()
        await stage.kill()
        gpu.processes = ()
        await stage.start()
        assert board(stage) == ["whole"]
        assert not gpu.mig_pending, "nobody is surprised at the next reboot"
        assert list(stage.node.world.partitions) == ["gpu0"]
        assert clean(stage)

    play(tmp_path, scenario)
