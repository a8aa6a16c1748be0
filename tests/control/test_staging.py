"""Staging, staging ahead, calibrating and queueing, on a whole node with scripted peers."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from daemon.control.actions import stage_ahead
from daemon.control.actions.stage_ahead import Candidate, Choice, Spare, choose
from daemon.control.errors import ControlError
from daemon.control.services.answers import operation as answer
from daemon.control.state.planning import Staged
from daemon.control.state.records import Cause, Intent, Kind
from engine.link import control
from tests.control.test_conductor import QUIET, begin, do, end, load, play, swap
from tests.support.control_stage import Theatre, until

OFF = QUIET + "stage_ahead = false\n"
MIB = 1 << 20


def test_a_staged_model_is_swapped_in_without_a_copy_and_unloaded(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        operation = await do(stage, Kind.STAGE, incoming="code")
        assert operation.result is not None
        assert (operation.result.state, operation.result.partition) == ("STAGED", "gpu0")
        assert operation.plan.copy_bytes == MIB
        (request,) = stage.worker.stagings
        assert (request.incoming.model, request.displace) == ("code@1", True)
        world = stage.node.world
        code = world.registry["code@1"]
        assert world.state(code) == ("STAGED", "", "gpu0")
        # It is on no partition as far as guarantees go, and nobody waits for it there.
        view = world.view("gpu0")
        assert [each.model for each in view.residents] == ["prose@1"]
        assert view.staged == {"code@1": Staged(MIB, 0)}
        assert "code@1" not in world.placements
        with pytest.raises(ControlError, match="STAGED: only an ACTIVE model"):
            await do(stage, Kind.DRAIN, outgoing=("code",))
        with pytest.raises(ControlError, match="ACTIVE on gpu0 already"):
            await do(stage, Kind.STAGE, incoming="prose")
        swapped = await swap(stage, "prose", "code")
        assert (swapped.failure, swapped.plan.copy_bytes) == (None, 0)
        assert stage.worker.exchanges[-1].keep_staged
        assert world.state(code)[0] == "ACTIVE"
        await do(stage, Kind.STAGE, incoming="prose")
        off = await do(stage, Kind.UNLOAD, outgoing=("prose",))
        assert off.failure is None
        assert stage.worker.exchanges[-1].outgoing == ("prose@1",)
        assert stage.worker.exchanges[-1].discard
        assert world.state(world.registry["prose@1"])[0] == "STANDBY"

    play(tmp_path, scenario, "prose", "code", settings=OFF)


def test_a_model_that_is_too_large_is_not_staged(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.model("large", bytes=str(80 * MIB))
        await stage.start()
        with pytest.raises(Exception, match="large@1 needs"):
            await do(stage, Kind.STAGE, incoming="large")
        with pytest.raises(ControlError, match="no partition 'gpu9'"):
            await do(stage, Kind.STAGE, incoming="prose", partition="gpu9")

    play(tmp_path, scenario, "prose", settings=OFF, start=False)


def test_who_was_active_last_is_staged_first_where_most_is_free() -> None:
    both = frozenset({"a", "b", "c"})
    spares = [Spare("p", MIB, 4, both), Spare("q", MIB, 6, both), Spare("r", MIB, 9, frozenset())]
    candidates = [
        Candidate("a", 2 * MIB, 0.0),
        Candidate("b", 5 * MIB + 1, 7.0),
        Candidate("c", MIB, 5.0),
    ]
    assert choose(spares, candidates) == [Choice("b", "q"), Choice("c", "p")]
    assert choose(spares, candidates[:1]) == [Choice("a", "q")]
    assert choose([], candidates) == []
    # Of what does not fit the first bytes that do; packed weights need room to be unpacked.
    assert choose(spares[:1], candidates[1:2]) == [Choice("b", "p", 4 * MIB)]
    packed = dataclasses.replace(candidates[1], beside_bytes=3 * MIB)
    assert choose(spares[:1], [packed]) == [Choice("b", "p", MIB)]
    assert choose(spares[:1], [dataclasses.replace(packed, beside_bytes=4 * MIB)]) == []
    assert choose([Spare("p", MIB, 0, both)], candidates) == []


def test_standby_models_are_staged_ahead_and_what_was_displaced_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_ahead, "IDLE_S", 0.0)

    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        await load(stage, "code", standby=True)
        world = stage.node.world
        code = world.registry["code@1"]
        await until(lambda: world.state(code)[0] == "STAGED")
        (request,) = stage.worker.stagings
        assert (request.incoming.model, request.displace) == ("code@1", False)
        (record,) = [
            each for each in stage.node.parts.operations.all() if each.intent.kind is Kind.STAGE
        ]
        assert record.intent.cause is Cause.AHEAD
        stage.worker.become("code@1", control.EngineStatus.STANDBY, spare=False)
        await world.worker("gpu0").describe()
        await stage.node.parts.stage_ahead.look()
        assert len(stage.worker.stagings) == 1

    play(tmp_path, scenario, "prose", "code")


def test_calibration_is_remembered_by_the_journal(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        operation = await do(stage, Kind.CALIBRATE)
        assert operation.result is not None
        assert [(each.partition, each.bytes_per_s) for each in operation.result.links] == [
            ("gpu0", 2e9),
            ("gpu1", 2e9),
        ]
        from hotbay.v1 import node_pb2

        response = node_pb2.CalibrateResponse()
        assert answer(operation).response.Unpack(response)
        assert [each.host_to_device_bytes_per_second for each in response.links] == [2e9, 2e9]
        assert [each.device_to_host_bytes_per_second for each in response.links] == [1e9, 1e9]
        with pytest.raises(ControlError, match="no partition"):
            await do(stage, Kind.CALIBRATE, partition="gpu7")
        await stage.kill()
        node = await stage.start()
        assert node.world.history.links["gpu1"].bytes_per_s == 2e9
        assert node.world.history.links["gpu1"].out_bytes_per_s == 1e9

    play(tmp_path, scenario, "prose", gpus=2, settings=OFF)


def test_a_second_swap_is_refused_or_queued_and_other_partitions_go_on(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        for model, partition in (("prose", "gpu0"), ("code", "gpu1")):
            await load(stage, model, partition=partition)
        for worker in stage.workers.values():
            worker.pause_at = control.Stage.COPYING
        first = await begin(stage, Intent(Kind.SWAP, outgoing=("prose",), incoming="extra"))
        second = await begin(stage, Intent(Kind.SWAP, outgoing=("code",), incoming="more"))
        # Both are in the middle of their copies: partitions do not wait for each other.
        for worker in stage.workers.values():
            await worker.paused.wait()
        other = Intent(Kind.LOAD, incoming="last", partition="gpu0")
        with pytest.raises(ControlError) as refused:
            await begin(stage, other)
        assert refused.value.reason == "OPERATION_IN_PROGRESS"
        queued = await begin(
            stage, Intent(Kind.LOAD, incoming="last", partition="gpu0", queue=True)
        )
        assert not queued.done
        for worker in stage.workers.values():
            worker.pause_at = None
            worker.go_on.set()
        ended = await asyncio.gather(*(end(stage, each) for each in (first, second, queued)))
        assert [each.failure for each in ended] == [None, None, None]
        assert stage.workers["gpu0"].active() == ["extra@1", "last@1"]
        assert ended[2].ended_s >= ended[0].ended_s

    play(tmp_path, scenario, "prose", "code", "extra", "more", "last", gpus=2, settings=OFF)


def test_a_swap_tells_what_was_foreseen_and_what_it_took(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        operation = await swap(stage, "prose", "code")
        told = answer(operation)
        from hotbay.v1 import model_pb2

        metadata = model_pb2.OperationMetadata()
        assert told.metadata.Unpack(metadata)
        assert metadata.ledger.predicted_ms == pytest.approx(metadata.plan.predicted_ms)
        assert metadata.ledger.predicted_ms > 0
        text = stage.node.parts.metrics.text()
        assert "hotbay_swap_prediction_ratio_count 2.0" in text

    play(tmp_path, scenario, "prose", "code", settings=OFF)


def test_unloading_what_a_worker_only_keeps_requests_of_ends_these(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        await swap(stage, "prose", "code")
        stage.worker.become("prose@1", control.EngineStatus.STANDBY, spare=False, waiting=2)
        stage.worker.reply(stage.worker.state())
        world = stage.node.world
        await until(lambda: world.kept_on("prose@1") == "gpu0")
        assert world.state(world.registry["prose@1"])[0] == "STANDBY"
        exchanges = len(stage.worker.exchanges)
        off = await do(stage, Kind.UNLOAD, outgoing=("prose",))
        assert off.failure is None
        assert len(stage.worker.exchanges) == exchanges + 1
        assert stage.worker.exchanges[-1].outgoing == ("prose@1",)
        assert stage.worker.exchanges[-1].discard
        assert world.kept_on("prose@1") == ""
        # And once more, when nobody keeps anything: nothing is asked of the worker.
        assert (await do(stage, Kind.UNLOAD, outgoing=("prose",))).failure is None
        assert len(stage.worker.exchanges) == exchanges + 1

    play(tmp_path, scenario, "prose", "code", settings=OFF + "swap_on_demand = false\n")
