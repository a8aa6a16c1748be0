"""The load client counts what is there, and every kind of failure as what it is."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from bench.load_client import Load, Report, quantiles, run_load
from engine.link.tokens import Submit
from tests.gateway.conftest import CHAT
from tests.support.gateway_stage import ROOT, GatewayStage
from tests.support.scripted_worker import Script

Ids = Callable[[str], tuple[int, ...]]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def load(
    stage: GatewayStage, bodies: list[dict[str, Any]], path: str = "chat/completions"
) -> Report:
    return asyncio.run(run_load(Load(f"{stage.http}/v1/{path}", bodies, concurrency=8)))


@pytest.mark.parametrize("stream", [False, True])
def test_answers_come_in_the_order_of_the_requests(
    stage: GatewayStage, ids: Ids, stream: bool
) -> None:
    def answer(submit: Submit) -> Script:
        return Script(tokens=ids("fox " * submit.sampling.max_tokens))

    stage.workers["gpu0"].script.answer = answer
    extra = USAGE if stream else {}
    report = load(stage, [{**CHAT, **extra, "max_tokens": count} for count in range(1, 33)])
    assert not report.errors
    assert [answer.text for answer in report.answers] == ["fox " * count for count in range(1, 33)]
    assert [a.tokens for a in report.answers] == [len(ids("fox " * n)) for n in range(1, 33)]
    for answer_ in report.answers:
        assert answer_.status == 200
        assert answer_.started_s <= answer_.first_byte_s <= answer_.ended_s
    summary = report.summary()
    assert summary["tokens"] == report.tokens > 0
    assert set(summary["latency_ms"]) == {"p50", "p90", "p99", "max"}


def test_plain_completions(stage: GatewayStage, say: Callable[..., None]) -> None:
    say("the fox")
    for extra in ({}, USAGE):
        report = load(stage, [{"model": "fox", "prompt": "x", **extra}] * 3, "completions")
        assert [answer.text for answer in report.answers] == ["the fox"] * 3
        assert not report.errors


def test_errors_are_told_apart(stage: GatewayStage, ids: Ids) -> None:
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=ids("the"), dies=True)
    bodies = [{**CHAT, "model": "bat"}, {**CHAT, **USAGE}, {**CHAT, "max_tokens": 0}]
    errors = [answer.error for answer in load(stage, bodies).answers]
    assert errors[0].startswith("404 the model 'bat'")
    assert errors[1].startswith("200 the worker of partition gpu0")
    assert errors[2].startswith("400 max_tokens")


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1/chat/completions"
        report = asyncio.run(run_load(Load(url, [CHAT] * 3, concurrency=2)))
    assert len(report.errors) == 3
    assert "ConnectionRefused" in report.errors[0]


def test_a_stream_cut_short_is_an_error() -> None:
    async def main() -> Report:
        async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            event = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(event) + event)
            writer.close()

        async with await asyncio.start_server(cut, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await run_load(Load(f"http://127.0.0.1:{port}/v1/x", [CHAT] * 2, concurrency=2))

    report = asyncio.run(main())
    assert report.errors == ["the stream ended without [DONE]"] * 2
    assert report.answers[0].text == "a"


def test_quantiles() -> None:
    assert quantiles([]) == {}
    found = quantiles(range(1, 101))
    assert found == {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def test_the_command_prints_json(stage: GatewayStage, say: Callable[..., None]) -> None:
    say("the fox")
    command = [sys.executable, "-m", "bench.load_client", stage.http, "--model", "fox"]
    command += ["--requests", "4", "--concurrency", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=30)
    assert json.loads(done.stdout)["requests"] == 4
    command[-1] = "2"
    bad = subprocess.run([*command, "--model", "bat"], cwd=ROOT, capture_output=True, timeout=30)
    assert bad.returncode == 1
