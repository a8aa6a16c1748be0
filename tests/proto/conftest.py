"""A scripted node on a socket of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hotbay.client import Client

from tests.support.scripted_node import ScriptedNode


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ScriptedNode]:
    scripted = ScriptedNode(tmp_path / "control.sock")
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture
def client(node: ScriptedNode) -> Iterator[Client]:
    with Client(node.endpoint, timeout_s=5) as connected:
        yield connected
