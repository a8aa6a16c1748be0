"""Workers that die, hang, restart or outrun their readers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.link.tokens import STEP_FRAMES_CREDIT, Finish, Submit
from tests.gateway.conftest import CHAT, Scripts
from tests.support.gateway_stage import GatewayStage, until
from tests.support.scripted_worker import Script

Ids = Callable[[str], tuple[int, ...]]
PATH = "/v1/chat/completions"
STREAM = {**CHAT, "stream": True}


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream that ended, [DONE] as an empty one."""
    payloads = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
    return [{} if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def text(happened: list[dict[str, Any]]) -> str:
    """What a stream said."""
    choices = [event["choices"][0] for event in happened if event.get("choices")]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_dies_before_the_first_token_is_not_noticed(
    stage: GatewayStage, ids: Ids, stream: bool
) -> None:
    seen: list[Submit] = []

    def answer(submit: Submit) -> Script:
        seen.append(submit)
        return Script(dies=True) if len(seen) == 1 else Script(tokens=ids("the fox"))

    stage.workers["gpu0"].script.answer = answer
    result = stage.client.post(PATH, json={**CHAT, "stream": stream, "seed": 4})
    assert result.status_code == 200
    said = text(events(result)) if stream else result.json()["choices"][0]["message"]["content"]
    assert said == "the fox"
    assert len(seen) == 2
    assert seen[0].prompt == seen[1].prompt
    assert seen[0].sampling == seen[1].sampling


def test_a_worker_that_dies_after_the_first_token_ends_the_stream_clearly(
    stage: GatewayStage, ids: Ids
) -> None:
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=ids("the fox"), dies=True)
    happened = events(stage.client.post(PATH, json=STREAM))
    assert {} not in happened  # no [DONE]
    assert happened[-1]["error"]["code"] == "worker_lost"
    assert "gpu0" in happened[-1]["error"]["message"]
    assert text(happened[:-1]) == "the fox"
    assert all("error" not in event for event in happened[:-1])
    assert len(stage.workers["gpu0"].submits) == 1  # never sent twice


def test_a_whole_answer_cut_short_is_an_error_not_half_an_answer(
    stage: GatewayStage, ids: Ids
) -> None:
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=ids("the fox"), dies=True)
    answer = stage.client.post(PATH, json=CHAT)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "worker_lost"


@pytest.mark.parametrize(
    ("finish", "status", "code"),
    [(Finish.ERROR, 500, "engine_error"), (Finish.ABORT, 503, "aborted")],
)
def test_what_a_worker_refuses_is_told(
    stage: GatewayStage, finish: Finish, status: int, code: str
) -> None:
    stage.workers["gpu0"].script.answer = lambda _: Script(finish=finish, error="out of luck")
    answer = stage.client.post(PATH, json=STREAM)
    assert answer.status_code == status  # nothing was sent before, so the status can say it
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"] == "out of luck"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_worker_within_a_second(
    stage: GatewayStage, ids: Ids, stream: bool
) -> None:
    worker = stage.workers["gpu0"]
    worker.script.answer = lambda _: Script(tokens=ids("the fox"), finish=None)
    if stream:
        with stage.client.stream("POST", PATH, json={**STREAM, "n": 3}) as answer:
            next(answer.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            stage.client.post(PATH, json={**CHAT, "n": 3}, timeout=0.3)
    until(lambda: len(worker.cancels) == 3, "three cancels", timeout_s=1.0)
    assert not worker.running
    until(lambda: stage.gauge("hotbay_unfinished_requests") == 0, "nothing is unfinished")


def test_a_new_generation_is_connected_to_and_the_old_one_left(
    stage: GatewayStage, ids: Ids
) -> None:
    old = stage.workers["gpu0"]
    old.script.answer = lambda _: Script(finish=None)  # hangs with nothing said
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stage.client.post, PATH, json=CHAT)
        until(lambda: old.submits, "sent to the old one")
        scripts = Scripts()
        scripts.answer = lambda _: Script(tokens=ids("the fox"))
        new = stage.worker("gpu0", scripts)  # the same path, a generation later
        stage.send_table()
        assert answer.result(10).status_code == 200
    assert len(new.submits) == 1
    until(lambda: not old.running, "the old one has been left")


