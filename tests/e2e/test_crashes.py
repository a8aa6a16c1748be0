"""Processes killed under traffic: what survives, what is answered, what comes back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest
from hotbay.local_node import LocalNode
from openai import APIError

from tests.e2e.conftest import PROMPTS, REPOSITORY, NodeMaker, Oracle
from tests.e2e.traffic import Outcome, complete, one_stream, openai_client

TOKENS = 24
LONG_TOKENS = 400
WAIT_S = 120.0


def processes(node: LocalNode) -> dict[str, int]:
    """Pids by role and partition."""
    return {
        f"{process.role} {process.partition}".strip(): process.pid
        for process in node.client.node().processes
    }


async def until(condition, timeout_s: float = WAIT_S) -> None:  # type: ignore[no-untyped-def]
    """Poll the node's API; it is the only way to see another process's state."""
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def active(node: LocalNode, model: str) -> bool:
    return any(
        residence.model == f"{model}@1" and residence.state == 4
        for partition in node.client.partitions()
        for residence in partition.models
    )


@pytest.mark.slow
def test_killed_worker_comes_back_warm_and_others_notice_nothing(
    start_node: NodeMaker, oracle: Oracle, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(REPOSITORY, repository)
    node = start_node(
        simulate="h200x2",
        repository=repository,
        config={"scheduling": {"max_active_models": 1}},
    )
    for model, partition in (("prose", "gpu0"), ("code", "gpu1")):
        node.client.wait(node.client.load(model, partition=partition))
    before = processes(node)
    assert {"worker gpu0", "worker gpu1", "gateway", "hotbayd"} <= set(before)

    async def scenario() -> None:
        outcome, stop = Outcome(), asyncio.Event()
        async with openai_client(node.http_url) as client, asyncio.TaskGroup() as group:
            neighbour = [
                group.create_task(
                    one_stream(
                        client, "code", PROMPTS["code"], TOKENS, oracle.answer, outcome, stop
                    )
                )
                for _ in range(4)
            ]
            streams = [
                await client.completions.create(
                    model="prose",
                    prompt="The licence",
                    max_tokens=LONG_TOKENS,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                for _ in range(4)
            ]
            for stream in streams:
                await anext(aiter(stream))  # each has got its first token
            # The checkpoint is gone: whoever comes back does so from memory.
            (repository / "prose" / "1" / "model.safetensors").unlink()
            os.kill(before["worker gpu0"], signal.SIGKILL)
            for stream in streams:
                with pytest.raises(APIError):
                    async for _ in stream:
                        pass
            await until(lambda: active(node, "prose"))
            answer = await complete(client, "prose", "You may copy", TOKENS)
            assert answer == oracle.answer("prose", "You may copy", TOKENS)
            stop.set()
            await asyncio.gather(*neighbour)
        assert outcome.problems == []
        assert outcome.right["code"] > 0

    asyncio.run(scenario())
    after = processes(node)
    assert after["worker gpu1"] == before["worker gpu1"]
    assert after["gateway"] == before["gateway"]
    assert after["worker gpu0"] != before["worker gpu0"]


@pytest.mark.slow
def test_requests_without_a_token_are_replayed_after_a_worker_dies(
    start_node: NodeMaker, oracle: Oracle
) -> None:
    node = start_node(load=("prose",))
    pid = processes(node)["worker gpu0"]

    async def scenario() -> None:
        async with openai_client(node.http_url) as client:
            # A stopped worker takes requests and answers none: none has sent a token.
            os.kill(pid, signal.SIGSTOP)
            tasks = [
                asyncio.create_task(complete(client, "prose", prompt, TOKENS))
                for prompt in PROMPTS["prose"]
            ]
            await asyncio.sleep(0.5)
            assert not any(task.done() for task in tasks)
            os.kill(pid, signal.SIGKILL)
            answers = await asyncio.gather(*tasks)
        expected = [oracle.answer("prose", prompt, TOKENS) for prompt in PROMPTS["prose"]]
        assert answers == expected

    asyncio.run(scenario())


@pytest.mark.slow
def test_worker_killed_in_the_middle_of_a_swap(start_node: NodeMaker, oracle: Oracle) -> None:
    # A slow link, so that there is a middle: 14 MB at 8 MB/s.
    node = start_node(
        config={
            "scheduling": {"max_active_models": 1},
            "worker": {"link_bytes_per_s": 8e6},
        },
        load=("prose", "code"),
    )
    from hotbay.errors import OperationFailed

    operation = node.client.swap("prose", "code")
    time.sleep(0.5)
    os.kill(processes(node)["worker gpu0"], signal.SIGKILL)
    with pytest.raises(OperationFailed, match="worker"):
        node.client.wait(operation)

    async def scenario() -> None:
        await until(lambda: active(node, "prose") or active(node, "code"), 60)
        async with openai_client(node.http_url) as client:
            for model in ("prose", "code"):
                answer = await complete(client, model, PROMPTS[model][0], TOKENS)
                assert answer == oracle.answer(model, PROMPTS[model][0], TOKENS)

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kill", "hand_over"])
def test_ended_daemon_breaks_no_stream_and_is_back_within_two_seconds(
    start_node: NodeMaker, oracle: Oracle, way: str
) -> None:
    node = start_node(config={"scheduling": {"max_active_models": 1}}, load=("prose",))
    before = processes(node)
    url = node.http_url

    async def scenario() -> float:
        outcome, stop = Outcome(), asyncio.Event()
        async with openai_client(url) as client, asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(
                    one_stream(
                        client,
                        "prose",
                        PROMPTS["prose"],
                        TOKENS,
                        oracle.answer,
                        outcome,
                        stop,
                        offset=number,
                    )
                )
            await outcome.until(lambda: outcome.total >= 8)
            await asyncio.to_thread(getattr(node, way))
            total = outcome.total
            # Without a daemon everything that was served is served on.
            await outcome.until(lambda: outcome.total >= total + 16)
            await asyncio.to_thread(node.start)
            # Of the processor's time: on a busy machine others take as much again and more.
            times = psutil.Process(processes(node)["hotbayd"]).cpu_times()
            total = outcome.total
            await outcome.until(lambda: outcome.total >= total + 16)
            stop.set()
        assert outcome.problems == []
        return float(times.user + times.system)

    assert asyncio.run(scenario()) < 2.0
    after = processes(node)
    assert after["gateway"] == before["gateway"]
    assert after["worker gpu0"] == before["worker gpu0"]
    adopted = {p.role: p.adopted for p in node.client.node().processes}
    assert adopted == {"hotbayd": False, "gateway": True, "worker": True}


@pytest.mark.slow
def test_daemon_killed_in_the_middle_of_a_swap_finishes_or_rolls_back(
    start_node: NodeMaker, oracle: Oracle
) -> None:
    node = start_node(
        config={
            "scheduling": {"max_active_models": 1},
            "worker": {"link_bytes_per_s": 8e6},
        },
        load=("prose", "code"),
    )
    operation = node.client.swap("prose", "code")
    time.sleep(0.3)
    node.kill()
    node.start()
    ended = node.client.wait(operation.name)
    assert ended.done
    assert ended.name == operation.name

    async def scenario() -> None:
        async with openai_client(node.http_url) as client:
            for model in ("code", "prose"):
                answer = await complete(client, model, PROMPTS[model][0], TOKENS)
                assert answer == oracle.answer(model, PROMPTS[model][0], TOKENS)

    asyncio.run(scenario())


@pytest.mark.slow
def test_killed_gateway_is_replaced_and_serves(start_node: NodeMaker, oracle: Oracle) -> None:
    node = start_node(load=("prose",))
    before = processes(node)
    os.kill(before["gateway"], signal.SIGKILL)

    async def scenario() -> None:
        def back() -> bool:
            found = processes(node)
            return found.get("gateway", before["gateway"]) != before["gateway"]

        await until(back)

        def ready() -> bool:
            try:
                return httpx.get(f"{node.http_url}/readyz", timeout=1).status_code == 200
            except httpx.HTTPError:
                return False

        await until(ready)
        async with openai_client(node.http_url) as client:
            answer = await complete(client, "prose", "The licence", TOKENS)
        assert answer == oracle.answer("prose", "The licence", TOKENS)

    asyncio.run(scenario())
    assert processes(node)["worker gpu0"] == before["worker gpu0"]
