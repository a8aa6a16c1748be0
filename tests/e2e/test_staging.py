"""A model that is staged on a real node: by command, ahead of need, and in the way of nobody."""

from __future__ import annotations

import time

import httpx
import pytest
from hotbay.errors import HotbayError
from hotbay.local_node import LocalNode
from hotbay.operations import operation_response
from hotbay.v1 import common_pb2, model_pb2, node_pb2

from tests.e2e.conftest import PROMPTS, NodeMaker, Oracle

TOKENS = 12
STAGED_S = 120.0


def state(node: LocalNode, model: str) -> tuple[int, str]:
    (version,) = node.client.model(model).versions
    return version.state, version.partition


def ask(node: LocalNode, model: str) -> str:
    body = {"model": model, "prompt": PROMPTS[model][0], "max_tokens": TOKENS, "temperature": 0}
    response = httpx.post(f"{node.http_url}/v1/completions", json=body, timeout=60)
    response.raise_for_status()
    text: str = response.json()["choices"][0]["text"]
    return text


def test_a_staged_model_comes_up_without_a_copy(start_node: NodeMaker, oracle: Oracle) -> None:
    scheduling = {"max_active_models": 1, "swap_on_demand": False, "stage_ahead": False}
    node = start_node(config={"scheduling": scheduling}, load=("prose",))
    node.client.wait(node.client.stage("code"))
    assert state(node, "code") == (common_pb2.MODEL_STATE_STAGED, "gpu0")
    pair = ("prose", "code")
    for _ in range(3):
        done = operation_response(node.client.wait(node.client.swap(*pair)))
        assert isinstance(done, model_pb2.SwapModelResponse)
        assert (done.ledger.copied_bytes, done.plan.copy_bytes) == (0, 0)
        assert done.ledger.predicted_ms == done.plan.predicted_ms
        assert state(node, pair[0])[0] == common_pb2.MODEL_STATE_STAGED
        assert ask(node, pair[1]) == oracle.answer(pair[1], PROMPTS[pair[1]][0], TOKENS)
        pair = pair[::-1]
    node.client.wait(node.client.unload(pair[1]))
    assert state(node, pair[1])[0] == common_pb2.MODEL_STATE_STANDBY


def test_of_first_layers_that_are_staged_a_swap_copies_the_rest(
    start_node: NodeMaker, oracle: Oracle
) -> None:
    scheduling = {"max_active_models": 1, "swap_on_demand": False, "stage_ahead": False}
    node = start_node(config={"scheduling": scheduling}, load=("prose",))
    node.client.wait(node.client.load("code", standby=True))
    with pytest.raises(HotbayError, match="layers: it cannot be staged up to layer 99"):
        node.client.stage("code", layers=99)
    node.client.wait(node.client.stage("code", layers=1))
    (version,) = node.client.model("code").versions
    assert version.state == common_pb2.MODEL_STATE_STAGED
    part = version.staged_bytes
    assert 0 < part < version.weights_bytes
    done = operation_response(node.client.wait(node.client.swap("prose", "code")))
    assert isinstance(done, model_pb2.SwapModelResponse)
    assert (done.plan.staged_bytes, done.ledger.staged_bytes) == (part, part)
    assert done.ledger.copied_bytes == done.plan.copy_bytes == version.weights_bytes - part
    assert ask(node, "code") == oracle.answer("code", PROMPTS["code"][0], TOKENS)


def test_standby_models_are_staged_ahead_and_links_calibrated(start_node: NodeMaker) -> None:
    node = start_node(config={"scheduling": {"max_active_models": 1}}, load=("prose",))
    node.client.wait(node.client.load("code", standby=True))
    deadline_s = time.monotonic() + STAGED_S
    while state(node, "code")[0] != common_pb2.MODEL_STATE_STAGED:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    done = operation_response(node.client.wait(node.client.calibrate()))
    assert isinstance(done, node_pb2.CalibrateResponse)
    (link,) = done.links
    assert link.partition == "gpu0"
    assert link.host_to_device_bytes_per_second > 1e6
    assert link.device_to_host_bytes_per_second > 1e6
    assert ask(node, "code")
