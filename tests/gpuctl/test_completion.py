"""Completion: live names, in time, and silence when there is nobody to ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hotbay.reasons import Reason

from daemon.gpuctl.complete import DEADLINE_S
from tests.gpuctl.conftest import ROOT, Run, in_process
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import Refusal


def offers(gpuctl: Run, *words: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("_GPUCTL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["gpuctl", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    return gpuctl().out.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["load", "p"], ["prose"]),
        (["load", "prose@"], ["prose@1", "prose@production"]),
        (["swap", "prose", "c"], ["code"]),
        (["load", "code", "--partition", "g"], ["gpu0"]),
        (["op", "wait", "00"], ["0001"]),
        (["op", "wait", "operations/"], ["operations/0001"]),
        (["model", "sh"], ["show"]),
        (["load", "x"], []),
    ],
)
def test_live_names_are_offered(
    node: ScriptedNode,
    gpuctl: Run,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    expected: list[str],
) -> None:
    assert gpuctl("swap", "prose", "code").code == 0
    assert offers(gpuctl, *words, endpoint=node.endpoint, monkeypatch=monkeypatch) == expected


def test_no_daemon_no_offers_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"unix:{tmp_path}/none.sock"
    gpuctl = in_process(endpoint)
    assert offers(gpuctl, "load", "p", endpoint=endpoint, monkeypatch=monkeypatch) == []


def test_a_daemon_that_refuses(
    node: ScriptedNode, gpuctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.refusals["ListModels"] = Refusal(Reason.INTERNAL, "no")
    assert offers(gpuctl, "load", "p", endpoint=node.endpoint, monkeypatch=monkeypatch) == []


def test_a_slow_daemon_is_not_waited_for(
    node: ScriptedNode, gpuctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    take = node.take

    def stuck(method: str, request: Any, context: Any) -> None:
        released.wait()
        take(method, request, context)

    node.take = stuck  # type: ignore[method-assign]
    begun = time.monotonic()
    assert offers(gpuctl, "load", "p", endpoint=node.endpoint, monkeypatch=monkeypatch) == []
    assert DEADLINE_S <= time.monotonic() - begun < 10 * DEADLINE_S
    released.set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(gpuctl: Run, shell: str) -> None:
    done = gpuctl("completion", shell)
    assert done.code == 0
    assert "_GPUCTL_COMPLETE" in done.out
    assert gpuctl("completion", "csh").code == 2


def test_bash_itself_completes_a_model(node: ScriptedNode, gpuctl: Run, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    program = tmp_path / "gpuctl"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m daemon.gpuctl.main "$@"\n')
    program.chmod(0o755)
    script = gpuctl("completion", "bash").out
    done = subprocess.run(
        [bash, "--norc", "-c", f"{script}\n"
         "COMP_WORDS=(gpuctl load pr); COMP_CWORD=2\n"
         '_gpuctl_completion gpuctl; echo "${COMPREPLY[@]}"'],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}",
            "HOTBAY_ENDPOINT": node.endpoint,
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("prose\n", "")
