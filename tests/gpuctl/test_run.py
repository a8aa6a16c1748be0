"""run: one prompt through a gateway over real HTTP."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.gpuctl.conftest import Run, environment
from tests.support.scripted_gateway import ScriptedGateway
from tests.support.scripted_node import ScriptedNode


@pytest.fixture(autouse=True)
def _address(node: ScriptedNode, gateway: ScriptedGateway) -> None:
    node.node.http_address = gateway.address


def test_the_answer_streams_to_standard_output(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.pieces = ["Once", " upon", " a\ntime 🙂"]
    done = gpuctl("run", "prose", "Tell me")
    assert (done.code, done.err) == (0, "")
    assert done.out == "Once upon a\ntime 🙂\n"
    path, body = gateway.requests[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "prose", "stream": True, "messages": [{"role": "user", "content": "Tell me"}],
    }  # fmt: skip


def test_options_reach_the_gateway(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.pieces = ["x"]
    options = ["--system", "Be brief", "--max-tokens", "5", "--temperature", "0", "--seed", "7"]
    assert gpuctl("run", "prose", "Hi", *options).code == 0
    body = gateway.requests[0][1]
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (5, 0.0, 7)
    assert body["messages"][0] == {"role": "system", "content": "Be brief"}


def test_raw_continues_the_text(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.pieces = [" brown", " fox"]
    assert gpuctl("run", "prose", "--raw", "The quick").out == " brown fox\n"
    path, body = gateway.requests[0]
    assert (path, body["prompt"]) == ("/v1/completions", "The quick")


def test_the_prompt_may_come_from_standard_input(gateway: ScriptedGateway, gpuctl: Run) -> None:
    assert gpuctl("run", "prose", "-", stdin="from a pipe\n").code == 0
    assert gateway.requests[0][1]["messages"][0]["content"] == "from a pipe\n"
    assert gpuctl("run", "prose", "-", stdin=b"\xff\xfe").code == 2
    assert gpuctl("run", "prose", "-", stdin="a" * (1024 * 1024 + 1)).code == 2
    assert len(gateway.requests) == 1


def test_json_is_the_gateways_own_answer(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.body = {"object": "chat.completion", "choices": []}
    assert json.loads(gpuctl("run", "prose", "Hi", "-o", "json").out) == gateway.body
    assert gateway.requests[0][1]["stream"] is False


def test_a_model_cannot_steer_the_terminal(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.pieces = ["\x1b]0;owned\x07", "ok"]
    assert gpuctl("run", "prose", "Hi").out == "\\x1b]0;owned\\x07ok\n"


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 2), (401, 5), (404, 3), (413, 2), (429, 7), (500, 1), (503, 7), (504, 8)],
)
def test_the_gateways_refusals_have_exit_codes(
    gateway: ScriptedGateway, gpuctl: Run, status: int, code: int
) -> None:
    gateway.status = status
    gateway.body = {"error": {"message": "no, because", "type": "x"}}
    done = gpuctl("run", "prose", "Hi")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("gpuctl: no, because")


def test_an_unknown_model_is_met_with_the_nearest(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.status = 404
    gateway.body = {"error": {"message": "no model proze"}}
    assert "did you mean 'prose'?" in gpuctl("run", "proze", "Hi").err


def test_when_to_come_back_is_passed_on(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.status, gateway.headers = 503, {"Retry-After": "3"}
    done = gpuctl("run", "prose", "Hi")
    assert done.err == "gpuctl: the gateway answered 503 Service Unavailable\n  retry after 3 s\n"


def test_a_stream_that_breaks_off_is_a_failure(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.pieces, gateway.done = ["Once"], False
    done = gpuctl("run", "prose", "Hi")
    assert (done.code, done.out) == (1, "Once")
    assert "broke off" in done.err


def test_an_error_in_the_stream_is_shown(gateway: ScriptedGateway, gpuctl: Run) -> None:
    gateway.error_event = {"error": {"message": "the worker ended"}}
    gateway.pieces = ["Once"]
    done = gpuctl("run", "prose", "Hi")
    assert (done.code, done.out) == (1, "Once")
    assert "the worker ended" in done.err


def test_a_terminal_that_lacks_a_character_is_shown_its_number(
    gateway: ScriptedGateway, process: Run
) -> None:
    gateway.pieces = ["ünï🙂"]
    done = process("run", "prose", "Hi", PYTHONIOENCODING="ascii")
    assert (done.code, done.out) == (0, "\\xfcn\\xef\\U0001f642\n")


def test_nobody_at_the_gateways_address(
    node: ScriptedNode, gateway: ScriptedGateway, gpuctl: Run
) -> None:
    node.node.http_address = "127.0.0.1:1"
    done = gpuctl("run", "prose", "Hi")
    assert done.code == 6
    assert "127.0.0.1:1" in done.err
    node.node.http_address = ""
    assert gpuctl("run", "prose", "Hi").code == 4


def test_an_address_for_everywhere_is_reached_here(
    node: ScriptedNode, gateway: ScriptedGateway, gpuctl: Run
) -> None:
    port = gateway.address.rpartition(":")[2]
    node.node.http_address = f"http://0.0.0.0:{port}"
    assert gpuctl("run", "prose", "Hi").code == 0


def test_a_reader_that_leaves_is_no_error_of_the_gateways(
    node: ScriptedNode, gateway: ScriptedGateway
) -> None:
    gateway.pieces = ["a line\n"] * 20_000
    command = f"{sys.executable} -m daemon.gpuctl.main run prose Hi | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(HOTBAY_ENDPOINT=node.endpoint),
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "a line\n", "")
