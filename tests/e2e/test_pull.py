"""`gpuctl pull` on a real daemon, from a hub on loopback: what comes, is kept, and is said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from hotbay.errors import OperationFailed
from hotbay.local_node import LocalNode
from hotbay.status import operation_metadata

from tests.e2e.conftest import REPOSITORY, NodeMaker, Oracle
from tests.gpuctl.conftest import Ended, in_process
from tests.support.hub import FakeHub, Refusal

PROSE = REPOSITORY / "prose" / "1"
WEIGHTS = "model.safetensors"
WEIGHTS_BYTES = (PROSE / WEIGHTS).stat().st_size
STOP_BYTES = 2 << 20
SETTLE_S = 120.0


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        running.add("acme/Tiny", PROSE, revisions=("main", "v1"))
        yield running


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + SETTLE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def start(start_node: NodeMaker, hub: FakeHub, **models: object) -> LocalNode:
    settings = {"hub_endpoint": hub.endpoint, "patience_s": 2.0, **models}
    return start_node(repository=None, config={"models": settings})


def run(node: LocalNode, *arguments: str) -> Ended:
    return in_process(node.endpoint)(*arguments)


def pullers(node: LocalNode) -> list[psutil.Process]:
    children = psutil.Process(node.pid).children(recursive=True)
    return [each for each in children if "engine.pull.process" in each.cmdline()]


def models_directory(node: LocalNode) -> Path:
    return node.directory / "state" / "models" / "acme--Tiny"


@pytest.mark.slow
def test_what_was_pulled_is_loaded_and_serves(
    start_node: NodeMaker, hub: FakeHub, oracle: Oracle
) -> None:
    node = start(start_node, hub)
    planned = run(node, "pull", "acme/Tiny@v1", "--as", "tiny", "--dry-run")
    assert planned.code == 0, planned.err
    assert planned.out.startswith("plan:      tiny from acme/Tiny@0123456789ab: 5 files, 69")
    assert planned.out.endswith("nothing was changed\n")
    assert not models_directory(node).exists()
    done = run(node, "pull", "acme/Tiny@v1", "--as", "tiny")
    assert done.code == 0, done.err
    operation, sentence = done.out.splitlines()
    assert operation.startswith("operation: operations/")
    assert sentence.startswith("pulled acme/Tiny as tiny@1, now COLD: acme/Tiny@0123456789ab fetch")
    record = operation_metadata(node.client.operation(operation.split()[1]))
    total = sum(path.stat().st_size for path in PROSE.iterdir() if path.name != "training.json")
    assert (record.kind, record.bytes_done, record.bytes_total) == ("pull", total, total)
    assert run(node, "load", "tiny").code == 0
    response = httpx.post(
        f"{node.http_url}/v1/completions",
        json={"model": "tiny", "prompt": "The licence", "max_tokens": 16, "temperature": 0},
        timeout=60,
    )
    assert response.json()["choices"][0]["text"] == oracle.answer("prose", "The licence", 16)
    # Once more, and under another name: nothing is fetched, and nothing is registered twice.
    commit = hub.repositories["acme/Tiny"].commit
    sent = hub.bytes_sent(WEIGHTS)
    assert "was here already" in run(node, "pull", "acme/Tiny", "--as", "tiny").out
    assert [each.version for each in node.client.model("tiny").versions] == [1]
    asked = len(hub.requests)
    assert run(node, "pull", f"acme/Tiny@{commit}", "--as", "other").code == 0
    assert len(hub.requests) == asked  # a commit that is here needs no hub
    assert hub.bytes_sent(WEIGHTS) == sent == WEIGHTS_BYTES
    assert [path.name for path in models_directory(node).iterdir()] == [commit]


@pytest.mark.slow
def test_a_killed_daemons_pull_goes_on_and_a_cancelled_one_leaves_nothing(
    start_node: NodeMaker, hub: FakeHub
) -> None:
    node = start(start_node, hub)
    hub.stop_after[WEIGHTS] = STOP_BYTES
    detached = run(node, "pull", "acme/Tiny", "--as", "tiny", "--detach", "--request-id", "once")
    name = detached.out.strip()
    assert "gpuctl op wait" in detached.err
    assert hub.standing.wait(SETTLE_S)
    until(lambda: operation_metadata(node.client.operation(name)).bytes_done >= STOP_BYTES)
    shown = run(node, "op", "show", name).out.splitlines()
    assert "what:      pull tiny" in shown
    assert any(line.startswith("stage:     fetching, 2.") for line in shown), shown
    assert not any(line.startswith("plan:") for line in shown)
    (child,) = pullers(node)
    assert child.cmdline()[-2:] == ["--for", "acme/Tiny"]
    node.kill()
    child.wait(SETTLE_S)  # it never outlives its daemon
    hub.go_on.set()
    node.start()
    node.client.wait(name)
    starts = [int(sent.range.removeprefix("bytes=").rstrip("-")) for sent in hub.asked(WEIGHTS)[1:]]
    assert len(starts) == 1
    assert starts[0] >= STOP_BYTES
    repeated = run(node, "pull", "acme/Tiny", "--as", "tiny", "--request-id", "once")
    assert name in repeated.out
    assert len(hub.asked(WEIGHTS)) == 2
    (version,) = node.client.model("tiny").versions
    assert (Path(version.directory) / WEIGHTS).read_bytes() == (PROSE / WEIGHTS).read_bytes()
    # Cancelled, another one leaves nothing.
    hub.add("acme/Second", PROSE)
    hub.standing.clear()
    hub.go_on.clear()
    name = run(node, "pull", "acme/Second", "--detach").out.strip()
    assert hub.standing.wait(SETTLE_S)
    again = run(node, "pull", "acme/Second", "--as", "another")
    assert again.code == 4
    assert f"is being changed by {name} (pull, FETCHING)" in again.err
    assert run(node, "op", "cancel", name).code == 0
    with pytest.raises(OperationFailed, match="was cancelled at stage FETCHING"):
        node.client.wait(name)
    assert pullers(node) == []
    assert list(models_directory(node).with_name("acme--Second").iterdir()) == []
    assert [model.name for model in node.client.models()] == ["tiny"]


@pytest.mark.slow
def test_what_goes_wrong_is_said_with_what_to_do(start_node: NodeMaker, hub: FakeHub) -> None:
    node = start(start_node, hub, free_bytes_min=1 << 10)
    config = json.loads((PROSE / "config.json").read_text()) | {"model_type": "mamba"}
    config["architectures"] = ["MambaForCausalLM"]
    hub.add("acme/Mamba", PROSE, files={"config.json": json.dumps(config).encode()})
    hub.add("acme/Gated", PROSE, gated=True)
    hub.add("acme/Cut", PROSE, files={WEIGHTS: (PROSE / WEIGHTS).read_bytes()[:-100]})
    hub.add("acme/Altered", PROSE, files={WEIGHTS: b"a" * 20_000})
    hub.refusals["/api/models/acme/Busy"] = Refusal(429)
    cases = (
        (("acme/None",), 3, "HUB_NOT_FOUND", "shows no repository acme/None"),
        (("acme/Gated",), 5, "HUB_REFUSED", "accept its terms"),
        (("acme/Busy",), 6, "HUB_UNAVAILABLE", "answers 429"),
        (("acme/Mamba",), 4, "ARCH_UNSUPPORTED", "MambaForCausalLM"),
        (("../../etc",), 2, "INVALID_ARGUMENT", "is no repository"),
        (("acme/Tiny", "--as", "a b"), 2, "INVALID_ARGUMENT", "is no model name"),
        (("acme/Cut",), 1, "CHECKPOINT_INVALID", "was cut"),
    )
    for arguments, code, reason, words in cases:
        done = run(node, "pull", *arguments)
        assert (done.code, done.out) == (code, ""), done
        assert done.err.startswith("gpuctl: ")
        assert words in done.err
        assert f"  reason:      {reason}" in done.err
        assert "  what to do:  " in done.err
    hub.sent[WEIGHTS] = b"b" * 20_000
    altered = run(node, "pull", "acme/Altered")
    assert altered.code == 1
    assert "arrived with the hash" in altered.err
    assert "CHECKSUM_MISMATCH" in altered.err
    assert node.client.models() == []
    assert pullers(node) == []
    left = [path for path in models_directory(node).parent.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith(WEIGHTS)], left
