"""Two models, one active at a time, 32 streams, many swaps: nothing lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hotbay.local_node import LocalNode
from hotbay.v1 import model_pb2

from tests.e2e.conftest import PROMPTS, NodeMaker, Oracle
from tests.e2e.traffic import Outcome, one_stream, openai_client

STREAMS_PER_MODEL = 16
SWAPS = 50
TOKENS = 24
MODELS = ("prose", "code")


async def under_traffic(
    node: LocalNode, oracle: Oracle, body: Callable[[Outcome], Awaitable[None]]
) -> Outcome:
    """Run `body` while 32 streams ask both models, then let every open request end."""
    outcome, stop = Outcome(), asyncio.Event()
    async with openai_client(node.http_url) as client, asyncio.TaskGroup() as group:
        for number in range(STREAMS_PER_MODEL):
            for model in MODELS:
                group.create_task(
                    one_stream(
                        client,
                        model,
                        PROMPTS[model],
                        TOKENS,
                        oracle.answer,
                        outcome,
                        stop,
                        offset=number,
                    )
                )
        try:
            await body(outcome)
        finally:
            stop.set()
    return outcome


def warm(oracle: Oracle) -> None:
    for model in MODELS:
        for prompt in PROMPTS[model]:
            oracle.answer(model, prompt, TOKENS)


def ledger_of(node: LocalNode, outgoing: str, incoming: str) -> model_pb2.SwapModelResponse:
    operation = node.client.wait(node.client.swap(outgoing, incoming))
    response = model_pb2.SwapModelResponse()
    assert operation.response.Unpack(response)
    return response


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_commanded_swaps_under_32_streams(start_node: NodeMaker, oracle: Oracle) -> None:
    warm(oracle)
    node = start_node(
        config={"scheduling": {"max_active_models": 1, "swap_on_demand": False}}, load=MODELS
    )
    responses: list[model_pb2.SwapModelResponse] = []

    async def swaps(outcome: Outcome) -> None:
        for number in range(SWAPS):
            before = outcome.total
            outgoing, incoming = MODELS if number % 2 == 0 else MODELS[::-1]
            responses.append(await asyncio.to_thread(ledger_of, node, outgoing, incoming))
            await outcome.until(lambda before=before: outcome.total >= before + 4)

        # What is held for the model that is away must be answered before the streams can end.
        async def last() -> None:
            await asyncio.sleep(0.2)
            responses.append(await asyncio.to_thread(ledger_of, node, *MODELS))

        ending.append(asyncio.create_task(last()))

    ending: list[asyncio.Task[None]] = []
    outcome = asyncio.run(under_traffic(node, oracle, swaps))
    assert outcome.problems == []
    assert min(outcome.right.values()) >= SWAPS
    assert all(response.ledger.requests_lost == 0 for response in responses)
    assert any(response.ledger.requests_finished > 0 for response in responses)
    # There is room for both: who has left stays on the device, and comes back without a copy.
    assert responses[0].ledger.copied_bytes > 0
    assert all(response.ledger.copied_bytes == 0 for response in responses[2:])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_swaps_on_demand_serve_both_models(start_node: NodeMaker, oracle: Oracle) -> None:
    warm(oracle)
    node = start_node(
        config={"scheduling": {"max_active_models": 1, "min_residency_s": 0.3}}, load=MODELS
    )

    async def wait(outcome: Outcome) -> None:
        await outcome.until(
            lambda: all(outcome.right.get(model, 0) >= 60 for model in MODELS), timeout_s=120
        )

    outcome = asyncio.run(under_traffic(node, oracle, wait))
    assert outcome.problems == []
    kinds = [model_pb2.OperationMetadata() for _ in node.client.operations()]
    for metadata, operation in zip(kinds, node.client.operations(), strict=True):
        operation.metadata.Unpack(metadata)
    on_demand = [metadata for metadata in kinds if metadata.cause == "demand"]
    assert len(on_demand) >= 3, "the models took turns"


def test_swap_names_what_is_wrong(start_node: NodeMaker) -> None:
    from hotbay.errors import Conflict, NotFound

    node = start_node(
        config={"scheduling": {"max_active_models": 1, "swap_on_demand": False}}, load=("prose",)
    )
    with pytest.raises(NotFound, match="prose"):
        node.client.swap("porse", "code")
    with pytest.raises(Conflict):
        node.client.wait(node.client.swap("code", "prose"))
    plan = node.client.swap("prose", "code", validate_only=True)
    response = model_pb2.SwapModelResponse()
    assert plan.response.Unpack(response)
    assert plan.done
    assert response.plan.copy_bytes > 0
    assert response.plan.predicted_ms > 0
    # A plan changes nothing.
    states = {model.name: model.versions[0].state for model in node.client.models()}
    assert states["prose"] == 4
    assert states["code"] != 4
