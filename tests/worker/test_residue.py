"""What CUDA takes besides the pages: read through the real pynvml, held against the reserve."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine.worker.residue import check_reserve, process_bytes
from partitioner.simulated.install import installed
from partitioner.simulated.node import SimulatedNode
from partitioner.simulation import parse_simulate

MIB, GIB = 1 << 20, 1 << 30
NODE = """
version: 1
gpus:
  - board: h200
    processes: [{pid: 4242, memory_mib: 3000}, {pid: 17, memory_mib: 5}]
  - board: h200
    processes: [{pid: 4242, memory_mib: 96}]
"""


@pytest.fixture
def simulated(tmp_path: Path) -> SimulatedNode:
    path = tmp_path / "node.yaml"
    path.write_text(NODE, encoding="utf-8")
    return SimulatedNode(parse_simulate(str(path)))


def test_a_process_is_counted_on_every_gpu(simulated: SimulatedNode) -> None:
    with installed(simulated):
        assert process_bytes(4242) == 3096 * MIB
        assert process_bytes(17) == 5 * MIB
        assert process_bytes(99) is None


def test_what_is_not_pages_is_held_against_the_reserve(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert check_reserve(12 * GIB, 10 * GIB, 3 * GIB) == 2 * GIB
        assert not [each for each in caplog.records if each.levelno >= logging.ERROR]
        assert check_reserve(14 * GIB, 10 * GIB, 3 * GIB) == 4 * GIB
    assert f"set [worker] workspace_bytes to {4 * GIB} or more" in caplog.text


def test_what_is_not_known_is_not_taken_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert check_reserve(None, 10 * GIB, 3 * GIB) is None
    assert "not known" in caplog.text
