"""The OpenAI door of a whole node: bad requests, cancelled streams, every parameter at once."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from hotbay.local_node import LocalNode
from openai import BadRequestError, NotFoundError, OpenAI

from tests.e2e.conftest import NodeMaker, Oracle
from tests.e2e.traffic import openai_client

CONTEXT = 256


@pytest.fixture
def node(start_node: NodeMaker) -> LocalNode:
    return start_node(
        config={
            "scheduling": {"swap_on_demand": False, "hold_timeout_s": 1.0},
            "worker": {"context_tokens_max": CONTEXT},
            "gateway": {"body_bytes_max": 1 << 20},
        },
        load=("prose",),
    )


PROMPT = {"model": "prose", "prompt": "The licence"}
CHAT = {"model": "prose", "messages": [{"role": "user", "content": "The licence"}]}

BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("no model", "completions", {"prompt": "x"}, "model"),
    ("model of the wrong type", "completions", {"model": 7, "prompt": "x"}, "model"),
    ("no prompt", "completions", {"model": "prose"}, "prompt"),
    ("prompt of the wrong type", "completions", {"model": "prose", "prompt": 1.5}, "prompt"),
    ("no messages", "chat/completions", {"model": "prose"}, "messages"),
    ("empty messages", "chat/completions", {"model": "prose", "messages": []}, "messages"),
    ("temperature in words", "completions", {**PROMPT, "temperature": "hot"}, "temperature"),
    ("max_tokens of 0", "completions", {**PROMPT, "max_tokens": 0}, "max_tokens"),
    ("max_tokens above", "completions", {**PROMPT, "max_tokens": CONTEXT + 1}, "max_tokens"),
    ("max_tokens above, chat", "chat/completions", {**CHAT, "max_tokens": 9999}, "max_tokens"),
    ("a long prompt", "completions", {**PROMPT, "prompt": "word " * 4 * CONTEXT}, "prompt"),
    ("10,000 stop strings", "completions", {**PROMPT, "stop": ["s"] * 10_000}, "stop"),
    ("top_p of 2", "completions", {**PROMPT, "top_p": 2}, "top_p"),
    ("negative top_k", "completions", {**PROMPT, "top_k": -7}, "top_k"),
    ("logprobs of 1,000", "completions", {**PROMPT, "logprobs": 1000}, "logprobs"),
    ("a token id out of range", "completions", {**PROMPT, "prompt": [10**9]}, "prompt"),
]


@pytest.mark.slow
def test_bad_requests_name_their_field(node: LocalNode) -> None:
    with httpx.Client(base_url=f"{node.http_url}/v1/", timeout=100) as client:
        for label, path, body, field in BAD:
            response = client.post(path, json=body)
            assert response.status_code == 400, (label, response.text)
            error = response.json()["error"]
            assert set(error) >= {"message", "type", "param", "code"}, label
            assert (error["param"] or "").split(".")[0] == field, (label, error)
            assert error["message"], label
        for label, content in (
            ("invalid UTF-8", b'{"model": "prose", "prompt": "\xff\xfe"}'),
            ("no JSON", b"{nonsense"),
            ("no object", b"[1]"),
            ("nothing", b""),
        ):
            response = client.post(
                "completions", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 400, (label, response.text)
            assert response.json()["error"]["message"], label
        huge = json.dumps({**PROMPT, "user": "u" * (2 << 20)}).encode()
        response = client.post("completions", content=huge)
        assert response.status_code == 413
        assert "error" in response.json()
        assert client.post("completions", json=PROMPT).status_code == 200


@pytest.mark.slow
def test_unknown_and_absent_models(node: LocalNode) -> None:
    client = OpenAI(base_url=f"{node.http_url}/v1", api_key="none", max_retries=0)
    started_s = time.monotonic()
    with pytest.raises(NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="x")
    assert time.monotonic() - started_s < 1
    assert caught.value.code == "model_not_found"
    with pytest.raises(BadRequestError):
        client.completions.create(model="prose", prompt="x", max_tokens=0)
    listed = {model.id for model in client.models.list()}
    assert {"prose", "code"} <= listed
    assert client.models.retrieve("prose").id == "prose"
    # Known, but neither active nor brought up by demand.
    response = httpx.post(
        f"{node.http_url}/v1/completions", json={"model": "code", "prompt": "x"}, timeout=30
    )
    assert response.status_code == 503
    assert "retry-after" in response.headers


def residence(node: LocalNode) -> tuple[int, int, int]:
    """Running and waiting requests and KV bytes in use on the partition."""
    (found,) = node.client.partition("gpu0").models
    return found.running, found.waiting, found.kv_used_bytes


@pytest.mark.slow
def test_cancelled_streams_free_their_kv_within_a_second(node: LocalNode) -> None:
    async def scenario() -> None:
        async with openai_client(node.http_url) as client:
            streams = [
                await client.completions.create(
                    model="prose",
                    prompt="The licence",
                    max_tokens=CONTEXT - 32,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                for _ in range(6)
            ]
            for stream in streams:
                await anext(aiter(stream))
            for stream in streams:
                await stream.close()
        started_s = time.monotonic()
        while await asyncio.to_thread(residence, node) != (0, 0, 0):
            assert time.monotonic() - started_s < 1, residence(node)
            await asyncio.sleep(0.02)

    asyncio.run(scenario())


@pytest.mark.slow
def test_every_parameter_at_once(node: LocalNode, oracle: Oracle) -> None:
    client = OpenAI(base_url=f"{node.http_url}/v1", api_key="none", max_retries=0)
    settings: dict[str, Any] = {
        "model": "prose",
        "prompt": ["The licence", "You may copy"],
        "max_tokens": 12,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 7,
        "n": 2,
        "logprobs": 3,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logit_bias": {"5": -100},
        "extra_body": {
            "top_k": 20,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "min_tokens": 12,
            "stop_token_ids": [],
            "priority": 1,
        },
    }
    first, second = client.completions.create(**settings), client.completions.create(**settings)
    texts = [choice.text for choice in first.choices]
    assert len(texts) == 4
    assert texts == [choice.text for choice in second.choices], "the same seed, the same tokens"
    assert texts[0] != texts[1], "two samples of one prompt differ"
    assert first.usage is not None
    assert first.usage.completion_tokens == 4 * 12
    logprobs = first.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert all(len(top) >= 3 for top in logprobs.top_logprobs)
    # A stop string ends the answer before it, also where it spans tokens.
    whole = oracle.answer("prose", "The licence", 24)
    stop = whole[10:14]
    cut = client.completions.create(
        model="prose", prompt="The licence", max_tokens=24, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_chat_is_templated_as_transformers_does(node: LocalNode, oracle: Oracle) -> None:
    client = OpenAI(base_url=f"{node.http_url}/v1", api_key="none", max_retries=0)
    question = "What does the licence say about warranty?"
    answer = client.chat.completions.create(
        model="prose",
        messages=[{"role": "user", "content": question}],
        max_tokens=40,
        temperature=0,
    )
    assert answer.choices[0].message.content == oracle.chat("prose", question, 40)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.slow
def test_metrics_are_the_whole_nodes(node: LocalNode) -> None:
    httpx.post(f"{node.http_url}/v1/completions", json={**PROMPT, "max_tokens": 4}, timeout=100)
    url = node.http_url
    text = httpx.get(f"{url}/metrics", timeout=100).text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[:1] != "#"}
    assert any(name.startswith("hotbay_gateway_") for name in names), "the gateway's"
    assert any(name.startswith("hotbay_swap") for name in names), "hotbayd's"
    assert any("kv" in name for name in names), "the workers'"
    assert "hotbay_control_up 1.0" in text
    assert httpx.get(f"{url}/livez", timeout=100).status_code == 200
    assert httpx.get(f"{url}/readyz", timeout=100).status_code == 200
    node.kill()
    alone = httpx.get(f"{url}/metrics", timeout=100).text
    assert "hotbay_control_up 0.0" in alone
    assert "hotbay_gateway_" in alone


LONG = "A licence in many words, read by many and by none to its end. " * 3


@pytest.mark.slow
def test_a_prompt_is_computed_once_for_each_key(node: LocalNode, oracle: Oracle) -> None:
    """Asked again it is found, by whoever shows the same key and salt; usage and metrics say so."""
    expected = oracle.answer("prose", LONG, 6)

    def ask(key: str, **extra: Any) -> Any:
        with OpenAI(base_url=f"{node.http_url}/v1", api_key=key, max_retries=0) as client:
            return client.completions.create(
                model="prose", prompt=LONG, max_tokens=6, temperature=0, **extra
            )

    def details(answer: Any) -> int:
        assert [choice.text for choice in answer.choices] == [expected] * len(answer.choices)
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    first = ask("one")
    prompt = first.usage.prompt_tokens
    assert prompt > 40
    assert details(first) == 0
    assert details(ask("one")) == prompt - 1
    assert details(ask("two")) == 0, "another key does not find it"
    assert details(ask("one", extra_body={"cache_salt": "apart"})) == 0
    # Of four samples the first computes the prompt, and the others only its last token.
    assert details(ask("three", n=4)) == 0
    deadline = time.monotonic() + 120
    needed = (0 + prompt - 1 + 0 + 0) + 3 * (prompt - 1)
    while time.monotonic() < deadline:
        page = httpx.get(f"{node.http_url}/metrics", timeout=100).text
        found = {
            line.split("{")[0]: float(line.rsplit(" ", 1)[1])
            for line in page.splitlines()
            if line.startswith("hotbay_engine_prefix")
        }
        if found.get("hotbay_engine_prefix_hit_tokens_total") == needed:
            break
        time.sleep(0.1)
    assert found["hotbay_engine_prefix_hit_tokens_total"] == needed
    assert found["hotbay_engine_prefix_lookup_tokens_total"] == 8 * prompt
