"""Layouts applied through hotbayd: workers, models, crashes, refusals. The board outlives the node.

The node is the real one over the real pynvml and the simulated board; workers are scripted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pynvml
import pytest
from google.longrunning import operations_proto_pb2 as longrunning
from google.rpc import error_details_pb2
from hotbay.operations import operation_response
from hotbay.status import operation_metadata
from hotbay.v1 import model_pb2, partition_pb2

from daemon.control.actions.layout_errors import refusal as refused
from daemon.control.failpoints import Action, FailPoint
from partitioner import errors
from partitioner.simulated.node import Fault
from partitioner.simulation import ProcessSpec
from tests.support.control_api import QUIET, Api, refusal
from tests.support.control_peers import Worker
from tests.support.control_stage import Theatre, staged, until

SERVICE = "hotbay.v1.PartitionService"
TWO = "version: 1\ngpus:\n- index: 0\n  partitions: [{profile: 3g.71gb, start: 4}, {profile: 2g.35gb, start: 0}]\n"  # noqa: E501
THREE = "version: 1\ngpus:\n- index: 0\n  partitions: [{profile: 3g.71gb, start: 4}, {profile: 1g.18gb, start: 0}]\n"  # noqa: E501
WHOLE = "version: 1\ngpus: [{index: 0}]\n"
NAMES = ("gpu0/3g.71gb@4", "gpu0/2g.35gb@0", "gpu0/1g.18gb@0")


def play(root: Path, scenario: Callable[[Api], Awaitable[None]], *models: str) -> None:
    async def run() -> None:
        async with staged(root, *models, settings=QUIET, start=False) as stage:
            for name in NAMES:
                stage.workers[name] = Worker(root / "run", name, 64 << 20)
            await stage.start()
            async with asyncio.timeout(120):
                path = stage.config().control_socket
                async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                    await scenario(Api(stage, channel))

    asyncio.run(run())


async def plan(api: Api, layout: str) -> Any:
    request = partition_pb2.PlanLayoutRequest(layout=layout)
    return await api.call(f"{SERVICE}/PlanLayout", request, partition_pb2.LayoutPlan)


async def begin(api: Api, plan_id: str, **fields: Any) -> Any:
    request = partition_pb2.ApplyLayoutRequest(plan_id=plan_id, **fields)
    return await api.call(f"{SERVICE}/ApplyLayout", request, longrunning.Operation)


async def apply(api: Api, layout: str) -> Any:
    planned = await plan(api, layout)
    return await api.wait(await begin(api, planned.plan_id))


def reason_of(operation: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    assert operation.error.details[0].Unpack(info)
    return info.reason


def board(stage: Theatre) -> list[str]:
    gpu = stage.board.gpus[0]
    return [str(each.place) for each in gpu.instances] if gpu.mig_current else ["whole"]


def clean(stage: Theatre) -> bool:
    return stage.node.parts.layout_changes._open is None


def test_a_plan_is_applied_once_and_partitions_follow(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        planned = await plan(api, TWO)
        tried = await begin(api, planned.plan_id, validate_only=True)
        response = operation_response(tried)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        assert (list(response.destroyed), tried.done) == (["gpu0"], True)
        assert board(stage) == ["whole"]
        operation = await begin(api, planned.plan_id, request_id="one")
        again = await begin(api, planned.plan_id, request_id="one")
        assert operation.name == again.name
        done = await api.wait(operation)
        response = operation_response(done)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        assert list(response.created) == ["gpu0/2g.35gb@0", "gpu0/3g.71gb@4"]
        assert list(response.destroyed) == ["gpu0"]
        assert set(response.phases_ms) == {"plan", "drain", "cut", "commit", "start"}
        assert board(stage) == ["2g.35gb@0", "3g.71gb@4"]
        assert list(stage.node.world.partitions) == ["gpu0/2g.35gb@0", "gpu0/3g.71gb@4"]
        assert set(stage.fleet.workers) == set(stage.node.world.partitions)
        assert stage.fleet.removed == ["gpu0"]
        partition = stage.node.world.partitions["gpu0/3g.71gb@4"]
        assert partition.device_uuid.startswith("MIG-")
        assert partition.sm_count == 60
        # The old plan is of a world that is gone; the file has nothing left to do.
        _, reason, _, message = await refusal(begin(api, planned.plan_id))
        assert (reason, "no longer cut" in message) == ("PLAN_STALE", True)
        before = stage.board.calls_of("nvmlDeviceCreateGpuInstanceWithPlacement")
        second = await apply(api, TWO)
        assert operation_metadata(second).message == "the layout was there already"
        assert stage.board.calls_of("nvmlDeviceCreateGpuInstanceWithPlacement") == before
        assert stage.fleet.removed == ["gpu0"]
        assert clean(stage)

    play(tmp_path, scenario)


def test_models_are_kept_brought_back_or_never_disturbed(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await api.wait(await api.model("LoadModel", model="prose"))
        done = await apply(api, TWO)
        response = operation_response(done)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        assert list(response.moved) == ["prose@1"]
        world = stage.node.world
        await until(lambda: "prose@1" in world.serving)
        home = world.serving["prose@1"]
        assert home in NAMES
        assert stage.builders.builds == ["prose"], "its image had stayed in host memory"
        kept = stage.workers["gpu0/3g.71gb@4"]
        if home != "gpu0/3g.71gb@4":
            await api.wait(await api.model("UnloadModel", model="prose"))
            await api.wait(await api.model("LoadModel", model="prose", partition="gpu0/3g.71gb@4"))
        exchanges = len(kept.exchanges)
        done = await apply(api, THREE)
        response = operation_response(done)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        assert (list(response.destroyed), list(response.moved)) == (["gpu0/2g.35gb@0"], [])
        assert world.serving == {"prose@1": "gpu0/3g.71gb@4"}
        assert len(kept.exchanges) == exchanges, "what both layouts have is not touched"
        assert "gpu0/3g.71gb@4" not in stage.fleet.removed

    play(tmp_path, scenario, "prose")


def test_a_failure_brings_layout_workers_and_models_back(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await api.wait(await api.model("LoadModel", model="prose"))
        stage.board.inject(
            Fault(
                pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES,
                "nvmlDeviceCreateGpuInstanceWithPlacement",
                after_calls=1,
                times=1,
            )
        )
        done = await apply(api, TWO)
        assert reason_of(done) == "LAYOUT_FAILED"
        assert operation_metadata(done).stage == model_pb2.OPERATION_STAGE_ROLLED_BACK
        assert board(stage) == ["whole"]
        world = stage.node.world
        await until(lambda: world.serving.get("prose@1") == "gpu0")
        assert list(world.partitions) == ["gpu0"]
        assert clean(stage)

    play(tmp_path, scenario, "prose")


def test_what_can_not_be_taken_back_says_so_and_is_settled_by_the_next(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await apply(api, TWO)
        planned = await plan(api, THREE)
        stage.board.inject(
            Fault(pynvml.NVML_ERROR_UNKNOWN, "nvmlDeviceCreateGpuInstanceWithPlacement")
        )
        done = await api.wait(await begin(api, planned.plan_id))
        assert reason_of(done) == "LAYOUT_UNSETTLED"
        assert operation_metadata(done).stage == model_pb2.OPERATION_STAGE_ROLLING_BACK
        assert not clean(stage)
        assert list(stage.node.world.partitions) == ["gpu0/3g.71gb@4"]
        stage.board.clear_injections()
        await stage.kill()
        await stage.start()
        assert board(stage) == ["2g.35gb@0", "3g.71gb@4"]
        assert clean(stage)
        assert list(stage.node.world.partitions) == ["gpu0/2g.35gb@0", "gpu0/3g.71gb@4"]

    play(tmp_path, scenario)


@pytest.mark.parametrize("point", [FailPoint.BEGUN, FailPoint.CLEARED, FailPoint.CUT])
@pytest.mark.parametrize("kind", ["raise", "hang"])
def test_every_fail_point_ends_in_one_of_two_layouts(
    tmp_path: Path, point: FailPoint, kind: str
) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await api.wait(await api.model("LoadModel", model="prose"))
        armed = stage.node.parts.conductor._failpoints._actions
        armed[point] = Action(kind)
        planned = await plan(api, TWO)
        operation = await begin(api, planned.plan_id, request_id="one")
        if kind == "raise":
            done = await api.wait(operation)
            assert done.error.code
            new = False
        else:
            await until(lambda: not armed)
            await stage.kill()
            await stage.start()
            await until(lambda: not stage.node.parts.operations.open_count)
            done = stage.node.parts.operations.get(operation.name)
            new = point is FailPoint.CUT
            assert (done.result is not None) == new
        assert board(stage) == (["2g.35gb@0", "3g.71gb@4"] if new else ["whole"])
        world = stage.node.world
        assert set(world.partitions) == (set(NAMES[:2]) if new else {"gpu0"})
        await until(lambda: "prose@1" in world.serving)
        assert world.serving["prose@1"] in world.partitions
        assert clean(stage)

    play(tmp_path, scenario, "prose")


def test_foreign_instances_and_their_processes_are_safe(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await apply(api, TWO)
        gpu = stage.board.gpus[0]
        place = next(each.place for each in gpu.instances if each.place.profile == "2g.35gb")
        gpu.processes = (ProcessSpec(pid=4242, memory_mib=1, on=str(place)),)
        planned = await plan(api, THREE)
        code, reason, metadata, message = await refusal(begin(api, planned.plan_id))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PARTITION_IN_USE")
        assert (metadata, "pid 4242" in message) == ({"pids": "4242"}, True)
        assert stage.fleet.removed == ["gpu0"], "no worker was told to end for it"
        gpu.processes = ()
        # Somebody else makes an instance between plan and apply: the plan is not applied.
        theirs = stage.board.make_instance(gpu, 9, place.__class__(2, 1, "1g.18gb"))
        stage.board.cut(gpu, (*gpu.instances, theirs))
        _, reason, metadata, _ = await refusal(begin(api, planned.plan_id))
        assert reason == "PLAN_STALE"
        assert metadata["plan_id_now"].startswith("plan-")
        assert list((await plan(api, THREE)).foreign) == ["gpu0/1g.18gb@2"]
        await apply(api, THREE)
        assert theirs in gpu.instances, "the very same"
        assert "gpu0/1g.18gb@2" not in stage.node.world.partitions
        # Taken over by the file that says so, it serves.
        stage.workers["gpu0/1g.18gb@2"] = Worker(tmp_path / "run", "gpu0/1g.18gb@2", 64 << 20)
        exported = await api.call(
            f"{SERVICE}/GetLayout", partition_pb2.GetLayoutRequest(), partition_pb2.Layout
        )
        await apply(api, exported.text)
        assert "gpu0/1g.18gb@2" in stage.node.world.partitions
        assert "gpu0/1g.18gb@2" in stage.fleet.workers
        assert theirs in gpu.instances
        # Ours after a restart too: the marks are in the journal.
        await stage.kill()
        await stage.start()
        assert len(stage.node.world.partitions) == 3

    play(tmp_path, scenario)


def test_cancelled_between_steps_all_is_as_before(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        stall = stage.board.stall("nvmlDeviceCreateGpuInstanceWithPlacement")
        planned = await plan(api, TWO)
        operation = await begin(api, planned.plan_id)
        await until(stall.entered.is_set)
        shown = await api.operation("GetOperation", name=operation.name)
        assert operation_metadata(shown).message == "step 2 of 3: create gpu0/2g.35gb@0"
        assert operation_metadata(shown).stage == model_pb2.OPERATION_STAGE_CUTTING
        await api.operation("CancelOperation", name=operation.name)
        stage.board.clear_injections()
        done = await api.wait(operation)
        assert reason_of(done) == "CANCELLED"
        assert board(stage) == ["whole"]
        await until(lambda: "gpu0" in stage.fleet.workers)
        assert clean(stage)

    play(tmp_path, scenario)


def test_marks_of_another_boot_are_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await apply(api, TWO)
        await stage.kill()
        for module in ("state.remembered_world", "actions.layouts", "actions.layout_changes"):
            monkeypatch.setattr(f"daemon.control.{module}.boot_id", lambda: "another")
        await stage.start()
        assert list(stage.node.world.partitions) == []
        assert "gone since the host was started" in stage.node.world.warnings[0]
        assert board(stage) == ["2g.35gb@0", "3g.71gb@4"], "whatever they are now, they stay"

    play(tmp_path, scenario)


def test_what_cannot_be_done_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        code, reason, _, _ = await refusal(begin(api, "plan-0"))
        assert (code, reason) == (grpc.StatusCode.ABORTED, "PLAN_STALE")
        api.stage.board.inject(Fault(pynvml.NVML_ERROR_NO_PERMISSION, "nvmlDeviceSetMigMode"))
        done = await apply(api, TWO)
        assert reason_of(done) == "DRIVER_PERMISSION"
        assert "CAP_SYS_ADMIN" in done.error.message
        assert board(api.stage) == ["whole"]
        done = await apply(api, WHOLE)
        assert done.HasField("response")

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.NvmlTimeoutError("x"), "GPU_LOST"),
        (errors.ResetNeededError("x"), "RESET_NEEDED"),
        (errors.GpuInUseError("f", 19, "x"), "PARTITION_IN_USE"),
        (errors.ChangeNotMadeError("x"), "LAYOUT_FAILED"),
    ],
)
def test_errors_have_reasons(error: Exception, reason: str) -> None:
    assert refused(error).reason == reason
