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
FACT_TIMEOUT_S = 120.0


def on_a_terminal(
    node: ScriptedNode,
    *arguments: str,
    stream: str,
    awaited: str = "",
    then: Callable[[], None] = lambda: None,
    **more: str,
) -> tuple[str, str]:
    """Run gpuctl with `stream` on a terminal; what the terminal and the other stream were sent.

    Once `awaited` was shown there, `then` is called.
    """
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
    shown = bytearray()
    found = threading.Event()

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                shown.extend(piece)
                if awaited in COLOUR.sub("", shown.decode(errors="replace")):
                    found.set()
        except OSError:
            return  # how Linux says that the other side of a terminal is closed

    reader = threading.Thread(target=read)
    reader.start()
    assert not awaited or found.wait(FACT_TIMEOUT_S), awaited
    then()
    other, other_err = process.communicate(timeout=60)
    reader.join()
    os.close(ours)
    return shown.decode(), (other or other_err or b"").decode()


def test_states_are_coloured_and_no_color_is_heeded(node: ScriptedNode) -> None:
    shown, _ = on_a_terminal(node, "ps", stream="stdout")
    assert GREEN in shown
    plain, _ = on_a_terminal(node, "ps", stream="stdout", NO_COLOR="1")
    assert GREEN not in plain
    assert "ACTIVE" in plain
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)


def test_progress_is_on_standard_error(node: ScriptedNode) -> None:
    node.held = True

    _, out = on_a_terminal(
        node,
        *("swap", "prose", "code"),
        stream="stderr",
        awaited="copying, 256 MiB of 1.00 GiB",
        then=lambda: node.release("operations/0001"),
    )
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
