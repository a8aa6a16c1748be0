"""MIG mode that changes with a reset: by the executor, crashed anywhere, and by the tool."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pynvml
import pytest

from partitioner.bounded import DEFAULT_DEADLINE_S
from partitioner.cutting import Action, Cut, GpuChange, LayoutChange, steps_left
from partitioner.errors import NotRolledBackError, ResetHeldError, ResetNeededError
from partitioner.executor import Executor
from partitioner.geometry import Instance
from partitioner.gpu import Gpu
from partitioner.nvml_gate import ALONE_WAIT_S
from partitioner.resetting import (
    RESET_TIMEOUT_S,
    SimulatedResetter,
    SmiResetter,
    openers,
    resetter_of,
)
from partitioner.simulated.install import installed
from partitioner.simulated.node import Fault, SimulatedNode
from partitioner.simulated.sharing import MemorySharing
from partitioner.simulation import ProcessSpec, parse_simulate
from tests.partitioner.test_executor import Crash, Direct, Notes

THREE = Instance(4, 4, "3g.40gb")
GPU = Gpu("GPU-1", 3, pci_id="00000000:10:00.0", minor=3)


class Bench:
    """An A100 to be cut, beside one that somebody uses."""

    def __init__(self) -> None:
        self.node = SimulatedNode(parse_simulate("a100-80x2"))
        self.node.gpus[1].processes = (ProcessSpec(pid=9, memory_mib=5),)
        gpu = self.node.gpus[0]
        self.on = GpuChange(gpu.uuid, 0, Cut(False), Cut(True, (THREE,)), reset=True)
        self.notes = Notes()

    def change(self, gpu: GpuChange) -> LayoutChange:
        return LayoutChange("plan-1", "operations/1", "boot-1", (gpu,))

    def executor(self, crash_at: int = -1) -> tuple[Direct, Executor]:
        seen = [0]

        def crash(after: bool) -> bool:
            seen[0] += 1
            return seen[0] == crash_at

        driver = Direct(crash, SimulatedResetter(self.node))
        return driver, Executor(driver, MemorySharing(), self.notes.note)

    def state(self) -> tuple[bool, bool, list[str]]:
        gpu = self.node.gpus[0]
        return gpu.mig_current, gpu.mig_pending, [str(each.place) for each in gpu.instances]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    with installed(made.node):
        yield made


OLD, NEW = (False, False, []), (True, True, ["3g.40gb@4"])


def test_the_mode_is_set_the_gpu_reset_and_nothing_else(bench: Bench) -> None:
    driver, executor = bench.executor()
    gpu = driver.reader.reread(bench.on.gpu)
    assert [each.action for each in steps_left(gpu, bench.on)] == [
        Action.ENABLE, Action.RESET, Action.CREATE,
    ]  # fmt: skip
    (gpu,) = asyncio.run(executor.apply(bench.change(bench.on)))
    assert bench.state() == NEW
    assert [each.step.action.value for each in bench.notes.written if each.step] == [
        "enable MIG mode of", "reset", "create",
    ]  # fmt: skip
    assert gpu.generation > 2, "whoever knew the GPU from before is fenced"
    assert bench.node.gpus[1].processes, "its neighbour is not touched"
    off = GpuChange(bench.on.gpu, 0, bench.on.after, bench.on.before, reset=True)
    asyncio.run(executor.apply(bench.change(off)))
    assert bench.state() == OLD
    driver.reader.close()


def test_holders_are_named_before_anything_is_done(bench: Bench) -> None:
    bench.node.gpus[0].processes = (ProcessSpec(pid=77, memory_mib=5),)
    driver, executor = bench.executor()
    with pytest.raises(ResetHeldError, match=r"only with a reset.*pid 77") as caught:
        asyncio.run(executor.refuse_held(bench.change(bench.on)))
    assert caught.value.pids == (77,)
    assert bench.state() == OLD
    driver.reader.close()


def test_a_reset_that_is_refused_takes_the_mode_back(bench: Bench) -> None:
    """Somebody came between the look and the reset, whom NVML's list had not."""
    driver, _ = bench.executor()

    class Late(SimulatedResetter):
        def reset(self, gpu: Gpu) -> None:
            raise ResetNeededError("somebody is in the way")

    late = Direct(resetter=Late(bench.node))
    with pytest.raises(ResetNeededError, match="in the way"):
        asyncio.run(Executor(late, MemorySharing(), bench.notes.note).apply(bench.change(bench.on)))
    assert bench.state() == OLD, "nothing is left pending"
    late.reader.close()
    driver.reader.close()


