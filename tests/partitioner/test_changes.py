"""Cutting GPUs through the real pynvml over the simulated library: rules, refusals, fences."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from partitioner.bounded import BoundedNvml
from partitioner.catalogue import load_catalogue
from partitioner.errors import (
    DocumentError,
    GpuInUseError,
    NvmlCallError,
    NvmlTimeoutError,
    PermissionMissingError,
    ResetNeededError,
    StaleGenerationError,
)
from partitioner.geometry import Instance, geometry_of
from partitioner.gpu import Gpu, NvmlDriver
from partitioner.nvml import PynvmlReader
from partitioner.simulated.install import installed
from partitioner.simulated.node import Fault, SimulatedNode
from partitioner.simulated.remembered import remembering
from partitioner.simulation import parse_node

NODE = """
version: 1
gpus:
- board: h200
  mig_enabled: true
  processes: [{pid: 77, memory_mib: 10, on: 3g.71gb@4}]
  instances: [{profile: 3g.71gb, start: 4}, {profile: 1g.18gb, start: 1}]
- {board: h200}
- {board: a100-80}
- {board: a30, mig_enabled: true}
"""
ONE = Instance(0, 1, "1g.18gb")
THREE = Instance(4, 4, "3g.71gb")


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    simulated = SimulatedNode(parse_node(NODE, "node.yaml", load_catalogue()))
    with installed(simulated):
        yield simulated


@pytest.fixture
def driver(node: SimulatedNode) -> Iterator[NvmlDriver]:
    reader = PynvmlReader()
    reader.discover()
    yield reader
    reader.close()


def places(gpu: Gpu) -> list[str]:
    assert gpu.instances is not None
    return [str(each.place) for each in gpu.instances]


def test_an_instance_is_created_where_it_was_asked_for_and_destroyed(
    node: SimulatedNode, driver: NvmlDriver
) -> None:
    uuid = node.gpus[0].uuid
    gpu = driver.reread(uuid)
    driver.create_instance(uuid, gpu.generation, ONE)
    gpu = driver.reread(uuid)
    assert places(gpu) == ["1g.18gb@0", "1g.18gb@1", "3g.71gb@4"]
    assert gpu.instances is not None
    made = gpu.instances[0]
    assert (made.number, made.uuid.startswith("MIG-")) == (3, True)
    driver.destroy_instance(uuid, gpu.generation, made.number, ONE)
    gpu = driver.reread(uuid)
    assert places(gpu) == ["1g.18gb@1", "3g.71gb@4"]
    # The same name comes back for another instance: only the generation tells them apart.
    driver.create_instance(uuid, gpu.generation, ONE)
    again = driver.reread(uuid)
    assert again.instances is not None
    assert again.instances[0].uuid == made.uuid
    assert again.generation > gpu.generation


def test_a_stale_generation_changes_nothing(node: SimulatedNode, driver: NvmlDriver) -> None:
    uuid = node.gpus[0].uuid
    old = driver.reread(uuid).generation
    driver.create_instance(uuid, old, ONE)
    before = node.gpus[0].instances
    for change in (
        lambda: driver.create_instance(uuid, old, Instance(2, 2, "2g.35gb")),
        lambda: driver.destroy_instance(uuid, old, 1, Instance(1, 1, "1g.18gb")),
        lambda: driver.complete_instance(uuid, old, 1, Instance(1, 1, "1g.18gb")),
        lambda: driver.set_mig_mode(uuid, old, False),
    ):
        with pytest.raises(StaleGenerationError, match="discover again"):
            change()
    assert node.gpus[0].instances == before
    generation = driver.reread(uuid).generation
    with pytest.raises(StaleGenerationError, match=r"no longer 3g\.71gb@4"):
        driver.destroy_instance(uuid, generation, 3, THREE)
    assert node.gpus[0].instances == before


def test_the_boards_rules_are_enforced(node: SimulatedNode, driver: NvmlDriver) -> None:
    uuid, whole = node.gpus[0].uuid, node.gpus[1].uuid
    before = node.gpus[0].instances
    for place in (THREE, Instance(0, 8, "7g.141gb"), Instance(1, 1, "1g.18gb")):
        with pytest.raises(NvmlCallError) as caught:
            driver.create_instance(uuid, driver.reread(uuid).generation, place)
        assert caught.value.code == pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES
    with pytest.raises(StaleGenerationError, match="not a placement"):
        driver.create_instance(uuid, driver.reread(uuid).generation, Instance(7, 1, "1g.18gb"))
    with pytest.raises(NvmlCallError):
        driver.create_instance(whole, driver.reread(whole).generation, ONE)
    assert node.gpus[0].instances == before


def test_what_is_in_use_is_not_taken_away(node: SimulatedNode, driver: NvmlDriver) -> None:
    uuid = node.gpus[0].uuid
    gpu = driver.reread(uuid)
    assert gpu.instances is not None
    held = next(each for each in gpu.instances if each.place == THREE)
    assert driver.telemetry(uuid, gpu.generation).processes[0].instance == held.number
    with pytest.raises(GpuInUseError, match=r"3g\.71gb@4 is in use"):
        driver.destroy_instance(uuid, gpu.generation, held.number, THREE)
    with pytest.raises(GpuInUseError, match="gpu0"):
        driver.set_mig_mode(uuid, driver.reread(uuid).generation, False)
    gpu = driver.reread(uuid)
    assert (places(gpu), gpu.mig_enabled) == (["1g.18gb@1", "3g.71gb@4"], True)
    assert all(each.uuid for each in gpu.instances or ())


def test_mig_mode_is_switched_at_once_or_not_at_all(
    node: SimulatedNode, driver: NvmlDriver
) -> None:
    hopper, ampere = node.gpus[1].uuid, node.gpus[2].uuid
    for enabled in (True, False):
        driver.set_mig_mode(hopper, driver.reread(hopper).generation, enabled)
        gpu = driver.reread(hopper)
        assert (gpu.mig_enabled, gpu.mig_pending) == (enabled, enabled)
    with pytest.raises(ResetNeededError, match="gpu2 changes only when the GPU is reset"):
        driver.set_mig_mode(ampere, driver.reread(ampere).generation, True)
    gpu = driver.reread(ampere)
    assert (gpu.mig_enabled, gpu.mig_pending) == (False, False), "nothing is left pending"


def test_a_half_made_instance_is_taken_away_or_can_be_completed(
    node: SimulatedNode, driver: NvmlDriver
) -> None:
    uuid = node.gpus[0].uuid
    create = Fault(pynvml.NVML_ERROR_UNKNOWN, "nvmlGpuInstanceCreateComputeInstance", times=1)
    node.inject(create)
    with pytest.raises(NvmlCallError, match="CreateComputeInstance"):
        driver.create_instance(uuid, driver.reread(uuid).generation, ONE)
    assert places(driver.reread(uuid)) == ["1g.18gb@1", "3g.71gb@4"]
    node.inject(create)
    node.inject(Fault(pynvml.NVML_ERROR_UNKNOWN, "nvmlGpuInstanceDestroy", times=1))
    with pytest.raises(NvmlCallError):
        driver.create_instance(uuid, driver.reread(uuid).generation, ONE)
    gpu = driver.reread(uuid)
    assert gpu.instances is not None
    half = gpu.instances[0]
    assert (half.place, half.uuid) == (ONE, ""), "left behind, and to be seen as such"
    driver.complete_instance(uuid, gpu.generation, half.number, ONE)
    gpu = driver.reread(uuid)
    assert gpu.instances is not None
    assert gpu.instances[0].uuid != ""


@pytest.mark.parametrize(
    ("function", "right"),
    [
        ("nvmlDeviceSetMigMode", "CAP_SYS_ADMIN"),
        ("nvmlDeviceCreateGpuInstanceWithPlacement", "mig/config"),
    ],
)
def test_a_missing_right_is_named(
    node: SimulatedNode, driver: NvmlDriver, function: str, right: str
) -> None:
    node.inject(Fault(pynvml.NVML_ERROR_NO_PERMISSION, function))
    mode = function == "nvmlDeviceSetMigMode"
    uuid = node.gpus[1 if mode else 0].uuid
    generation = driver.reread(uuid).generation

    def change() -> None:
        if mode:
            driver.set_mig_mode(uuid, generation, True)
        else:
            driver.create_instance(uuid, generation, ONE)

    with pytest.raises(PermissionMissingError, match=right):
        change()


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_leaves_what_it_made_and_nothing_else(
    node: SimulatedNode, driver: NvmlDriver, seed: int
) -> None:
    """Random creates and destroys on two grids, against a set kept beside them."""
    dice = random.Random(seed)
    node.gpus[0].processes = ()
    for gpu in (node.gpus[0], node.gpus[3]):
        geometry = geometry_of(gpu.board)
        model = {each.place for each in gpu.instances}
        for _ in range(40):
            now = driver.reread(gpu.uuid)
            assert {each.place for each in now.instances or ()} == model
            assert not geometry.problem(model)
            place = dice.choice(geometry.placements)
            there = {each.place: each.number for each in now.instances or ()}
            if place in model:
                driver.destroy_instance(gpu.uuid, now.generation, there[place], place)
                model.discard(place)
            elif geometry.fits(model, place):
                driver.create_instance(gpu.uuid, now.generation, place)
                model.add(place)
            else:
                with pytest.raises(NvmlCallError):
                    driver.create_instance(gpu.uuid, now.generation, place)


def test_a_change_that_hangs_does_not_hold_its_caller(node: SimulatedNode) -> None:
    async def scenario() -> None:
        nvml = BoundedNvml(deadline_s=0.2)
        gpu = (await nvml.discover())[0]
        stall = node.stall("nvmlDeviceCreateGpuInstanceWithPlacement")
        with pytest.raises(NvmlTimeoutError, match=r"creating 1g\.18gb@0"):
            await nvml.create_instance(gpu.uuid, gpu.generation, ONE)
        with pytest.raises(NvmlTimeoutError):
            await nvml.reread(gpu.uuid)
        stall.released.set()
        async with asyncio.timeout(120):
            while True:
                try:
                    late = await nvml.reread(gpu.uuid)
                    break
                except NvmlTimeoutError:
                    continue
        assert late.generation > gpu.generation, "made after all, and seen as a change"
        assert "1g.18gb@0" in places(late)
        await nvml.close()

    asyncio.run(scenario())


def test_a_simulated_node_is_found_as_it_was_left(tmp_path: Path) -> None:
    spec = parse_node(NODE, "node.yaml", load_catalogue())
    path = tmp_path / "node.json"
    first = remembering(spec, path)
    with installed(first):
        reader = PynvmlReader()
        left = {gpu.uuid: gpu for gpu in reader.discover()}[first.gpus[0].uuid]
        reader.create_instance(left.uuid, left.generation, ONE)
        left = reader.reread(left.uuid)
        reader.set_mig_mode(first.gpus[1].uuid, 1, True)
        reader.close()
    found = remembering(spec, path)
    with installed(found):
        reader = PynvmlReader()
        gpus = reader.discover()
        reader.close()
    assert gpus[0].instances == left.instances
    assert gpus[1].mig_enabled
    other = remembering(
        parse_node("version: 1\ngpus: [{board: a30}]\n", "", load_catalogue()), path
    )
    assert other.gpus[0].instances == ()
    path.write_text("{")
    assert [each.number for each in remembering(spec, path).gpus[0].instances] == [1, 2]


def test_a_process_on_no_instance_is_refused() -> None:
    text = NODE.replace("on: 3g.71gb@4", "on: 3g.71gb@0")
    with pytest.raises(DocumentError, match=r"no instance '3g\.71gb@0' for pid 77"):
        parse_node(text, "node.yaml", load_catalogue())
