"""hotbayd's side: state, tables, custody, metrics, and that its absence disturbs nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.link.routes import (
    PROTOCOL,
    Describe,
    Done,
    DropSegment,
    Failed,
    FetchSegment,
    GatewayLimits,
    KeepSegment,
    SetTable,
)
from engine.link.tokens import Finish, Output
from tests.gateway.conftest import CHAT, hold, serve
from tests.support.gateway_stage import GatewayStage, ScriptedDaemon, until
from tests.support.scripted_worker import Script

PATH = "/v1/chat/completions"


def descriptors(stage: GatewayStage) -> int:
    """How many descriptors the gateway process has."""
    return len(os.listdir(f"/proc/{stage.process.pid}/fd"))


def test_the_gateway_says_who_it_is(stage: GatewayStage) -> None:
    state = stage.ask(Describe())
    assert state.protocol == PROTOCOL
    assert state.pid == stage.process.pid
    assert state.generation == 3
    assert state.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert state.table_version == stage.version
    assert f"http://{state.http}" == stage.http
    assert not state.http.endswith(":0")
    assert not state.grpc.endswith(":0")
    assert (stage.directory / "gateway").stat().st_mode & 0o777 == 0o700


def test_an_older_table_is_ignored(stage: GatewayStage) -> None:
    old = SetTable(stage.version - 1, (), (), GatewayLimits(1.0, 1))
    assert isinstance(stage.ask(old), Done)
    assert len(stage.client.get("/v1/models").json()["data"]) == 2
    assert stage.ask(Describe()).table_version == stage.version


def test_segments_are_kept_handed_back_and_dropped(stage: GatewayStage) -> None:
    before = descriptors(stage)
    segment = os.memfd_create("weights")
    os.write(segment, b"precious")
    identity = os.fstat(segment).st_ino
    for _ in range(3):  # idempotent
        assert isinstance(stage.ask(KeepSegment("sha:1"), segment), Done)
    os.close(segment)
    assert descriptors(stage) == before + 1
    assert stage.ask(Describe()).segments == ("sha:1",)

    done, (back,) = stage.ask(FetchSegment("sha:1"))
    assert isinstance(done, Done)
    assert os.fstat(back).st_ino == identity
    assert os.pread(back, 8, 0) == b"precious"
    os.close(back)

    for _ in range(2):
        assert isinstance(stage.ask(DropSegment("sha:1")), Done)
    assert descriptors(stage) == before
    failed = stage.ask(FetchSegment("sha:1"))
    assert isinstance(failed, Failed)
    assert "sha:1" in failed.message


def test_segments_outlive_hotbayd(stage: GatewayStage) -> None:
    segment = os.memfd_create("weights")
    stage.ask(KeepSegment("sha:2"), segment)
    os.close(segment)
    stage.do(stage.daemon.leave())
    stage.do(stage.daemon.connect())
    assert stage.ask(Describe()).segments == ("sha:2",)
    stage.ask(DropSegment("sha:2"))


def test_a_segment_without_its_descriptor_is_refused(stage: GatewayStage) -> None:
    before = descriptors(stage)
    assert isinstance(stage.ask(KeepSegment("sha:3")), Failed)
    pair = os.memfd_create("a"), os.memfd_create("b")
    assert isinstance(stage.ask(KeepSegment("sha:3"), *pair), Failed)
    for descriptor in pair:
        os.close(descriptor)
    assert descriptors(stage) == before
    assert stage.ask(Describe()).segments == ()


def test_a_newer_connection_replaces_the_older(stage: GatewayStage) -> None:
    older, newer = stage.daemon, ScriptedDaemon(stage.directory / "gateway" / "control.sock")
    stage.do(newer.connect())
    until(lambda: older.closed, "the older is closed")
    stage.daemon = newer
    assert stage.ask(Describe()).pid == stage.process.pid
    stage.do(older.leave())


def test_hotbayds_death_disturbs_nothing(
    stage: GatewayStage, ids: Callable[[str], tuple[int, ...]], model_directory: Path
) -> None:
    worker = stage.workers["gpu0"]
    links = worker.links
    worker.script.answer = lambda submit: (
        Script(tokens=ids("the"), finish=None) if submit.priority else Script(tokens=ids("dog"))
    )
    body = {**CHAT, "stream": True, "priority": 1}
    with stage.client.stream("POST", PATH, json=body) as answer:
        chunks = answer.iter_text()
        said = next(chunks)
        stage.do(stage.daemon.leave())
        assert stage.gauge("hotbay_control_up") == 0
        assert stage.client.get("/readyz").status_code == 200
        assert stage.client.post(PATH, json=CHAT).status_code == 200  # by the last table
        stage.daemon = ScriptedDaemon(stage.directory / "gateway" / "control.sock")
        stage.do(stage.daemon.connect())
        assert stage.ask(Describe()).table_version == stage.version
        stage.send_table()
        stage.do(_say_more(stage, worker.submits[0].request, ids(" fox")))
        said += "".join(chunks)
    assert "[DONE]" in said
    assert "fox" in said
    assert worker.links == links
    assert stage.gauge("hotbay_control_up") == 1


async def _say_more(stage: GatewayStage, request: int, tokens: tuple[int, ...]) -> None:
    stage.workers["gpu0"].send(Output(request=request, tokens=tokens, finish=Finish.STOP))


def test_a_new_hotbayd_is_told_of_demand_that_was_there_before(
    stage: GatewayStage, say: Callable[..., None], model_directory: Path
) -> None:
    say("fox")
    hold(stage, "fox@1", model_directory)
    stage.do(stage.daemon.leave())
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stage.client.post, PATH, json=CHAT)
        until(lambda: stage.gauge("hotbay_held_requests") == 1, "held")
        stage.daemon = ScriptedDaemon(stage.directory / "gateway" / "control.sock")
        stage.do(stage.daemon.connect())
        until(lambda: stage.daemon.demands, "the demand is told")
        assert stage.daemon.demands[0].models[0].model == "fox@1"
        serve(stage, "fox@1", model_directory)
        assert answer.result(10).status_code == 200


def test_metrics_are_the_whole_nodes(stage: GatewayStage, say: Callable[..., None]) -> None:
    say("the fox")
    stage.client.post(PATH, json=CHAT)
    stage.client.post(PATH, json={})
    page = stage.client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.text.splitlines()
    assert "hotbay_swaps_total 7.0" in lines
    assert "hotbay_control_up 1.0" in lines
    counted = [line for line in lines if line.startswith("hotbay_gateway_requests_total")]
    assert any('model="fox@1"' in line and 'code="200"' in line for line in counted)
    assert any('model=""' in line and 'code="400"' in line for line in counted)
    assert stage.gauge("hotbay_time_to_first_token_seconds_count") > 0
    assert stage.gauge("hotbay_inter_token_seconds_count") > 0
    assert stage.gauge("hotbay_worker_links") == 1
    assert stage.gauge("hotbay_open_connections") >= 1


def test_a_silent_hotbayd_does_not_hold_metrics_up(stage: GatewayStage) -> None:
    stage.daemon.metrics_text = None
    try:
        assert stage.gauge("hotbay_control_up") == 0
    finally:
        stage.daemon.metrics_text = "# TYPE hotbay_swaps_total counter\nhotbay_swaps_total 7\n"


@pytest.mark.parametrize("text", ["}{ nonsense", "hotbay_x{ 1"])
def test_metrics_that_do_not_parse_are_left_out(stage: GatewayStage, text: str) -> None:
    stage.daemon.metrics_text = text
    try:
        assert stage.gauge("hotbay_control_up") == 0
        assert text not in stage.client.get("/metrics").text
    finally:
        stage.daemon.metrics_text = "# TYPE hotbay_swaps_total counter\nhotbay_swaps_total 7\n"
