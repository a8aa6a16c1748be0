"""GPUs in trouble, through hotbayd: the real driver thread and journal over scripted workers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hotbay.v1 import health_pb2, node_pb2

from daemon.control.actions.health import _unit
from daemon.control.errors import ProcessFailed
from daemon.control.state.journal import Journal
from engine.link import control
from engine.link.control import EngineStatus, Stage
from partitioner.geometry import Instance
from partitioner.gpu import Gpu, MigInstance
from partitioner.health import HealthState, Unit
from partitioner.simulated import trouble
from tests.control.test_cordons import uncordon
from tests.support.control_api import QUIET, Api, refusal
from tests.support.control_stage import staged, until

# So long that nothing goes on by itself before the test says so.
HEALTH = "[health]\npoll_interval_s = 0.1\ncorrelation_s = 3600\n"
SETTINGS = QUIET + HEALTH


def play(
    root: Path, scenario: Callable[[Api], Awaitable[None]], *models: str, gpus: int = 2
) -> None:
    async def run() -> None:
        async with staged(root, *models, gpus=gpus, settings=SETTINGS) as stage:
            async with asyncio.timeout(120):
                await hearing(stage.board)
                path = stage.config().control_socket
                async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                    await scenario(Api(stage, channel))

    asyncio.run(run())


async def hearing(board: Any) -> None:
    """Until the daemon's thread has registered for every GPU."""
    gpus = len(board.gpus)
    await until(lambda: any(len(each.registered) == gpus for each in sets(board)))


def sets(board: Any) -> list[Any]:
    return list(board.events._sets.values())


def state(api: Api, index: int = 0) -> HealthState:
    gpu = api.stage.board.gpus[index]
    return api.stage.node.world.health.state(Unit(gpu.uuid, index))


async def becomes(api: Api, wanted: HealthState, index: int = 0) -> None:
    await until(lambda: state(api, index) is wanted)


async def load(api: Api, model: str, partition: str = "gpu0") -> None:
    await api.wait(await api.model("LoadModel", model=model, partition=partition))


def disposition(api: Api, model: str) -> str:
    return str(api.stage.gateway.route(f"{model}@1").disposition.value)


async def gpu(api: Api, index: int = 0) -> Any:
    request, answer = node_pb2.ListGpusRequest(), node_pb2.ListGpusResponse
    listed = await api.call("hotbay.v1.NodeService/ListGpus", request, answer)
    return listed.gpus[index]


def home(api: Api, model: str) -> str:
    return api.stage.node.world.serving.get(f"{model}@1", "")