def test_a_partition_that_goes_and_comes_back(
    stage: GatewayStage, say: Callable[..., None]
) -> None:
    say("fox")
    address = stage.addresses.pop("gpu0")
    stage.send_table()
    until(lambda: stage.gauge("hotbay_worker_links") == 0, "the link is closed")
    assert stage.client.get("/readyz").status_code == 200  # no partitions is no reason
    stage.addresses["gpu0"] = address
    stage.send_table()
    assert stage.client.post(PATH, json=CHAT).status_code == 200


def test_credit_is_handed_back_for_as_long_as_a_stream_lasts(
    stage: GatewayStage, ids: Ids, model_directory: Path
) -> None:
    """Far more steps than the credit: without grants the worker would stop."""
    stage.route("fox@1", model_directory, context_tokens=100_000)
    stage.send_table()
    steps = 4 * STEP_FRAMES_CREDIT
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=ids("x") * steps)
    answer = stage.client.post(PATH, json={**CHAT, "max_tokens": steps})
    assert answer.json()["usage"]["completion_tokens"] == steps
    assert stage.workers["gpu0"].outstanding_max <= STEP_FRAMES_CREDIT
    assert sum(stage.workers["gpu0"].grants) > steps - STEP_FRAMES_CREDIT


def slow_reader(stage: GatewayStage, tokens: int) -> socket.socket:
    """A client that asks for a long stream and does not read it."""
    host, _, port = stage.http.removeprefix("http://").rpartition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    sock.settimeout(10)
    body = json.dumps({**STREAM, "max_tokens": tokens}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}"
    sock.sendall(head.encode() + b"\r\n\r\n" + body)
    return sock


@pytest.mark.slow
def test_a_slow_reader_slows_only_itself_and_loses_nothing(
    stage: GatewayStage, ids: Ids, model_directory: Path
) -> None:
    stage.route("fox@1", model_directory, context_tokens=1_000_000)
    stage.send_table()
    worker, tokens = stage.workers["gpu0"], 60_000
    worker.script.answer = lambda submit: Script(
        tokens=ids("x") * submit.sampling.max_tokens, tokens_per_step=8, finish=Finish.LENGTH
    )
    with slow_reader(stage, tokens) as slow:
        # The worker finishes although nobody reads: the gateway keeps the rest, max_tokens at most.
        until(lambda: worker.submits and not worker.running, "the worker has finished", 30)
        began_s = time.monotonic()
        assert stage.client.post(PATH, json={**CHAT, "max_tokens": 5}).status_code == 200
        assert time.monotonic() - began_s < 5
        answer = b""
        while part := slow.recv(1 << 20):
            answer += part
    assert answer.count(b'"content":') >= 1
    said = "".join(
        json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        for line in answer.replace(b"\r\n", b"\n").split(b"\n")
        if line.startswith(b"data: {")
    )
    assert said == "x" * tokens
    assert b"data: [DONE]" in answer


@pytest.fixture
def hurried_stage(tmp_path: Path, model_directory: Path) -> Iterator[GatewayStage]:
    """A gateway that allows a request half a second."""
    with GatewayStage(tmp_path, request_timeout_s=0.5, open_requests_max=2) as stage:
        stage.worker("gpu0", Scripts())
        stage.route("fox@1", model_directory)
        stage.send_table()
        stage.connected()
        yield stage


def test_a_request_ends_at_its_deadline(hurried_stage: GatewayStage, ids: Ids) -> None:
    stage = hurried_stage
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=ids("the"), finish=None)
    answer = stage.client.post(PATH, json=CHAT)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_passed"
    happened = events(stage.client.post(PATH, json=STREAM))
    assert text(happened[:-1]) == "the"
    assert happened[-1]["error"]["code"] == "deadline_passed"
    until(lambda: len(stage.workers["gpu0"].cancels) == 2, "both were cancelled")


def test_open_requests_are_bounded(hurried_stage: GatewayStage) -> None:
    stage = hurried_stage
    stage.workers["gpu0"].script.answer = lambda _: Script(finish=None)
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(stage.client.post, PATH, json=CHAT) for _ in range(2)]
        until(lambda: len(stage.workers["gpu0"].submits) == 2, "two are open")
        refused = stage.client.post(PATH, json=CHAT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_requests"
        assert [answer.result(10).status_code for answer in slow] == [504, 504]
