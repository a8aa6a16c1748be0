"""A swap in the middle of streams, and back: no token is missing, and none is computed twice."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field

import httpx
import pytest
from hotbay.local_node import LocalNode
from hotbay.model_calls import InFlight
from hotbay.v1 import common_pb2, model_pb2
from openai import AsyncOpenAI

from tests.e2e.conftest import PROMPTS, NodeMaker, Oracle
from tests.e2e.traffic import openai_client

TOKENS = 240
SWAPS = 3
TOLD_WITHIN_S = 120.0


@dataclass
class Stream:
    """One stream: what it brought, and what it took."""

    prompt: str
    text: str = ""
    computed_tokens: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, client: AsyncOpenAI) -> None:
        chunks = await client.completions.create(
            model="prose",
            prompt=self.prompt,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        finish = None
        async for chunk in chunks:
            for choice in chunk.choices:
                self.text += choice.text
                finish = choice.finish_reason or finish
                self.begun.set()
            if chunk.usage is not None:
                tokens = chunk.usage.prompt_tokens + chunk.usage.completion_tokens
                # The last token drawn is not put through the model, unless a stop token follows.
                self.computed_tokens = tokens - (finish == "length")


def swap(node: LocalNode, outgoing: str, incoming: str, in_flight: InFlight) -> common_pb2.Ledger:
    operation = node.client.wait(
        node.client.swap(outgoing, incoming, in_flight=in_flight, drain_timeout_s=0.0)
    )
    response = model_pb2.SwapModelResponse()
    assert operation.response.Unpack(response)
    return response.ledger


def computed_tokens(url: str) -> int:
    text = httpx.get(f"{url}/metrics", timeout=100).text
    found = re.search(r'hotbay_engine_computed_tokens_total\{model="prose@1".*\} (\S+)', text)
    return int(float(found.group(1))) if found else 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("parking_bytes", [64 << 20, 0])
def test_streams_go_on_after_preserving_swaps(
    start_node: NodeMaker, oracle: Oracle, parking_bytes: int
) -> None:
    # One model's weights and promised KV fit, and little more: KV has to leave the device.
    node = start_node(
        config={
            "scheduling": {"max_active_models": 1, "swap_on_demand": False},
            "worker": {"memory_bytes": 32 << 20, "parking_bytes": parking_bytes},
        },
        load=("prose",),
    )

    async def scenario() -> int:
        streams = [Stream(prompt) for prompt in PROMPTS["prose"]]
        async with openai_client(node.http_url) as client, asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(stream.run(client))
            for stream in streams:
                await stream.begun.wait()
            for number in range(SWAPS):
                policy: InFlight = ("preserve", "drain")[number % 2]  # type: ignore[assignment]
                ledger = await asyncio.to_thread(swap, node, "prose", "code", policy)
                assert ledger.requests_lost == 0
                if number == 0:
                    assert ledger.requests_kept > 0
                if parking_bytes:
                    assert ledger.requests_preserved == ledger.requests_kept
                await asyncio.to_thread(swap, node, "code", "prose", "preserve")
        for stream in streams:
            assert stream.text == oracle.answer("prose", stream.prompt, TOKENS)
        return sum(stream.computed_tokens for stream in streams)

    needed = asyncio.run(scenario())
    deadline = time.monotonic() + TOLD_WITHIN_S
    while computed_tokens(node.http_url) < needed:
        assert time.monotonic() < deadline, "the worker tells its state each second"
        time.sleep(0.05)
    assert computed_tokens(node.http_url) == needed or not parking_bytes
