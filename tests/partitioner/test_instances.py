"""Instances that a simulated node starts with, read through the real pynvml."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pynvml
import pytest

from partitioner.bounded import BoundedNvml
from partitioner.catalogue import load_catalogue
from partitioner.errors import DocumentError
from partitioner.geometry import MIB, Instance, geometry_of
from partitioner.nvml import PynvmlReader
from partitioner.simulated.install import installed
from partitioner.simulated.node import Fault, SimulatedNode
from partitioner.simulation import parse_node

NODE = """
version: 1
gpus:
- board: h200
  mig_enabled: true
  instances: [{profile: 3g.71gb, start: 4}, {profile: 1g.18gb, start: 1}]
- {board: h200, mig_enabled: true}
- {board: a30}
"""


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    simulated = SimulatedNode(parse_node(NODE, "node.yaml", load_catalogue()))
    with installed(simulated):
        yield simulated


@pytest.fixture
def reader(node: SimulatedNode) -> Iterator[PynvmlReader]:
    reader = PynvmlReader()
    yield reader
    reader.close()


def test_discovery_shows_instances_by_slot(reader: PynvmlReader) -> None:
    first, second, third = reader.discover()
    assert first.instances is not None
    assert [each.place for each in first.instances] == [
        Instance(1, 1, "1g.18gb"),
        Instance(4, 4, "3g.71gb"),
    ]
    assert [each.sm_count for each in first.instances] == [16, 60]
    assert [each.memory_bytes for each in first.instances] == [16384 * MIB, 71168 * MIB]
    assert len({each.uuid for each in first.instances}) == 2
    assert all(each.uuid.startswith("MIG-") for each in first.instances)
    assert (second.instances, third.instances) == ((), ())
    assert reader.discover() == (first, second, third)


def test_geometry_read_live_equals_the_catalogues(reader: PynvmlReader) -> None:
    catalogue = load_catalogue()
    boards = ["h200", "h200", "a30"]
    for gpu, board in zip(reader.discover(), boards, strict=True):
        live = reader.geometry(gpu.uuid, gpu.generation)
        assert set(live.profiles) == set(geometry_of(catalogue.board(board)).profiles)


def test_geometry_comes_through_the_bounded_reader(node: SimulatedNode) -> None:
    async def read() -> int:
        nvml = BoundedNvml()
        gpu = (await nvml.discover())[0]
        geometry = await nvml.geometry(gpu.uuid, gpu.generation)
        await nvml.close()
        return geometry.memory_slots

    assert asyncio.run(read()) == 8


def test_mig_devices_answer_for_themselves(node: SimulatedNode) -> None:
    pynvml.nvmlInit()
    parent = pynvml.nvmlDeviceGetHandleByIndex(0)
    device = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, 1)
    assert pynvml.nvmlDeviceIsMigDeviceHandle(device).value == 1
    assert pynvml.nvmlDeviceIsMigDeviceHandle(parent).value == 0
    assert pynvml.nvmlDeviceGetGpuInstanceId(device) == 2
    back = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device)
    assert pynvml.nvmlDeviceGetUUID(back) == pynvml.nvmlDeviceGetUUID(parent)
    assert pynvml.nvmlDeviceGetAttributes_v2(device).gpuInstanceSliceCount == 3
    with pytest.raises(pynvml.NVMLError):
        pynvml.nvmlDeviceGetName(device)
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, 2)
    pynvml.nvmlShutdown()


def test_instances_that_may_not_be_seen_are_not_taken_for_none(
    node: SimulatedNode, reader: PynvmlReader
) -> None:
    node.inject(Fault(pynvml.NVML_ERROR_NO_PERMISSION, "nvmlDeviceGetGpuInstances"))
    assert [gpu.instances for gpu in reader.discover()] == [None, None, ()]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("mig_enabled: true, instances: [{profile: 3g.40gb, start: 0}]", "no profile '3g.40gb'"),
        ("mig_enabled: true, instances: [{profile: 3g.71gb, start: 2}]", "not a placement"),
        ("instances: [{profile: 3g.71gb, start: 0}]", "without mig_enabled"),
        (
            "mig_enabled: true, "
            "instances: [{profile: 3g.71gb, start: 0}, {profile: 1g.18gb, start: 3}]",
            "overlap",
        ),
    ],
)
def test_instances_that_cannot_be_are_refused(entry: str, problem: str) -> None:
    text = f"version: 1\ngpus:\n- {{board: h200, {entry}}}\n"
    with pytest.raises(DocumentError, match=problem) as caught:
        parse_node(text, "node.yaml", load_catalogue())
    assert caught.value.line == 3
