"""Ctrl-C: a real SIGINT to a real process leaves the operation running and names it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from hotbay.v1 import watch_pb2

from tests.gpuctl.conftest import PROGRAM, environment
from tests.support.scripted_node import ScriptedNode


@contextmanager
def started(node: ScriptedNode, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        env=environment(HOTBAY_ENDPOINT=node.endpoint),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell runs in the background ignore it, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_asked(node: ScriptedNode, method: str) -> None:
    """Until a call of `method` has arrived: the process is then inside it."""
    with node.changed:
        arrived = node.changed.wait_for(lambda: method in node.calls, timeout=100)
    assert arrived


def test_ctrl_c_detaches_and_names_the_operation(node: ScriptedNode) -> None:
    node.held = True
    with started(node, "swap", "prose", "code") as process:
        wait_until_asked(node, "WaitOperation")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == [
        "gpuctl: detached; operations/0001 goes on",
        "  wait for it:  gpuctl op wait 0001",
        "  stop it:      gpuctl op cancel 0001",
    ]
    assert not node.operations["operations/0001"].done
    assert "CancelOperation" not in node.calls


def test_ctrl_c_ends_a_follower_quietly(node: ScriptedNode) -> None:
    node.watches = [[watch_pb2.WatchEvent(type=watch_pb2.EVENT_TYPE_SYNCED, resume_token="t")]]
    with started(node, "events", "--follow") as process:
        assert process.stdout is not None
        assert "synced" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err == "gpuctl: interrupted\n"
    assert "Traceback" not in err
