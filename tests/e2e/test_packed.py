"""A whole node whose host store holds packed images answers as one that holds plain ones."""

from __future__ import annotations

import asyncio

from hotbay.v1 import model_pb2

from tests.e2e.conftest import PROMPTS, NodeMaker
from tests.e2e.test_image_cache import CACHE_BYTES, loads, stopped, written
from tests.e2e.traffic import complete, openai_client

TOKENS = 16
MODELS = ("prose", "code")


async def ask(url: str, model: str) -> list[str]:
    async with openai_client(url) as client:
        return [await complete(client, model, prompt, TOKENS) for prompt in PROMPTS[model][:3]]


def test_packed_images_answer_the_same_and_take_less(start_node: NodeMaker) -> None:
    answers: list[list[str]] = []
    used: list[int] = []
    on_disk: list[int] = []
    copied: list[dict[str, int]] = []
    for packed in (False, True):
        node = start_node(
            config={
                "scheduling": {
                    "max_active_models": 1,
                    "swap_on_demand": False,
                    "stage_ahead": False,
                },
                "worker": {"dtype": "bfloat16"},
                "host_store": {"packed": packed},
                "image_cache": {"budget_bytes": CACHE_BYTES, "keep": "all"},
            },
            load=MODELS,
        )
        texts: list[str] = []
        bytes_: dict[str, int] = {}

        texts += asyncio.run(ask(node.http_url, "prose"))
        for outgoing, incoming in (("prose", "code"), ("code", "prose")):
            node.client.wait(node.client.unload(incoming))  # what is STAGED is not copied again
            dry = node.client.swap(outgoing, incoming, validate_only=True)
            planned = model_pb2.SwapModelResponse()
            assert dry.response.Unpack(planned)
            operation = node.client.wait(node.client.swap(outgoing, incoming))
            response = model_pb2.SwapModelResponse()
            assert operation.response.Unpack(response)
            assert planned.plan.copy_bytes == response.ledger.copied_bytes
            bytes_[incoming] = response.ledger.copied_bytes
            texts += asyncio.run(ask(node.http_url, incoming))
        answers.append(texts)
        used.append(node.client.node().host_store.used_bytes)
        copied.append(bytes_)
        on_disk.append(sum(path.stat().st_size for path in written(node, len(MODELS))))
        node.stop()
    with stopped(node) as node:  # what was ACTIVE is brought back, from the packed image on disk
        assert asyncio.run(ask(node.http_url, "prose")) == answers[0][: len(answers[0]) // 3]
        assert loads(node, "cache") >= 1
        assert loads(node, "checkpoint") == 0
    assert answers[0] == answers[1]
    assert used[1] < 0.8 * used[0]
    assert on_disk == used
    for model in MODELS:
        assert copied[1][model] < 0.8 * copied[0][model]
