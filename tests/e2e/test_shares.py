"""MPS shares under a serving node: real workers as clients of a real stand-in, faults, kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from hotbay.errors import HotbayError
from hotbay.local_node import LocalNode
from prometheus_client.parser import text_string_to_metric_families

from partitioner.simulated.mps_control import PID_FILE
from partitioner.simulated.mps_texts import FAULT_COMMAND
from tests.e2e.conftest import NodeMaker, Oracle
from tests.e2e.test_layouts import ask, brought_back, names

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 200
SHARED = """
version: 1
gpus:
- index: 0
  shares: [{memory: 70GiB, threads: 50, owner: team-a}, {memory: 16GiB, threads: 50}]
"""
PARTS = ("gpu0/mps0", "gpu0/mps1")


def pipes(node: LocalNode) -> Path:
    return Path(node.endpoint.removeprefix("unix:")).parent / "mps" / "gpu0" / "pipe"


def pid(node: LocalNode) -> int:
    """The control daemon's, 0 while there is none."""
    try:
        return int((pipes(node) / PID_FILE).read_text())
    except (OSError, ValueError):
        return 0


def control(node: LocalNode, command: str) -> str:
    """What a person would type."""
    done = subprocess.run(
        ["env", f"CUDA_MPS_PIPE_DIRECTORY={pipes(node)}", sys.executable, "-m",
         "partitioner.simulated.mps_control"],
        input=command, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout


def clients(node: LocalNode) -> set[int]:
    server = control(node, "get_server_list").strip()
    return {int(word) for word in control(node, f"get_client_list {server}").split()}


def workers(node: LocalNode) -> dict[str, int]:
    return {each.id: each.worker_pid for each in node.client.partitions()}


def watched(node: LocalNode) -> dict[str, int]:
    """The workers that metrics tell of as clients of their share."""
    text = httpx.get(f"{node.http_url}/metrics", timeout=100).text
    return {
        one.labels["partition"]: int(one.labels["pid"])
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == "hotbay_mps_client_info" and one.labels["role"] == "worker"
    }


def until(true: Callable[[], bool], node: LocalNode) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, (workers(node), list(node.client.node().warnings))
        time.sleep(0.05)


def share(node: LocalNode) -> None:
    node.client.wait(node.client.apply_layout(node.client.plan_layout(SHARED).plan_id))


@pytest.mark.slow
def test_workers_are_clients_and_a_fault_ends_with_all_of_them_anew(
    start_node: NodeMaker, oracle: Oracle
) -> None:
    node = start_node(load=("prose",))
    share(node)
    parts = {each.id: each for each in node.client.partitions()}
    assert tuple(parts) == PARTS
    assert brought_back(node, "prose@1") == PARTS[0], "the other share is too small for it"
    assert parts[PARTS[0]].memory_bytes > 4 * parts[PARTS[1]].memory_bytes
    first = workers(node)
    assert clients(node) == set(first.values())
    until(lambda: watched(node) == first, node)
    with pytest.raises(HotbayError, match="memory"):
        node.client.wait(node.client.load("code", partition=PARTS[1]))
    control(node, FAULT_COMMAND)
    until(lambda: not set(workers(node).values()) & {0, *first.values()}, node)
    assert brought_back(node, "prose@1") == PARTS[0]
    asyncio.run(ask(node, oracle))
    assert clients(node) == set(workers(node).values())
    assert any("MPS of gpu0 was in fault" in each for each in node.client.node().warnings)


@pytest.mark.slow
def test_control_daemons_outlive_hotbayd_and_workers_do_not_outlive_them(
    start_node: NodeMaker,
) -> None:
    node = start_node(repository=None)
    share(node)
    first, mps = workers(node), pid(node)
    node.hand_over()
    node.start()
    assert (workers(node), pid(node)) == (first, mps)
    psutil.Process(mps).kill()
    until(lambda: pid(node) not in (0, mps), node)
    until(lambda: not set(workers(node).values()) & {0, *first.values()}, node)
    until(lambda: clients(node) == set(workers(node).values()), node)
    daemon = psutil.Process(pid(node))
    node.stop()
    assert not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_workers_have_multiprocessors_to_themselves_until_the_layout_goes(
    start_node: NodeMaker, oracle: Oracle, tmp_path: Path
) -> None:
    board = tmp_path / "board.yaml"
    board.write_text('version: 1\ndriver_version: "590.44"\ngpus: [{board: h200}]\n')
    node = start_node(simulate=str(board), load=("prose",))
    wish = SHARED.replace("threads: 50, owner", "sm: 96, owner").replace("threads: 50", "sm: 32")
    node.client.wait(node.client.apply_layout(node.client.plan_layout(wish).plan_id))
    assert [each.multiprocessors for each in node.client.partitions()] == [96, 32]
    assert brought_back(node, "prose@1") == PARTS[0]
    asyncio.run(ask(node, oracle))
    assert clients(node) == set(workers(node).values())
    # A fault takes daemon and partitions away; workers come back into new ones.
    first, mps = workers(node), pid(node)
    control(node, FAULT_COMMAND)
    until(lambda: pid(node) not in (0, mps), node)
    until(lambda: not set(workers(node).values()) & {0, *first.values()}, node)
    until(lambda: clients(node) == set(workers(node).values()), node)
    assert brought_back(node, "prose@1") == PARTS[0]
    asyncio.run(ask(node, oracle))
    plain = SHARED.split("  shares")[0]
    node.client.wait(node.client.apply_layout(node.client.plan_layout(plain).plan_id))
    assert names(node) == {"gpu0"}
    assert not (pipes(node) / PID_FILE).exists()


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
    with contextlib.suppress(HotbayError):  # the answer may be lost with the daemon
        node.client.apply_layout(node.client.plan_layout(SHARED).plan_id)
    assert psutil.wait_procs([daemon], timeout=PATIENCE_S)[1] == [], "the point was reached"
    monkeypatch.delenv("HOTBAY_FAILPOINTS")
    node.kill()  # it is dead already; this collects it
    node.start()
    new = point == "cut"
    assert names(node) == (set(PARTS) if new else {"gpu0"})
    assert brought_back(node, "prose@1") in names(node)
    asyncio.run(ask(node, oracle))
    assert (pipes(node) / PID_FILE).exists() == new
    assert node.client.plan_layout(SHARED).changes is not new
