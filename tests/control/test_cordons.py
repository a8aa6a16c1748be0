"""Cordoned GPUs: nothing new comes, what serves goes on, and a new daemon still knows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_proto_pb2 as longrunning
from hotbay.status import operation_metadata
from hotbay.v1 import node_pb2, simulation_pb2

from tests.support.control_api import QUIET, Api, refusal
from tests.support.control_stage import staged, until

SERVICE = "hotbay.v1.NodeService"
ACTIVE = 4


def play(root: Path, scenario: Callable[[Api], Awaitable[None]], *models: str) -> None:
    async def run() -> None:
        async with staged(root, *models, gpus=2, settings=QUIET) as stage:
            async with asyncio.timeout(120):
                path = stage.config().control_socket
                async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                    await scenario(Api(stage, channel))

    asyncio.run(run())


async def cordon(api: Api, gpu: str, **fields: Any) -> Any:
    request = node_pb2.CordonGpuRequest(gpu=gpu, **fields)
    return await api.call(f"{SERVICE}/CordonGpu", request, node_pb2.Gpu)


async def uncordon(api: Api, gpu: str, **fields: Any) -> Any:
    request = node_pb2.UncordonGpuRequest(gpu=gpu, **fields)
    return await api.call(f"{SERVICE}/UncordonGpu", request, node_pb2.Gpu)


def home(api: Api, model: str) -> str:
    return api.stage.node.world.serving.get(f"{model}@1", "")


def test_nothing_new_comes_and_what_serves_goes_on(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await api.wait(await api.model("LoadModel", model="prose", partition="gpu0"))
        gpu = await cordon(api, "gpu0", reason="a fan is replaced", request_id="one")
        assert (gpu.cordoned, gpu.cordon_reason) == (True, "a fan is replaced")
        assert api.stage.gateway.route("prose@1").disposition.value == "serve"
        for call in (
            api.model("LoadModel", model="code", partition="gpu0"),
            api.model("SwapModel", outgoing="prose", incoming="code"),
            api.model("StageModel", model="code", partition="gpu0"),
        ):
            code, reason, metadata, message = await refusal(call)
            assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GPU_CORDONED")
            assert metadata["partition"] == "gpu0"
            assert "a fan is replaced" in message
        # Where nobody names a partition, the other one is taken.
        await api.wait(await api.model("LoadModel", model="code"))
        assert home(api, "code") == "gpu1"
        # By call the same word again, then with another reason: the first one stays.
        assert (await cordon(api, "0", reason="later")).cordon_reason == "a fan is replaced"
        assert not (await uncordon(api, "gpu0", request_id="two")).cordoned
        await api.wait(await api.model("LoadModel", model="third", partition="gpu0"))
        assert home(api, "third") == "gpu0"

    play(tmp_path, scenario, "prose", "code", "third")


def test_all_cordoned_says_so(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        for gpu in ("gpu0", "gpu1"):
            await cordon(api, gpu)
        _, reason, _, _ = await refusal(api.model("LoadModel", model="prose"))
        assert reason == "GPU_CORDONED"
        # Requests for it wait, as they would for a busy GPU, and move once there is room.
        api.stage.gateway.want(prose=1.0)
        await uncordon(api, "gpu1")
        await until(lambda: home(api, "prose") == "gpu1")

    play(tmp_path, scenario, "prose")


def test_the_word_outlives_the_daemon(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await api.wait(await api.model("LoadModel", model="prose", partition="gpu0"))
        await cordon(api, "gpu0", reason="kept")
        await api.stage.kill()
        await api.stage.start()
        assert home(api, "prose") == "gpu0"
        _, reason, _, message = await refusal(
            api.model("LoadModel", model="code", partition="gpu0")
        )
        assert (reason, "kept" in message) == ("GPU_CORDONED", True)
        # A model that lost its worker is brought back there: it was there before.
        worker = api.stage.workers["gpu0"]
        worker.engines.clear()
        await api.stage.fleet.remove("gpu0", 0.0)
        await api.stage.fleet.connect("gpu0")
        await until(lambda: "prose@1" in worker.active())
        await uncordon(api, "gpu0")
        await api.stage.kill()
        await api.stage.start()
        assert not api.stage.node.world.closures.cordons

    play(tmp_path, scenario, "prose", "code")


def test_a_check_changes_nothing_and_unknown_gpus_are_refused(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        assert not (await cordon(api, "gpu1", validate_only=True)).cordoned
        code, reason, _, message = await refusal(cordon(api, "gpu9"))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "GPU_NOT_FOUND")
        assert "gpu0, gpu1" in message
        _, reason, _, _ = await refusal(cordon(api, "gpu0", reason="x" * 501))
        assert reason == "INVALID_ARGUMENT"
        await cordon(api, api.stage.board.gpus[1].uuid, request_id="once")
        await uncordon(api, "gpu1")
        # The first call again: it was carried out, and is not a second time.
        await cordon(api, api.stage.board.gpus[1].uuid, request_id="once")
        assert not api.stage.node.world.closures.cordons
        kinds = [
            operation_metadata(each).kind
            for each in (
                await api.operation("ListOperations", longrunning.ListOperationsResponse)
            ).operations
        ]
        assert sorted(kinds) == ["cordon", "uncordon"]

    play(tmp_path, scenario)


async def inject(api: Api, **fields: Any) -> Any:
    request = simulation_pb2.InjectRequest(**fields)
    method = "hotbay.v1.SimulationService/Inject"
    return await api.call(method, request, simulation_pb2.InjectResponse)


def test_trouble_is_injected_by_call_and_refused_with_a_reason(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        fields = simulation_pb2.HealthFields(recovery_action="node_reboot", uncorrected_errors=2)
        await inject(api, target="gpu1", fields=fields)
        health = api.stage.board.gpus[1].health
        assert (health.recovery_action, health.uncorrected_errors) == (2, 2)
        assert not health.rows_pending
        failure = simulation_pb2.CallFailure(function="nvmlDeviceGetName", error="no-permission")
        told = await inject(api, target="gpu0", failure=failure)
        assert "NO_PERMISSION" in told.message
        for wrong in ({"target": "gpu0"}, {"target": "gpu5", "vanish": simulation_pb2.Vanish()}):
            _, reason, _, _ = await refusal(inject(api, **wrong))
            assert reason == "INVALID_ARGUMENT"
        await api.call(
            "hotbay.v1.SimulationService/Clear",
            simulation_pb2.ClearRequest(),
            simulation_pb2.ClearResponse,
        )
        assert api.stage.board.gpus[1].health.recovery_action == 0

    play(tmp_path, scenario)


def test_real_nodes_do_not_offer_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with staged(tmp_path, start=False) as stage:
            stage.offers_simulation = False
            await stage.start()
            path = stage.config().control_socket
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await inject(Api(stage, channel), target="gpu0", vanish={})
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert not stage.board.gpus[0].lost

    asyncio.run(run())
