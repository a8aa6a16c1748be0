"""What `--simulate` accepts, and the partitions that come of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from partitioner.errors import DocumentError, PartitionerError, SimulationError
from partitioner.gpu import Gpu, GpuHealth
from partitioner.partition import PartitionKind, whole_partitions
from partitioner.simulation import MAX_SIMULATED_GPUS, NodeSpec, parse_simulate


@pytest.mark.parametrize(
    ("argument", "keys"),
    [
        ("h200x1", ["h200"]),
        ("h200", ["h200"]),
        ("h100x2", ["h100-80"] * 2),
        ("H200X2", ["h200"] * 2),
        ("a100-40x3", ["a100-40"] * 3),
        (f"a30x{MAX_SIMULATED_GPUS}", ["a30"] * MAX_SIMULATED_GPUS),
    ],
)
def test_a_board_and_a_count(argument: str, keys: list[str]) -> None:
    assert [gpu.board_key for gpu in parse_simulate(argument).gpus] == keys


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("", "wants a board and a count, such as h200x1"),
        ("h20x1", r"--simulate h20x1: no board is called 'h20' \(did you mean 'h200'\?\)"),
        ("h200x0", "0 GPUs; a simulated node has 1 to 16"),
        ("h200x17", "17 GPUs; a simulated node has 1 to 16"),
        ("h200x-1", "no board is called"),
        ("x2", "no board is called"),
        ("h200x1,h100x1", "no board is called"),
    ],
)
def test_what_is_no_board_and_count_is_refused(argument: str, words: str) -> None:
    with pytest.raises(SimulationError, match=words):
        parse_simulate(argument)


def _parse_file(tmp_path: Path, text: str) -> NodeSpec:
    path = tmp_path / "node.yaml"
    path.write_text(text)
    return parse_simulate(str(path))


CUSTOM_BOARD = """\
version: 1
driver_version: "570.1"
boards:
  tiny: {product: Tiny, compute_capability: [9, 0], sm_count: 4, memory_mib: 256,
         reserved_mib: 16, pci_device_ids: [0x0042], pcie_generation: 4, pcie_lanes: 8,
         power_limit_w: 50, confidence: low}
gpus:
  - {board: tiny, count: 2, numa_node: 1, processes: [{pid: 7, memory_mib: 100}]}
  - {board: a100, mig_enabled: true}
"""


def test_a_file_describes_a_mixed_node(tmp_path: Path) -> None:
    spec = _parse_file(tmp_path, CUSTOM_BOARD)
    assert spec.driver_version == "570.1"
    assert [gpu.board_key for gpu in spec.gpus] == ["tiny", "tiny", "a100-80"]
    assert (spec.gpus[0].numa_node, spec.gpus[0].processes[0].memory_mib) == (1, 100)
    assert not spec.gpus[0].board.mig_capable
    assert spec.gpus[2].mig_enabled


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("version: 2\ngpus: [{board: h200}]\n", 1, "version"),
        ("version: 1\ngpus: []\n", 2, "gpus"),
        ("version: 1\n", 1, "the key 'gpus' is missing"),
        ("version: 1\ngpus:\n  - board: h200\n    cuont: 2\n", 4, "did you mean 'count'"),
        ("version: 1\ngpus:\n  - {board: h200}\n  - {board: h300}\n", 4, "no board is called"),
        ("version: 1\ngpus:\n  - {board: h200,\n     count: 17}\n", 4, "less than or equal to 16"),
        ("version: 1\ngpus:\n  - {board: h200, count: 9}\n  - {board: a30, count: 9}\n", 2, "18"),
        ("version: 1\ngpus:\n  - board: h200\n    numa_node: -1\n", 4, "numa_node"),
        (CUSTOM_BOARD.replace("memory_mib: 100", "memory_mib: 241"), 8, "240 MiB for them"),
        (CUSTOM_BOARD + "  - board: tiny\n    mig_enabled: true\n", 11, "no MIG profiles"),
        (CUSTOM_BOARD.replace("[0x0042]", "[0]"), 5, "PCI device id"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    with pytest.raises(DocumentError, match=words) as refused:
        _parse_file(tmp_path, text)
    assert refused.value.line == line
    assert "node.yaml" in str(refused.value)


@pytest.mark.parametrize("argument", ["missing.yaml", "./nowhere", "/"])
def test_a_file_that_is_not_there_is_named(argument: str) -> None:
    with pytest.raises(PartitionerError, match="cannot be read"):
        parse_simulate(argument)


def _gpu(index: int, generation: int = 1) -> Gpu:
    return Gpu(
        uuid=f"GPU-{index}",
        index=index,
        memory_bytes=1000,
        memory_reserved_bytes=100,
        memory_used_bytes=300,
        sm_count=16,
        generation=generation,
    )


def test_each_gpu_gives_one_whole_partition_in_index_order() -> None:
    first, second = whole_partitions([_gpu(1, generation=4), _gpu(0)])
    assert (first.id, second.id) == ("gpu0", "gpu1")
    assert second.kind is PartitionKind.WHOLE
    assert (second.gpu_uuid, second.gpu_index, second.generation) == ("GPU-1", 1, 4)
    # Memory of foreign processes may be given back: the partition is what tenants can have in all.
    assert (second.memory_bytes, second.sm_count) == (900, 16)


def test_gpus_that_cannot_serve_whole_give_none_and_shift_no_ids() -> None:
    gpus = [
        replace(_gpu(0), health=GpuHealth.LOST),
        replace(_gpu(1), health=GpuHealth.FAILING),
        replace(_gpu(2), mig_enabled=True),
        _gpu(3),
    ]
    assert [partition.id for partition in whole_partitions(gpus)] == ["gpu3"]
    assert whole_partitions([]) == ()
