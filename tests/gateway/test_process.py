"""The process: starting, being refused, memory, health over gRPC, and the ways it ends."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from daemon.gateway.config import GatewayConfig, read_config
from daemon.gateway.errors import ConfigInvalid
from daemon.gateway.main import main, parse_address
from engine.link.routes import Done, Shutdown
from engine.link.tokens import Finish, Output
from tests.gateway.conftest import CHAT, Scripts
from tests.support.gateway_stage import GatewayStage, until
from tests.support.scripted_worker import Script

PATH = "/v1/chat/completions"
MEMORY_BYTES_MAX = 150 << 20


@pytest.fixture
def own_stage(tmp_path: Path, model_directory: Path) -> Iterator[GatewayStage]:
    """A gateway of this test's own, without a table yet."""
    with GatewayStage(tmp_path, drain_timeout_s=5.0) as stage:
        stage.worker("gpu0", Scripts())
        stage.route("fox@1", model_directory)
        yield stage


def begin(stage: GatewayStage) -> None:
    stage.send_table()
    stage.connected()


def test_readiness_follows_the_table_and_health_follows_readiness(own_stage: GatewayStage) -> None:
    stage = own_stage
    status = health_pb2.HealthCheckResponse.ServingStatus
    assert stage.client.get("/livez").status_code == 200
    assert stage.client.get("/readyz").status_code == 503
    assert stage.client.post(PATH, json=CHAT).status_code == 503
    with grpc.insecure_channel(stage.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def serving() -> int:
            return int(health.Check(health_pb2.HealthCheckRequest(), timeout=5).status)

        assert serving() == status.NOT_SERVING
        begin(stage)
        assert stage.client.get("/readyz").status_code == 200
        until(lambda: serving() == status.SERVING, "health is SERVING")
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert "grpc.health.v1.Health" in services


def test_an_idle_gateway_is_small(own_stage: GatewayStage) -> None:
    begin(own_stage)
    own_stage.workers["gpu0"].script.answer = lambda _: Script(tokens=(70, 71))
    assert own_stage.client.post(PATH, json=CHAT).status_code == 200
    own_stage.client.get("/metrics")
    assert psutil.Process(own_stage.process.pid).memory_info().rss < MEMORY_BYTES_MAX


@pytest.mark.parametrize("how", ["signal", "message"])
def test_ending_lets_open_streams_finish_and_takes_no_new_ones(
    own_stage: GatewayStage, ids: Callable[[str], tuple[int, ...]], how: str
) -> None:
    stage = own_stage
    begin(stage)
    worker = stage.workers["gpu0"]
    worker.script.answer = lambda _: Script(tokens=ids("the"), finish=None)
    with stage.client.stream("POST", PATH, json={**CHAT, "stream": True}) as answer:
        chunks = answer.iter_text()
        said = next(chunks)
        if how == "signal":
            stage.terminate()
        else:
            assert isinstance(stage.ask(Shutdown(drain_timeout_s=5.0)), Done)
        until(lambda: httpx.get(stage.http + "/readyz").status_code == 503, "not ready")
        refused = httpx.post(stage.http + PATH, json=CHAT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert stage.process.poll() is None
        stage.do(_finish(stage))
        said += "".join(chunks)
    assert "[DONE]" in said
    assert stage.process.wait(60) == 0


async def _finish(stage: GatewayStage) -> None:
    worker = stage.workers["gpu0"]
    worker.send(Output(request=worker.submits[0].request, finish=Finish.STOP))


def test_what_is_open_when_the_time_is_up_ends_with_an_error(
    own_stage: GatewayStage, ids: Callable[[str], tuple[int, ...]]
) -> None:
    stage = own_stage
    begin(stage)
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=ids("the"), finish=None)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(stage.client.post, PATH, json=CHAT)
        with stage.client.stream("POST", PATH, json={**CHAT, "stream": True}) as answer:
            chunks = answer.iter_text()
            said = next(chunks)
            until(lambda: len(stage.workers["gpu0"].submits) == 2, "both are open")
            stage.ask(Shutdown(drain_timeout_s=0.1))
            said += "".join(chunks)
        assert '"code":"draining"' in said
        assert "[DONE]" not in said
        assert whole.result(60).status_code == 503
    assert stage.process.wait(60) == 0


def test_an_idle_gateway_ends_at_once(own_stage: GatewayStage) -> None:
    begin(own_stage)
    own_stage.client.get("/livez")  # leaves a connection open
    own_stage.terminate(signal.SIGINT)
    assert own_stage.process.wait(60) == 0


def test_a_killed_gateway_starts_again_in_the_same_directory(own_stage: GatewayStage) -> None:
    own_stage.kill_and_start_again()
    assert own_stage.client.get("/livez").status_code == 200


def test_a_second_gateway_in_the_directory_is_refused(own_stage: GatewayStage) -> None:
    second = own_stage.start_process()
    assert second.wait(20) == 4
    assert "another gateway runs in" in own_stage.log()
    assert own_stage.client.get("/livez").status_code == 200


@pytest.mark.parametrize("flag", ["--http", "--grpc"])
def test_a_taken_port_is_a_clear_error(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        addresses = {"--http": "127.0.0.1:0", "--grpc": "127.0.0.1:0", flag: f"127.0.0.1:{port}"}
        stage = GatewayStage(tmp_path)
        arguments = [part for pair in addresses.items() for part in pair]
        assert stage.start_process(*arguments).wait(20) == 3
    assert f"127.0.0.1:{port}" in stage.log()
    assert f"another {flag}" in stage.log()
    assert "Traceback" not in stage.log()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"body_bytes_max": 0}', "body_bytes_max"),
        ('{"body_bites_max": 1}', "body_bites_max"),
        ('{"request_timeout_s": -1}', "request_timeout_s"),
        ("{", "--config-json"),
        ("/no/such/file", "/no/such/file"),
    ],
)
def test_a_wrong_configuration_names_the_field(text: str, words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        read_config(text)


def test_the_configuration_comes_as_text_or_file(tmp_path: Path) -> None:
    file = tmp_path / "gateway.json"
    file.write_text('{"generation": 9}')
    assert read_config(str(file)) == read_config('{"generation": 9}')
    assert read_config(None) == GatewayConfig()


def test_wrong_arguments_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--runtime-dir", "x", "--http", "nowhere", "--grpc", "127.0.0.1:0"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "HOST:PORT" in capsys.readouterr().err


def test_addresses() -> None:
    assert str(parse_address("127.0.0.1:80")) == "127.0.0.1:80"
    assert str(parse_address("[::1]:0")) == "[::1]:0"
    assert parse_address("[::1]:0").host == "::1"
