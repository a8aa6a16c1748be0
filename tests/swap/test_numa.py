"""NUMA preferences: asked of the kernel where there is a choice, and never otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from swap.numa import nodes, prefer_node


def host(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).mkdir()
    return directory


def test_nodes_are_those_the_system_lists(tmp_path: Path) -> None:
    assert nodes(host(tmp_path, "node1", "node0", "node10", "power", "nodes")) == (0, 1, 10)
    assert nodes(tmp_path / "absent") == (0,)


@pytest.mark.parametrize("node", [-1, 0, 7])
def test_one_node_or_none_that_is_meant_is_left_alone(tmp_path: Path, node: int) -> None:
    assert not prefer_node(node, host(tmp_path, "node0"))


def test_unknown_nodes_are_left_alone(tmp_path: Path) -> None:
    directory = host(tmp_path, "node0", "node1")
    assert not prefer_node(2, directory)
    assert not prefer_node(-1, directory)


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
def test_the_kernel_takes_the_preference(tmp_path: Path) -> None:
    """In a process of its own, which keeps it; threads started afterwards inherit it."""
    code = (
        "import sys, threading; from pathlib import Path; from swap.numa import prefer_node\n"
        "assert prefer_node(0, Path(sys.argv[1]))\n"
        "def look():\n"
        "    global text; text = open('/proc/thread-self/numa_maps').read()\n"
        "thread = threading.Thread(target=look); thread.start(); thread.join()\n"
        "assert 'prefer' in text, text[:300]"
    )
    directory = host(tmp_path, "node0", "node1")
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True)
