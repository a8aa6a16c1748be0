"""Starting, refusing a second daemon, repeating requests, and ending with nothing left."""

from __future__ import annotations

import subprocess
import sys

import httpx
import psutil
import pytest
from hotbay.errors import InvalidArgument, OperationFailed, Refused
from hotbay.v1 import model_pb2

from tests.e2e.conftest import NodeMaker

HOTBAYD = (sys.executable, "-m", "daemon.control.main")


def test_a_second_daemon_on_the_same_directories_is_refused(start_node: NodeMaker) -> None:
    node = start_node()
    second = subprocess.run(
        [*HOTBAYD, "--config", str(node.directory / "hotbayd.toml")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode != 0
    assert str(node.pid) in second.stderr
    assert "--runtime-dir" in second.stderr
    # The one that runs is not disturbed.
    assert node.client.node().http_address


def test_sigterm_ends_every_process(start_node: NodeMaker) -> None:
    node = start_node(load=("prose",))
    pids = [process.pid for process in node.client.node().processes]
    assert len(pids) >= 3
    node.stop()
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


def test_the_same_request_id_is_the_same_operation(start_node: NodeMaker) -> None:
    node = start_node()
    first = node.client.load("prose", request_id="11111111-0000-4000-8000-000000000001")
    again = node.client.load("prose", request_id="11111111-0000-4000-8000-000000000001")
    assert again.name == first.name
    node.client.wait(first)
    done = node.client.load("prose", request_id="11111111-0000-4000-8000-000000000001")
    assert done.name == first.name
    assert done.done
    with pytest.raises(InvalidArgument) as caught:
        node.client.load("code", request_id="11111111-0000-4000-8000-000000000001")
    assert caught.value.reason == "REQUEST_ID_REUSED"
    # Also after the daemon was killed.
    node.kill()
    node.start()
    restored = node.client.load("prose", request_id="11111111-0000-4000-8000-000000000001")
    assert restored.name == first.name
    loads = [operation for operation in node.client.operations() if kind(operation) == "load"]
    assert len(loads) == 1


def kind(operation) -> str:  # type: ignore[no-untyped-def]
    metadata = model_pb2.OperationMetadata()
    operation.metadata.Unpack(metadata)
    return metadata.kind


def test_load_beside_what_is_active_where_it_fits(start_node: NodeMaker) -> None:
    node = start_node(load=("prose", "code"))
    states = {model.name: model.versions[0].state for model in node.client.models()}
    assert states == {"prose": 4, "code": 4}


def test_load_leaves_a_model_standby_when_only_one_may_be_active(start_node: NodeMaker) -> None:
    node = start_node(
        config={"scheduling": {"max_active_models": 1, "swap_on_demand": False}}, load=("prose",)
    )
    operation = node.client.wait(node.client.load("code"))
    response = model_pb2.ModelOperationResponse()
    assert operation.response.Unpack(response)
    assert response.state == 2
    assert "max_active_models" in response.message


def test_drain_and_resume(start_node: NodeMaker) -> None:
    node = start_node(
        config={"scheduling": {"swap_on_demand": False, "hold_timeout_s": 0.5}}, load=("prose",)
    )
    url = f"{node.http_url}/v1/completions"
    body = {"model": "prose", "prompt": "The licence", "max_tokens": 4}
    assert httpx.post(url, json=body, timeout=100).status_code == 200
    node.client.wait(node.client.drain("prose"))
    held = httpx.post(url, json=body, timeout=100)
    assert held.status_code == 503
    assert "retry-after" in held.headers
    node.client.wait(node.client.resume("prose"))
    assert httpx.post(url, json=body, timeout=100).status_code == 200


def test_unload_gives_everything_back(start_node: NodeMaker) -> None:
    node = start_node(config={"scheduling": {"swap_on_demand": False}})
    before = node.client.partition("gpu0").memory_free_bytes
    node.client.wait(node.client.load("prose"))
    assert node.client.partition("gpu0").memory_free_bytes < before
    node.client.wait(node.client.unload("prose", evict=True))
    assert node.client.partition("gpu0").memory_free_bytes == before
    assert node.client.node().host_store.used_bytes == 0


def test_what_is_to_come_says_unimplemented(start_node: NodeMaker) -> None:
    node = start_node()
    with pytest.raises(Refused) as caught:
        node.client._connection.call(
            node.client._models.SetRoute, model_pb2.SetRouteRequest(model="prose")
        )
    assert caught.value.reason == "NOT_IMPLEMENTED"


def test_a_load_of_an_unknown_partition_changes_nothing(start_node: NodeMaker) -> None:
    node = start_node()
    with pytest.raises((Refused, OperationFailed)) as caught:
        node.client.wait(node.client.load("prose", partition="gpu7"))
    assert caught.value.reason == "PARTITION_NOT_FOUND"
    assert "gpu0" in str(caught.value)
