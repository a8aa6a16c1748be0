"""Bad requests over real HTTP: a 4xx in OpenAI's shape that names the field, and nothing breaks."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.link.routes import Disposition
from tests.gateway.conftest import CHAT, make_model
from tests.support.gateway_stage import GatewayStage

CHAT_PATH = "/v1/chat/completions"
PLAIN_PATH = "/v1/completions"


def refused(answer: httpx.Response, status: int, param: str | None, code: str | None = None) -> str:
    """Check an error's shape; its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    if code is not None:
        assert body["error"]["code"] == code
    assert body["error"]["message"]
    return str(body["error"]["message"])


@pytest.fixture(autouse=True)
def nothing_reaches_the_worker(stage: GatewayStage) -> Iterator[None]:
    yield
    assert not stage.workers["gpu0"].submits
    assert stage.process.poll() is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": None}, "model", ""),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 257}, "max_tokens", "256 tokens"),
        ({"max_tokens": 10**30}, "max_tokens", "256 tokens"),
        ({"max_completion_tokens": 256}, "max_completion_tokens", "at most 248"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "text"),
        (
            {"messages": [CHAT["messages"][0], {"role": "user", "content": 5}]},
            "messages[1].content",
            "",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "text",
        ),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "Unknown role wizard"),
        ({"messages": [{"role": "user", "content": "fox " * 300}]}, "messages", "256 tokens"),
        ({"stop": ["x"] * 10_000}, "stop", "<= 16"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "0 to 299"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "0 to 299"),
        ({"temperature": "hot"}, "temperature", "float"),
        ({"n": 129}, "n", "128"),
    ],
)
def test_bad_chats(stage: GatewayStage, fields: dict[str, Any], param: str, words: str) -> None:
    message = refused(stage.client.post(CHAT_PATH, json={**CHAT, **fields}), 400, param)
    assert words in message


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        (["a", ""], "prompt[1]"),
        ([[]], "prompt"),
        ([1, "a"], "prompt"),
        ([[1], "a"], "prompt"),
        ([1, -1], "prompt"),
        ([[5], [300]], "prompt[1]"),
        ([10**30], "prompt"),
        ("fox " * 300, "prompt"),
        ([5] * 256, "prompt"),
        (["a"] * 129, "prompt"),
        (None, "prompt"),
        ({"text": "a"}, "prompt"),
    ],
)
def test_bad_prompts(stage: GatewayStage, prompt: Any, param: str) -> None:
    refused(stage.client.post(PLAIN_PATH, json={"model": "fox", "prompt": prompt}), 400, param)


def test_samples_times_prompts_are_bounded(stage: GatewayStage) -> None:
    body = {"model": "fox", "prompt": ["a"] * 65, "n": 2}
    assert "130 sequences" in refused(stage.client.post(PLAIN_PATH, json=body), 400, "n")


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"", "invalid_json"), (b"hello", "invalid_json"), (b'{"model": "\xff"}', "invalid_utf8")],
)
def test_bad_bodies(stage: GatewayStage, body: bytes, code: str) -> None:
    refused(stage.client.post(CHAT_PATH, content=body), 400, None, code)


def test_deeply_nested_bodies(stage: GatewayStage) -> None:
    body = b'{"model":"fox","messages":[{"role":"user","content":' + b"[" * 50_000
    assert stage.client.post(CHAT_PATH, content=body).status_code == 400


def test_bodies_over_the_limit_announced_or_not(stage: GatewayStage) -> None:
    body = json.dumps({**CHAT, "user": "x" * 200_000}).encode()

    def parts() -> Iterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    for content in (body, parts()):
        answer = stage.client.post(CHAT_PATH, content=content)
        assert "100000 bytes" in refused(answer, 413, None, "body_too_large")
    # The connection is still good for an honest request.
    refused(stage.client.post(CHAT_PATH, json={}), 400, "model")


def raw(stage: GatewayStage, request: bytes) -> bytes:
    """Send bytes as they are and read until the server has answered and hung up or paused."""
    host, _, port = stage.http.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(request)
        answer = b""
        while part := sock.recv(65536):
            answer += part
            if b"\r\n\r\n" in answer and answer.rstrip().endswith((b"}", b".")):
                break
        return answer


def test_a_body_that_never_comes_times_out(stage: GatewayStage) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"
    answer = raw(stage, head)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


def test_what_is_no_http_is_refused(stage: GatewayStage) -> None:
    assert raw(stage, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/livez/x"])
def test_unknown_paths(stage: GatewayStage, path: str) -> None:
    refused(stage.client.get(path), 404, None, "not_found")


def test_wrong_methods(stage: GatewayStage) -> None:
    refused(stage.client.get(CHAT_PATH), 405, None, "method_not_allowed")
    refused(stage.client.post("/livez"), 405, None, "method_not_allowed")
    assert stage.client.head("/livez").status_code == 200


def test_a_refused_model_says_why(stage: GatewayStage, model_directory: Path) -> None:
    stage.route(
        "fox@1",
        model_directory,
        disposition=Disposition.REFUSE,
        state="FAILED",
        reason="tensor x is missing",
    )
    stage.send_table()
    answer = stage.client.post(CHAT_PATH, json=CHAT)
    assert "tensor x is missing" in refused(answer, 503, "model", "model_unavailable")
    assert int(answer.headers["retry-after"]) > 0


def test_a_model_without_a_tokenizer_or_template(stage: GatewayStage, tmp_path: Path) -> None:
    stage.route("bare@1", tmp_path / "nothing")
    stage.route("mute@1", make_model(tmp_path / "mute", template=None))
    stage.send_table()
    answer = stage.client.post(CHAT_PATH, json={**CHAT, "model": "bare"})
    assert "tokenizer.json" in refused(answer, 500, None, "tokenizer_unusable")
    answer = stage.client.post(CHAT_PATH, json={**CHAT, "model": "mute"})
    assert "/v1/completions" in refused(answer, 400, "messages")


def test_request_ids_are_echoed_when_they_are_sound(stage: GatewayStage) -> None:
    for given, echoed in (("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)):
        answer = stage.client.get("/livez", headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) is echoed


def test_the_openai_client_understands_the_errors(stage: GatewayStage) -> None:
    with (
        openai.OpenAI(base_url=stage.http + "/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.chat.completions.create(
            model="fox", messages=[{"role": "user", "content": "x"}], max_tokens=0
        )
    assert caught.value.param == "max_tokens"
    assert caught.value.type == "invalid_request_error"
