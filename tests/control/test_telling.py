"""What hotbayd tells of its operations, unasked: watch events and metrics, over the wire."""

from __future__ import annotations

from pathlib import Path

from hotbay.v1 import (
    model_pb2,
    watch_pb2,
)

from engine.link.control import ExchangeResult, Ledger
from tests.support.control_api import Api, play
from tests.support.control_stage import until


def test_watch_over_the_wire(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        watching = api.channel.unary_stream(
            "/hotbay.v1.WatchService/Watch",
            request_serializer=watch_pb2.WatchRequest.SerializeToString,
            response_deserializer=watch_pb2.WatchEvent.FromString,
        )
        stream = watching(watch_pb2.WatchRequest(kinds=["operation", "model"]))
        events = []
        operation = None
        async for event in stream:
            events.append(event)
            if event.type == watch_pb2.EVENT_TYPE_SYNCED:
                operation = await api.model("LoadModel", model="prose")
            if event.kind == "model" and event.model.versions[0].state == 4:
                break
        stages = []
        for event in events:
            if event.kind == "operation":
                metadata = model_pb2.OperationMetadata()
                event.operation.metadata.Unpack(metadata)
                name = model_pb2.OperationStage.Name(metadata.stage)
                stages.append(name.removeprefix("OPERATION_STAGE_"))
                assert operation is None or event.name == operation.name
        expected = ["QUEUED", "PLANNING", "BUILDING", "ATTACHING", "COPYING"]
        assert [each for each in dict.fromkeys(stages) if each in expected] == expected
        revisions = [each.revision for each in events if each.type == 3]
        assert revisions == sorted(set(revisions))
        stream.cancel()
        await until(lambda: api.stage.node.parts.hub.watchers == 0)

    play(tmp_path, scenario, "prose")


def test_each_swaps_ledger_is_an_event_with_its_phases(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await api.wait(await api.model("LoadModel", model="prose"))
        watching = api.channel.unary_stream(
            "/hotbay.v1.WatchService/Watch",
            request_serializer=watch_pb2.WatchRequest.SerializeToString,
            response_deserializer=watch_pb2.WatchEvent.FromString,
        )
        stream = watching(watch_pb2.WatchRequest(kinds=["operation"]))
        async for event in stream:
            if event.type == watch_pb2.EVENT_TYPE_SYNCED:
                break
        for outgoing, incoming in (("prose", "code"), ("code", "prose")):
            begun = await api.model("SwapModel", outgoing=outgoing, incoming=incoming)
            async for event in stream:
                if event.operation.done:
                    break
            assert event.name == begun.name
            metadata = model_pb2.OperationMetadata()
            assert event.operation.metadata.Unpack(metadata)
            told = {phase.name: phase.duration_ms for phase in metadata.ledger.phases}
            assert told.keys() == {"drain", "evict", "link_wait", "copy", "verify"}
            assert (told["copy"], metadata.ledger.total_ms) == (2.0, 3.0)
            assert metadata.ledger.predicted_ms == metadata.plan.predicted_ms > 0
        stream.cancel()

    play(tmp_path, scenario, "prose", "code")


def test_metrics_are_answered_over_the_gateways_link(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        await api.wait(await api.model("LoadModel", model="prose"))
        text = await api.stage.node.metrics()
        assert 'hotbay_swaps_total{outcome="committed"} 1.0' in text
        for phase in ("drain", "evict", "park", "link_wait", "copy", "verify", "total"):
            assert f'hotbay_swap_phase_seconds_count{{phase="{phase}"}} 1.0' in text
        assert 'hotbay_operations_total{cause="api",kind="load",outcome="OK"} 1.0' in text
        assert 'hotbay_engine_running{model="prose@1",partition="gpu0"} 0.0' in text
        for figure in ("preemptions", "preemptions_parked", "graph_capture_seconds"):
            assert f'hotbay_engine_{figure}_total{{model="prose@1",partition="gpu0"}} 0.0' in text
        assert 'hotbay_worker_up{partition="gpu0"} 1.0' in text
        assert "hotbay_host_store_bytes" in text

    play(tmp_path, scenario, "prose")


def test_every_phase_of_a_swap_is_in_the_histogram(tmp_path: Path) -> None:
    ledger = Ledger(
        drain_ms=1.0,
        evict_ms=2.0,
        park_ms=4.0,
        unpark_ms=8.0,
        link_wait_ms=16.0,
        copy_ms=32.0,
        verify_ms=64.0,
        canary_ms=512.0,
        total_ms=128.0,
        first_token_ms=256.0,
    )

    async def scenario(api: Api) -> None:
        metrics = api.stage.node.parts.metrics
        metrics.exchanged(ExchangeResult("operations/1", "code@1", "prose@1", ledger=ledger))
        text = metrics.text()
        told = {field: getattr(ledger, field) for field in ledger.__struct_fields__}
        phases = {name[:-3]: told[name] for name in told if name.endswith("_ms")}
        assert len(phases) == 10
        for phase, milliseconds in phases.items():
            labels = f'hotbay_swap_phase_seconds_sum{{phase="{phase}"}}'
            assert f"{labels} {milliseconds / 1000}" in text

    play(tmp_path, scenario, "prose")
