"""A GPU in trouble under streams: its partition drains, nothing is lost, and it serves again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import psutil
import pytest
from hotbay.local_node import LocalNode
from hotbay.v1 import health_pb2, partition_pb2, simulation_pb2

from tests.e2e.conftest import PROMPTS, NodeMaker, Oracle
from tests.e2e.traffic import Outcome, one_stream, openai_client

STREAMS = 2
TOKENS = 96
# So long that nothing goes on before the test says so: the driver's own word ends the waiting.
WAITING_S = 3600
BOUND_S = 120.0
TAINTED = partition_pb2.PARTITION_HEALTH_TAINTED


def inject_xid(node: LocalNode, target: str, number: int) -> None:
    xid = simulation_pb2.Xid(number=number)
    node.client.inject(simulation_pb2.InjectRequest(target=target, xid=xid))


def unit_state(node: LocalNode, index: int) -> str:
    unit = node.client.gpus().gpus[index].units[0]
    return health_pb2.HealthState.Name(unit.state).removeprefix("HEALTH_STATE_")


def running(node: LocalNode, partition: str) -> int:
    return sum(each.running for each in node.client.partition(partition).models)


async def soon(condition: Callable[[], bool]) -> None:
    """Wait until the node says so; it is asked in a thread, so that streams go on."""
    deadline_s = time.monotonic() + BOUND_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def traffic(node: LocalNode, oracle: Oracle) -> AsyncIterator[Outcome]:
    """Streams of both models until the block ends; each answer must be right."""
    outcome, stop = Outcome(), asyncio.Event()
    for model in ("prose", "code"):
        for prompt in PROMPTS[model][:STREAMS]:
            oracle.answer(model, prompt, TOKENS)
    async with openai_client(node.http_url) as client:
        streams = [
            asyncio.create_task(
                one_stream(
                    client, model, PROMPTS[model][:STREAMS], TOKENS, oracle.answer, outcome, stop,
                    offset=number,
                )
            )
            for model in ("prose", "code")
            for number in range(STREAMS)
        ]  # fmt: skip
        try:
            await outcome.until(lambda: set(outcome.right) == {"prose", "code"})
            yield outcome
            stop.set()
            await asyncio.gather(*streams)
        finally:
            for stream in streams:
                stream.cancel()
    assert outcome.problems == []


def two_gpus(start_node: NodeMaker) -> LocalNode:
    config = {"health": {"correlation_s": WAITING_S, "poll_interval_s": 0.5}}
    node = start_node(simulate="h200x2", config=config)
    for model, partition in (("prose", "gpu0"), ("code", "gpu1")):
        node.client.wait(node.client.load(model, partition=partition))
    return node


async def drained(node: LocalNode) -> None:
    """Wait until gpu0 waits, drained, for the driver's word."""
    await soon(lambda: unit_state(node, 0) == "RECOVERING")
    assert await asyncio.to_thread(running, node, "gpu0") == 0


async def proven(node: LocalNode, outcome: Outcome) -> None:
    """Let the driver say that it asks for no reset; gpu0 must serve again."""
    await asyncio.to_thread(inject_xid, node, "gpu0", 154)
    await soon(lambda: unit_state(node, 0) == "HEALTHY")
    before = outcome.right["prose"]
    await outcome.until(lambda: outcome.right["prose"] >= before + STREAMS)


def test_a_gpu_in_trouble(start_node: NodeMaker, oracle: Oracle) -> None:
    node = two_gpus(start_node)
    pids = {each.id: each.worker_pid for each in node.client.partitions()}

    async def scenario() -> None:
        async with traffic(node, oracle) as outcome:
            await asyncio.to_thread(inject_xid, node, "gpu0", 109)
            await drained(node)
            partition = await asyncio.to_thread(node.client.partition, "gpu0")
            assert partition.health == TAINTED
            assert "XID 109" in partition.health_reason
            # Its neighbour goes on meanwhile.
            before = outcome.right["code"]
            await outcome.until(lambda: outcome.right["code"] >= before + STREAMS)
            assert unit_state(node, 1) == "HEALTHY"
            assert await asyncio.to_thread(running, node, "gpu0") == 0
            unit = node.client.gpus().gpus[0].units[0]
            assert list(unit.xids) == [109]
            await proven(node, outcome)

    asyncio.run(scenario())
    # Whoever is proven need not start again.
    assert {each.id: each.worker_pid for each in node.client.partitions()} == pids
    assert node.client.node().warnings == []


def test_the_daemon_dies_meanwhile(start_node: NodeMaker, oracle: Oracle) -> None:
    node = two_gpus(start_node)

    async def scenario() -> None:
        async with traffic(node, oracle) as outcome:
            await asyncio.to_thread(inject_xid, node, "gpu0", 109)
            await drained(node)
            await asyncio.to_thread(node.kill)
            await asyncio.to_thread(node.start)
            await drained(node)
            assert node.client.partition("gpu0").health == TAINTED
            await proven(node, outcome)

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_worker_that_does_not_prove_itself_starts_again(
    start_node: NodeMaker, oracle: Oracle
) -> None:
    """Stopped as a stuck one would be: it is ended, and its models come back warm."""
    config = {"health": {"answer_timeout_s": 1, "poll_interval_s": 0.5}}
    node = start_node(simulate="h200x1", config=config, load=("prose",))
    before = node.client.partition("gpu0").worker_pid
    psutil.Process(before).suspend()
    inject_xid(node, "gpu0", 31)

    async def scenario() -> None:
        await soon(lambda: unit_state(node, 0) != "HEALTHY")
        await soon(lambda: unit_state(node, 0) == "HEALTHY")
        async with openai_client(node.http_url) as client:
            stream = await client.completions.create(
                model="prose", prompt=PROMPTS["prose"][0], max_tokens=8, temperature=0
            )
        assert stream.choices[0].text == oracle.answer("prose", PROMPTS["prose"][0], 8)

    asyncio.run(scenario())
    assert node.client.partition("gpu0").worker_pid != before
