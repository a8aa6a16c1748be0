"""hotbayd killed at every named point of an operation: the next one settles it, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib

import psutil
import pytest
from hotbay.errors import HotbayError
from hotbay.status import operation_metadata
from hotbay.v1 import common_pb2

from daemon.control.failpoints import LAYOUT_POINTS, FailPoint
from tests.e2e.conftest import PROMPTS, NodeMaker, Oracle
from tests.e2e.traffic import complete, openai_client

TOKENS = 12


@pytest.mark.slow
@pytest.mark.parametrize("point", [each for each in FailPoint if each not in LAYOUT_POINTS])
def test_killed_at_a_fail_point(
    start_node: NodeMaker, oracle: Oracle, point: FailPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start_node(config={"scheduling": {"max_active_models": 1}}, load=("prose",))
    node.hand_over()
    monkeypatch.setenv("HOTBAY_FAILPOINTS", f"{point.value}=kill")
    node.start()
    daemon = psutil.Process(node.pid)
    with contextlib.suppress(HotbayError):  # the answer may be lost with the daemon
        if point is FailPoint.DRAINED:
            node.client.drain("prose")
        else:
            node.client.swap("prose", "code")
    assert psutil.wait_procs([daemon], timeout=100)[1] == [], "the point was reached"
    monkeypatch.delenv("HOTBAY_FAILPOINTS")
    node.kill()  # it is dead already; this collects it
    node.start()
    (operation,) = [each for each in node.client.operations() if not is_load(each)]
    with contextlib.suppress(HotbayError):  # finished or rolled back, but settled
        node.client.wait(operation, timeout_s=30)
    assert node.client.operation(operation.name).done
    if point is FailPoint.DRAINED:
        node.client.wait(node.client.resume("prose"))

    async def scenario() -> None:
        async with openai_client(node.http_url) as client:
            for model in ("prose", "code"):
                answer = await complete(client, model, PROMPTS[model][0], TOKENS)
                assert answer == oracle.answer(model, PROMPTS[model][0], TOKENS)

    asyncio.run(scenario())
    found = node.client.node()
    digests = [image.digest for image in found.host_store.images]
    assert len(digests) == len(set(digests)) == 2, "no image was left behind or made twice"
    states = [model.versions[0].state for model in node.client.models()]
    assert states.count(common_pb2.MODEL_STATE_ACTIVE) == 1


def is_load(operation) -> bool:  # type: ignore[no-untyped-def]
    return bool(operation_metadata(operation).kind == "load")
