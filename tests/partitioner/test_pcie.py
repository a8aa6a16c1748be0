"""Which GPUs share a link: by NVML's topology, transitively, under a name that stays."""

from __future__ import annotations

import itertools

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.gpu import Gpu
from partitioner.nvml import PynvmlReader
from partitioner.partition import whole_partitions
from partitioner.pcie import links
from partitioner.simulated.install import installed
from partitioner.simulated.node import Fault, SimulatedNode
from partitioner.simulation import parse_simulate

NODE = """
version: 1
gpus:
  - {board: h200, count: 2, numa_node: 0, pcie_root: 0}
  - {board: h200, numa_node: 0, pcie_root: 1}
  - {board: h200, count: 2}
"""


@pytest.fixture
def node(tmp_path):
    path = tmp_path / "node.yaml"
    path.write_text(NODE)
    simulated = SimulatedNode(parse_simulate(str(path)))
    with installed(simulated):
        yield simulated
    simulated.clear_injections()


def test_gpus_behind_one_root_share_a_link_and_so_do_their_partitions(node: SimulatedNode) -> None:
    reader = PynvmlReader()
    gpus = reader.discover()
    first = gpus[0].pci_id
    assert [gpu.link for gpu in gpus] == [first, first, *(gpu.pci_id for gpu in gpus[2:])]
    assert [each.link for each in whole_partitions(gpus)] == [gpu.link for gpu in gpus]
    calls = node.calls_of("nvmlDeviceGetTopologyCommonAncestor")
    assert calls == 10
    reader.discover()
    assert node.calls_of("nvmlDeviceGetTopologyCommonAncestor") == calls
    reader.close()


def test_a_link_keeps_its_name_when_the_gpu_it_was_named_for_is_lost(node: SimulatedNode) -> None:
    reader = PynvmlReader()
    before = reader.discover()
    node.vanish(node.gpus[0].uuid)
    assert [gpu.link for gpu in reader.discover()] == [gpu.link for gpu in before]
    reader.close()


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_TIMEOUT]
)
def test_where_the_topology_is_not_told_nothing_is_shared(node: SimulatedNode, code: int) -> None:
    node.inject(Fault(code, "nvmlDeviceGetTopologyCommonAncestor"))
    reader = PynvmlReader()
    gpus = reader.discover()
    assert [gpu.link for gpu in gpus] == [gpu.pci_id for gpu in gpus]
    assert [gpu.health_reason for gpu in gpus] == [""] * 5
    reader.close()


def test_the_levels_are_those_of_the_drivers_header(node: SimulatedNode) -> None:
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(5)]
    ancestor = pynvml.nvmlDeviceGetTopologyCommonAncestor
    assert ancestor(handles[0], handles[1]) == pynvml.NVML_TOPOLOGY_MULTIPLE == 20
    assert ancestor(handles[0], handles[2]) == pynvml.NVML_TOPOLOGY_NODE == 40
    assert ancestor(handles[2], handles[3]) == pynvml.NVML_TOPOLOGY_SYSTEM == 50
    with pytest.raises(pynvml.NVMLError):
        ancestor(handles[0], handles[0])


@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8), st.randoms())
def test_sharing_is_transitive_and_named_alike_in_any_order(pairs, random) -> None:
    gpus = [Gpu(f"GPU-{number}", number, pci_id=f"0000:{number:02x}:00.0") for number in range(7)]
    near = {frozenset(pair) for pair in pairs}

    def ancestor(one: str, other: str) -> int:
        pair = frozenset((int(one[4:]), int(other[4:])))
        return pynvml.NVML_TOPOLOGY_SINGLE if pair in near else pynvml.NVML_TOPOLOGY_HOSTBRIDGE

    shuffled = list(gpus)
    random.shuffle(shuffled)
    found = links(shuffled, ancestor)
    group = {number: {number} for number in range(7)}
    for _ in range(7):
        for one, other in itertools.permutations(range(7), 2):
            if frozenset((one, other)) in near:
                group[one] |= group[other]
    assert found == {f"GPU-{one}": f"0000:{min(group[one]):02x}:00.0" for one in range(7)}
