"""Nodes and libraries for the partitioner's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pynvml
import pytest

from partitioner.simulated.install import installed
from partitioner.simulated.node import SimulatedNode
from partitioner.simulation import NodeSpec, parse_simulate


def _real_library_is_present() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    pynvml.nvmlShutdown()
    return True


@pytest.fixture
def spec() -> NodeSpec:
    return parse_simulate("h200x2")


@pytest.fixture
def node(spec: NodeSpec) -> Iterator[SimulatedNode]:
    """Two simulated H200, put in place of the library for the length of a test."""
    simulated = SimulatedNode(spec)
    with installed(simulated):
        yield simulated
    simulated.clear_injections()


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest, spec: NodeSpec) -> Iterator[str]:
    """The library under the contract tests: the simulated one, and the real one where it is."""
    if request.param == "simulated":
        with installed(SimulatedNode(spec)):
            yield "simulated"
    elif _real_library_is_present():
        yield "real"
    else:
        pytest.skip("this host has no NVML library or no NVIDIA driver")