def test_what_asks_for_a_restart_is_paused_proven_and_goes_on(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await load(api, "prose")
        await load(api, "code", "gpu1")
        stage = api.stage
        await until(lambda: disposition(api, "prose") == "serve")
        stage.gateway.tables[:-1] = []
        stage.worker.received.clear()
        stage.workers["gpu1"].received.clear()
        trouble.report_xid(stage.board, "gpu0", 94)
        await until(lambda: "Resume" in stage.worker.received)
        await becomes(api, HealthState.HEALTHY)
        asked = [each for each in stage.worker.received if each != "Describe"]
        assert asked == ["Drain", "MeasureLink", "Resume"]
        await until(lambda: disposition(api, "prose") == "serve")
        # Requests were held from before the drain until the proof.
        assert stage.gateway.history("prose@1") == ["serve", "hold", "serve"]
        assert set(stage.workers["gpu1"].received) <= {"Describe"}
        assert stage.gateway.history("code@1") == ["serve"]
        stage.gateway.metrics = asyncio.get_running_loop().create_future()
        assert stage.fleet.restarted == []
        text = stage.node.parts.metrics.text()
        assert 'hotbay_gpu_xids_total{unit="gpu0",xid="94"} 1.0' in text
        assert 'hotbay_gpu_health_state{state="healthy",unit="gpu0"} 1.0' in text
        told = await gpu(api)
        assert told.readings.recovery_action == "none"
        assert [each.state for each in told.units] == [health_pb2.HEALTH_STATE_HEALTHY]

    play(tmp_path, scenario, "prose", "code")


def test_what_says_nothing_changes_nothing(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await load(api, "prose")
        api.stage.worker.received.clear()
        trouble.report_xid(api.stage.board, "gpu0", 63)
        counted = api.stage.node.world.health.xids
        await until(lambda: counted["gpu0", 63] == 1)
        assert state(api) is HealthState.HEALTHY
        assert "Drain" not in api.stage.worker.received

    play(tmp_path, scenario, "prose")


def test_a_driver_that_asks_for_a_reset_empties_the_gpu(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await load(api, "prose")
        board = api.stage.board
        trouble.set_health(board, "gpu0", "gpu-reset", {})
        await becomes(api, HealthState.NEEDS_OPERATOR)
        await until(lambda: home(api, "prose") == "gpu1")
        assert api.stage.worker.active() == []
        (unit,) = (await gpu(api)).units
        assert (unit.action, list(unit.xids)) == ("reset", [154])
        assert "gpuctl gpu uncordon 0" in unit.reason
        _, reason, metadata, _ = await refusal(
            api.model("LoadModel", model="code", partition="gpu0")
        )
        assert (reason, metadata["partition"]) == ("PARTITION_TAINTED", "gpu0")
        node = await api.call(
            "hotbay.v1.NodeService/GetNode", node_pb2.GetNodeRequest(), node_pb2.Node
        )
        assert any("gpu0 needs an operator" in each for each in node.warnings)
        # Saying that it was done does not make it so.
        await uncordon(api, "gpu0")
        await asyncio.sleep(0)
        assert state(api) is HealthState.NEEDS_OPERATOR
        trouble.set_health(board, "gpu0", "none", {})
        await becomes(api, HealthState.HEALTHY)
        await load(api, "code")
        assert home(api, "prose") == "gpu1"

    play(tmp_path, scenario, "prose", "code")


def test_a_lost_gpu_gets_its_models_back_when_it_returns(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await load(api, "prose")
        trouble.vanish(api.stage.board, "gpu0")
        await becomes(api, HealthState.NEEDS_OPERATOR)
        warnings = api.stage.node.world.warnings
        await until(lambda: warnings)
        assert "prose@1" not in api.stage.node.world.placements
        assert "prose@1 was taken off a GPU in trouble: gpu0 is in trouble" in warnings[0]
        assert (await gpu(api)).health.startswith("lost")
        api.stage.board.clear_injections()
        await becomes(api, HealthState.HEALTHY)
        await until(lambda: home(api, "prose") == "gpu0")
        await until(lambda: not warnings)

    play(tmp_path, scenario, "prose", gpus=1)


def test_a_worker_that_does_not_let_go_of_its_models_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.control.actions.health_steps.UNLOAD_TIMEOUT_S", 0.05)

    async def scenario(api: Api) -> None:
        await load(api, "prose")
        stage = api.stage
        stage.worker.pause_at = Stage.DRAINING
        stage.fleet.restarting = stage.fleet.lose
        try:
            trouble.set_health(stage.board, "gpu0", "gpu-reset", {})
            await until(lambda: home(api, "prose") == "gpu1")
            assert stage.fleet.restarted == ["gpu0"]
            assert state(api) is HealthState.NEEDS_OPERATOR
        finally:
            stage.worker.go_on.set()

    play(tmp_path, scenario, "prose")


def test_who_is_not_proven_starts_again_and_in_the_end_an_operator_is_asked(
    tmp_path: Path,
) -> None:
    async def scenario(api: Api) -> None:
        await load(api, "prose")
        worker = api.stage.worker
        worker.measuring = control.Failed(0, "DEVICE_ERROR", "the device is gone")
        trouble.report_xid(api.stage.board, "gpu0", 31)
        await becomes(api, HealthState.NEEDS_OPERATOR)
        assert api.stage.fleet.restarted == ["gpu0"] * 3
        assert "look at the workers' logs" in (await gpu(api)).units[0].reason
        worker.measuring = None
        await uncordon(api, "gpu0")
        await becomes(api, HealthState.HEALTHY)
        await until(lambda: home(api, "prose") == "gpu0")

    play(tmp_path, scenario, "prose", gpus=1)


def test_a_worker_that_cannot_be_ended_still_ends_with_an_operator(tmp_path: Path) -> None:
    async def stuck(partition: str) -> None:
        raise ProcessFailed("it did not end within 10 s of SIGKILL")

    async def scenario(api: Api) -> None:
        await load(api, "prose")
        api.stage.fleet.restarting = stuck
        api.stage.worker.measuring = control.Failed(0, "DEVICE_ERROR", "the device is gone")
        trouble.report_xid(api.stage.board, "gpu0", 31)
        await becomes(api, HealthState.NEEDS_OPERATOR)
        assert api.stage.fleet.restarted == ["gpu0"] * 3

    play(tmp_path, scenario, "prose", gpus=1)


def test_a_tables_reset_waits_for_the_drivers_word_through_a_restart(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await load(api, "prose")
        trouble.report_xid(stage.board, "gpu0", 109)
        await becomes(api, HealthState.RECOVERING)
        assert stage.worker.engines["prose@1"].status is EngineStatus.STAGED
        await stage.kill()
        journal, contents = await Journal.open(tmp_path / "state")
        await journal.close()
        assert [each.state for each in contents.units] == [HealthState.RECOVERING]
        stage.gateway.tables.clear()
        stage.worker.received.clear()
        await stage.start()
        await hearing(stage.board)
        assert state(api) is HealthState.RECOVERING
        assert stage.gateway.history("prose@1") == ["hold"]
        assert not stage.node.world.placements["prose@1"].drained
        # The driver has nothing to add: XID 154 says that it looked.
        trouble.report_xid(stage.board, "gpu0", 154)
        await becomes(api, HealthState.HEALTHY)
        await until(lambda: stage.worker.active() == ["prose@1"])
        assert "Exchange" not in stage.worker.received, "what is paused is not loaded over"
        await until(lambda: disposition(api, "prose") == "serve")
        await stage.kill()
        journal, contents = await Journal.open(tmp_path / "state")
        await journal.close()
        assert contents.units == ()
        await stage.start()

    play(tmp_path, scenario, "prose")


def test_what_is_cut_on_a_gpu_in_trouble_is_in_trouble(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        world = api.stage.node.world
        trouble.report_xid(api.stage.board, "gpu0", 109)
        await becomes(api, HealthState.RECOVERING)
        cut = dataclasses.replace(world.partitions["gpu0"], id="gpu0/3g.71gb@4")
        world.repartition([cut, world.partitions["gpu1"]])
        await until(lambda: cut.id in world.closures.taints)
        assert set(world.closures.taints) == {cut.id}, "and what is there no more is not"

    play(tmp_path, scenario)


def test_a_table_alone_asks_for_an_operator(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        board = api.stage.board
        trouble.set_health(board, "gpu1", "untold", {})
        trouble.report_xid(board, "gpu1", 119)
        await becomes(api, HealthState.NEEDS_OPERATOR, 1)
        assert state(api, 0) is HealthState.HEALTHY
        await uncordon(api, "gpu1")
        await becomes(api, HealthState.HEALTHY, 1)

    play(tmp_path, scenario)


def test_a_swap_under_way_is_taken_back_first(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await load(api, "prose")
        worker = api.stage.worker
        worker.pause_at = Stage.COPYING
        begun = await api.model("SwapModel", outgoing="prose", incoming="code")
        await asyncio.wait_for(worker.paused.wait(), 60)
        trouble.report_xid(api.stage.board, "gpu0", 13)
        ended = await api.wait(begun)
        assert ended.error.message
        assert worker.abandoned
        await until(lambda: "MeasureLink" in worker.received)
        await becomes(api, HealthState.HEALTHY)
        await until(lambda: home(api, "prose") == "gpu0")

    play(tmp_path, scenario, "prose", "code")


def test_fields_warn_and_a_gpu_without_spare_rows_is_given_up(tmp_path: Path) -> None:
    async def warnings(api: Api) -> str:
        request = node_pb2.GetNodeRequest()
        node = await api.call("hotbay.v1.NodeService/GetNode", request, node_pb2.Node)
        return "\n".join(node.warnings)

    async def scenario(api: Api) -> None:
        board, book = api.stage.board, api.stage.node.world.health
        changes = {"thermal_slowdown": True, "power_slowdown": True, "rows_pending": True}
        trouble.set_health(board, "gpu0", None, changes)
        uuid = board.gpus[0].uuid
        await until(lambda: uuid in book.readings and book.readings[uuid].rows_pending)
        text = await warnings(api)
        for words in ("by heat", "power supply", "next reset"):
            assert words in text
        assert state(api) is HealthState.HEALTHY
        trouble.set_health(board, "gpu0", None, {"rows_failed": True})
        await becomes(api, HealthState.NEEDS_OPERATOR)
        assert "have it replaced" in await warnings(api)

    play(tmp_path, scenario)


@pytest.mark.parametrize(("number", "place"), [(1, "3g.71gb@4"), (9, ""), (None, "")])
def test_an_xid_concerns_the_instance_that_it_names(number: int | None, place: str) -> None:
    instance = MigInstance(1, Instance(4, 4, "3g.71gb"), "MIG-1", 0, 0)
    unit = _unit(Gpu("GPU-a", 3, instances=(instance,)), number)
    assert unit == Unit("GPU-a", 3, place)