def test_a_plan_without_a_reset_resets_nothing(bench: Bench) -> None:
    driver, executor = bench.executor()
    unplanned = GpuChange(bench.on.gpu, 0, bench.on.before, bench.on.after)
    with pytest.raises(ResetNeededError, match="the plan does not have"):
        asyncio.run(executor.apply(bench.change(unplanned)))
    assert bench.state() == OLD
    driver.reader.close()


@pytest.mark.parametrize("crash_at", range(1, 7))
def test_killed_anywhere_it_comes_to_one_of_two_layouts(bench: Bench, crash_at: int) -> None:
    driver, executor = bench.executor(crash_at)
    with pytest.raises(Crash):
        asyncio.run(executor.apply(bench.change(bench.on)))
    driver.reader.close()
    assert bench.notes.kept is not None
    driver, executor = bench.executor()
    new = asyncio.run(executor.settle(bench.notes.kept))
    assert bench.state() == (NEW if new else OLD)
    assert new == (crash_at == 6)
    driver.reader.close()


def test_what_cannot_be_reset_back_says_so(bench: Bench) -> None:
    driver, executor = bench.executor()
    bench.node.inject(Fault(pynvml.NVML_ERROR_UNKNOWN, "nvmlDeviceCreateGpuInstanceWithPlacement"))

    async def note(change: LayoutChange) -> None:
        if change.step is not None and change.step.action is Action.CREATE:
            bench.node.gpus[0].processes = (ProcessSpec(pid=8, memory_mib=1),)

    with pytest.raises(NotRolledBackError):
        asyncio.run(Executor(driver, MemorySharing(), note).apply(bench.change(bench.on)))
    bench.node.clear_injections()
    bench.node.gpus[0].processes = ()
    asyncio.run(executor.take_back(bench.change(bench.on)))
    assert bench.state() == OLD
    driver.reader.close()


def test_a_simulated_reset_takes_instances_and_the_want_of_it(bench: Bench) -> None:
    gpu = bench.node.gpus[0]
    bench.node.inject(Fault(pynvml.NVML_ERROR_RESET_REQUIRED, "nvmlDeviceSetMigMode", gpu.uuid))
    bench.node.set_mig(gpu, True, at_once=True)
    bench.node.cut(gpu, (bench.node.make_instance(gpu, 1, THREE),))
    assert bench.node.reset(gpu)
    assert bench.state() == (True, True, [])
    assert bench.node.before_call("nvmlDeviceSetMigMode", gpu) is None
    assert not bench.node.reset(bench.node.gpus[1])


# The driver's tool.


@contextmanager
def tool(directory: Path, script: str) -> Iterator[SmiResetter]:
    path = directory / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    proc = directory / "proc"
    (proc / "41" / "fd").mkdir(parents=True)
    (proc / "41" / "fd" / "5").symlink_to("/dev/nvidia3")
    (proc / "41" / "comm").write_text("nv-hostengine\n")
    (proc / "42" / "fd").mkdir(parents=True)
    (proc / "42" / "fd" / "5").symlink_to("/dev/nvidia0")
    yield SmiResetter(str(path), proc)


def test_the_tool_is_told_one_gpu(tmp_path: Path) -> None:
    with tool(tmp_path, f'echo "$@" > {tmp_path}/told') as resetter:
        resetter.reset(GPU)
    assert (tmp_path / "told").read_text() == "--gpu-reset -i 00000000:10:00.0\n"


def test_a_tool_that_refuses_names_who_is_in_the_way(tmp_path: Path) -> None:
    script = 'echo "GPU Reset could not run"; echo "In use by another client" >&2; exit 255'
    with tool(tmp_path, script) as resetter, pytest.raises(ResetNeededError) as caught:
        resetter.reset(GPU)
    assert "could not run In use by another client (open in: 41 (nv-hostengine))" in str(
        caught.value
    )
    with pytest.raises(ResetNeededError, match=r"gpu3 cannot be reset.*No such file"):
        SmiResetter(str(tmp_path / "none")).reset(GPU)


def test_a_slow_reset_is_told_as_such_and_not_as_a_stuck_driver() -> None:
    opened_again_s = 5.0
    assert ALONE_WAIT_S + RESET_TIMEOUT_S + opened_again_s < DEFAULT_DEADLINE_S


def test_openers_are_found_among_real_processes(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_text("")
    with path.open():
        assert [each.split()[0] for each in openers(str(path))] == [str(os.getpid())]
    assert openers(str(path)) == ()


def test_the_right_resetter_is_chosen() -> None:
    assert isinstance(resetter_of(None), SmiResetter)
    node = SimulatedNode(parse_simulate("a30"))
    assert isinstance(resetter_of(node), SimulatedResetter)
