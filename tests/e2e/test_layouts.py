"""GPUs cut anew under a serving node, with real processes and kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import time

import psutil
import pytest
from hotbay.errors import HotbayError
from hotbay.local_node import LocalNode
from hotbay.operations import operation_response
from hotbay.v1 import partition_pb2

from tests.e2e.conftest import PROMPTS, NodeMaker, Oracle
from tests.e2e.traffic import complete, openai_client

TOKENS = 12
TWO = """
version: 1
gpus:
- index: 0
  partitions: [{profile: 3g.71gb, start: 4}, {profile: 2g.35gb, start: 0}]
"""
ONE = "version: 1\ngpus:\n- index: 0\n  partitions: [{profile: 3g.71gb, start: 4}]\n"
CUT = {"gpu0/2g.35gb@0", "gpu0/3g.71gb@4"}


def names(node: LocalNode) -> set[str]:
    return {each.id for each in node.client.partitions()}


def homes(node: LocalNode) -> dict[str, str]:
    return {
        model.model: each.id for each in node.client.partitions() for model in each.models
        if model.state == 4
    }  # fmt: skip


def brought_back(node: LocalNode, model: str) -> str:
    deadline_s = time.monotonic() + 120
    while model not in homes(node):
        assert time.monotonic() < deadline_s, node.client.node().warnings
        time.sleep(0.02)
    return homes(node)[model]


async def ask(node: LocalNode, oracle: Oracle) -> None:
    async with openai_client(node.http_url) as client:
        answer = await complete(client, "prose", PROMPTS["prose"][0], TOKENS)
    assert answer == oracle.answer("prose", PROMPTS["prose"][0], TOKENS)


def test_recut(start_node: NodeMaker, oracle: Oracle) -> None:
    node = start_node(load=("prose",))
    plan = node.client.plan_layout(TWO)
    assert list(plan.move) == ["gpu0"]
    done = node.client.wait(node.client.apply_layout(plan.plan_id))
    response = operation_response(done)
    assert isinstance(response, partition_pb2.ApplyLayoutResponse)
    assert (set(response.created), list(response.moved)) == (CUT, ["prose@1"])
    assert names(node) == CUT
    home = brought_back(node, "prose@1")
    asyncio.run(ask(node, oracle))
    pids = {each.id: each.worker_pid for each in node.client.partitions()}
    if home == "gpu0/2g.35gb@0":
        node.client.wait(node.client.unload("prose"))
        node.client.wait(node.client.load("prose", partition="gpu0/3g.71gb@4"))
    # The daemon is replaced: it finds the instances, their marks and their workers again.
    node.hand_over()
    node.start()
    assert names(node) == CUT
    assert {each.id: each.worker_pid for each in node.client.partitions()} == pids

    async def under_traffic() -> None:
        """An instance that is in both layouts serves on while its neighbour goes."""
        async with openai_client(node.http_url) as client:
            running = [
                asyncio.create_task(complete(client, "prose", PROMPTS["prose"][0], 48))
                for _ in range(4)
            ]
            plan_id = node.client.plan_layout(ONE).plan_id
            await asyncio.to_thread(node.client.wait, node.client.apply_layout(plan_id))
            answers = await asyncio.gather(*running)
        assert set(answers) == {oracle.answer("prose", PROMPTS["prose"][0], 48)}

    asyncio.run(under_traffic())
    (left,) = node.client.partitions()
    assert (left.id, left.worker_pid) == ("gpu0/3g.71gb@4", pids["gpu0/3g.71gb@4"])
    assert not node.client.plan_layout(ONE).changes


@pytest.mark.slow
@pytest.mark.parametrize("point", ["cleared", "cut"])
def test_killed(
    start_node: NodeMaker, oracle: Oracle, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start_node(load=("prose",))
    node.hand_over()
    monkeypatch.setenv("HOTBAY_FAILPOINTS", f"{point}=kill")
    node.start()
    daemon = psutil.Process(node.pid)
    plan_id = node.client.plan_layout(TWO).plan_id
    with contextlib.suppress(HotbayError):  # the answer may be lost with the daemon
        node.client.apply_layout(plan_id)
    assert psutil.wait_procs([daemon], timeout=100)[1] == [], "the point was reached"
    monkeypatch.delenv("HOTBAY_FAILPOINTS")
    node.kill()  # it is dead already; this collects it
    node.start()
    new = point == "cut"
    assert names(node) == (CUT if new else {"gpu0"})
    assert brought_back(node, "prose@1") in names(node)
    asyncio.run(ask(node, oracle))
    assert node.client.plan_layout(TWO).changes is not new
    assert [each.done for each in node.client.operations()].count(False) == 0
