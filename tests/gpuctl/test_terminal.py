"""On a real terminal: colours unless NO_COLOR, and progress on standard error alone."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import threading
from collections.abc import Callable

import pytest

from tests.gpuctl.conftest import PROGRAM, environment
from tests.support.scripted_node import ScriptedNode

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
GREEN = "\x1b[32m"


def on_a_terminal(
    node: ScriptedNode,
    *arguments: str,
    stream: str,
    while_running: Callable[[], None] = lambda: None,
    **more: str,
) -> tuple[str, str]:
    """Run gpuctl with `stream` on a terminal; what the terminal and the other stream were sent."""
    ours, theirs = pty.openpty()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: theirs}
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        env=environment(
            HOTBAY_ENDPOINT=node.endpoint, TERM="xterm-256color", COLUMNS="120", **more
        ),
        **streams,  # type: ignore[call-overload]
    )
    os.close(theirs)
    shown: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                shown.append(piece)
        except OSError:
            return  # how Linux says that the other side of a terminal is closed

    reader = threading.Thread(target=read)
    reader.start()
    while_running()
    other, other_err = process.communicate(timeout=60)
    reader.join()
    os.close(ours)
    return b"".join(shown).decode(), (other or other_err or b"").decode()


def test_states_are_coloured_and_no_color_is_heeded(node: ScriptedNode) -> None:
    shown, _ = on_a_terminal(node, "ps", stream="stdout")
    assert GREEN in shown
    plain, _ = on_a_terminal(node, "ps", stream="stdout", NO_COLOR="1")
    assert GREEN not in plain
    assert "ACTIVE" in plain
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)


def test_progress_is_on_standard_error(node: ScriptedNode) -> None:
    node.held = True

    def release_when_watched() -> None:
        with node.changed:
            assert node.changed.wait_for(lambda: node.calls.count("WaitOperation") >= 2, timeout=30)
        node.release("operations/0001")

    shown, out = on_a_terminal(
        node, "swap", "prose", "code", stream="stderr", while_running=release_when_watched
    )
    assert "copying, 256 MiB of 1.00 GiB" in COLOUR.sub("", shown)
    assert out.splitlines()[-1].startswith("swapped prose -> code")
    assert "\x1b" not in out


def test_json_shows_no_progress_even_on_a_terminal(node: ScriptedNode) -> None:
    shown, out = on_a_terminal(node, "swap", "prose", "code", "-o", "json", stream="stderr")
    assert shown == ""
    assert out.startswith("{")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_usage_is_plain_on_a_terminal_too(node: ScriptedNode, stream: str) -> None:
    shown, other = on_a_terminal(node, "swap", "prose", stream=stream)
    assert "Missing argument 'B'" in shown + other
    assert "\x1b" not in shown + other
