"""A scripted node and gateway, and gpuctl run against them in this process or as one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from daemon.gpuctl.cli import build
from tests.support.scripted_gateway import ScriptedGateway
from tests.support.scripted_node import ScriptedNode

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "daemon.gpuctl.main")


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


def environment(**more: str) -> dict[str, str]:
    """This process's environment with the project importable, and no daemon of the host's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOTBAY")}
    return {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", **more}


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    scripted = ScriptedGateway()
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ScriptedNode]:
    scripted = ScriptedNode(tmp_path / "control.sock")
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture
def gpuctl(node: ScriptedNode) -> Run:
    """gpuctl in this process, without a terminal."""
    return in_process(node.endpoint)


def in_process(endpoint: str) -> Run:
    def run(*arguments: str, stdin: str | bytes = "") -> Ended:
        done = CliRunner().invoke(
            build(),
            list(arguments),
            input=stdin,
            prog_name="gpuctl",
            env={"HOTBAY_ENDPOINT": endpoint},
        )
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Ended(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def process(node: ScriptedNode) -> Run:
    """gpuctl as a process of its own."""

    def run(*arguments: str, **more: str) -> Ended:
        done = subprocess.run(
            [*PROGRAM, *arguments],
            env=environment(HOTBAY_ENDPOINT=node.endpoint, **more),
            capture_output=True,
            text=True,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run
