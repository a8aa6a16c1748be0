"""Changes of layout over the real pynvml and the simulated board: crashes, failures, foreigners."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pynvml
import pytest

from partitioner.catalogue import load_catalogue
from partitioner.cutting import Action, Cut, GpuChange, LayoutChange, owned_after
from partitioner.errors import (
    ChangeCancelledError,
    ChangeNotMadeError,
    GpuInUseError,
    InstanceHeldError,
    LayoutMovedError,
    NotRolledBackError,
    PartitionerError,
)
from partitioner.executor import Executor
from partitioner.geometry import Instance, geometry_of, legal_layouts
from partitioner.gpu import Gpu
from partitioner.nvml import PynvmlReader
from partitioner.resetting import Resetter
from partitioner.simulated.install import installed
from partitioner.simulated.node import Fault, SimulatedGpu, SimulatedNode
from partitioner.simulated.sharing import MemorySharing
from partitioner.simulation import GpuSpec, NodeSpec, ProcessSpec

BOOT = "boot-1"
CHANGES = (
    "set_mig_mode",
    "reset_gpu",
    "create_instance",
    "complete_instance",
    "destroy_instance",
)
H200 = load_catalogue().board("h200")
GEOMETRY = geometry_of(H200)
LAYOUTS = tuple(legal_layouts(GEOMETRY))


class Crash(BaseException):
    """The daemon is gone."""


class Direct:
    """The driver without a thread. `crash(name, after)` is asked around every change."""

    def __init__(
        self,
        crash: Callable[[bool], bool] = lambda after: False,
        resetter: Resetter | None = None,
    ) -> None:
        self.reader = PynvmlReader(resetter)
        self.reader.discover()
        self._crash = crash

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **named: Any) -> Any:
            if name in CHANGES and self._crash(False):
                raise Crash
            result = getattr(self.reader, name)(*arguments, **named)
            if name in CHANGES and self._crash(True):
                raise Crash
            return result

        return call


class Notes:
    """The journal: what it holds is what survives."""

    def __init__(self) -> None:
        self.kept: LayoutChange | None = None
        self.written: list[LayoutChange] = []

    async def note(self, change: LayoutChange) -> None:
        self.kept = change
        self.written.append(change)


class Scene:
    """One or two boards with instances, some of them foreign, and a change of them."""

    def __init__(self, *changes: tuple[set[Instance] | None, set[Instance] | None, set[Instance]]):
        spec = NodeSpec(
            tuple(
                GpuSpec(
                    "h200",
                    H200,
                    mig_enabled=before is not None,
                    instances=tuple(sorted((before or set()) | foreign)),
                )
                for before, _, foreign in changes
            )
        )
        self.node = SimulatedNode(spec)
        self.change = LayoutChange(
            "plan-1",
            "operations/1",
            BOOT,
            tuple(
                GpuChange(gpu.uuid, gpu.index, cut(before), cut(after), tuple(sorted(foreign)))
                for gpu, (before, after, foreign) in zip(self.node.gpus, changes, strict=True)
            ),
        )
        self.notes = Notes()
        self.sharing = MemorySharing()
        self._untouched = {
            gpu.uuid: [each for each in gpu.instances if self._stays(gpu, each.place)]
            for gpu in self.node.gpus
        }

    def _stays(self, gpu: SimulatedGpu, place: Instance) -> bool:
        each = self.change.gpus[gpu.index]
        return place in each.kept or place in each.foreign

    def executor(self, crash: Callable[[bool], bool] = lambda after: False) -> Executor:
        return Executor(Direct(crash), self.sharing, self.notes.note)

    async def apply(self, crash: Callable[[bool], bool] = lambda after: False, **more: Any) -> bool:
        """As the daemon does it: the whole intent first, and gone once one layout is there."""
        await self.notes.note(self.change)
        try:
            await self.executor(crash).apply(self.change, **more)
        except NotRolledBackError:
            raise
        except PartitionerError:
            self.notes.kept = None
            return False
        self.notes.kept = None
        return True

    def state(self) -> str:
        """`old`, `new`, or what else there is. Whatever must not be touched must be the same."""
        for gpu in self.node.gpus:
            assert not geometry_of(gpu.board).problem(each.place for each in gpu.instances)
            for each in self._untouched[gpu.uuid]:
                assert each in gpu.instances, "the very same, with the handles it had"
        pairs = list(zip(self.node.gpus, self.change.gpus, strict=True))
        for word in ("new", "old"):
            cuts = [each.after if word == "new" else each.before for _, each in pairs]
            if all(
                is_cut(gpu, wanted, each.foreign)
                for (gpu, each), wanted in zip(pairs, cuts, strict=True)
            ):
                return word
        return str([(gpu.mig_current, gpu.instances) for gpu, _ in pairs])


def cut(instances: set[Instance] | None) -> Cut:
    return Cut(instances is not None, tuple(sorted(instances or ())))


def is_cut(gpu: SimulatedGpu, wanted: Cut, foreign: tuple[Instance, ...]) -> bool:
    places = {each.place for each in gpu.instances}
    complete = all(each.complete for each in gpu.instances)
    return complete and places == {*wanted.instances, *foreign} and (
        gpu.mig_current == wanted.mig_enabled == gpu.mig_pending
    )  # fmt: skip


def place(text: str) -> Instance:
    return next(each for each in GEOMETRY.placements if str(each) == text)


def places(*texts: str) -> set[Instance]:
    return {place(text) for text in texts}


def classic() -> Scene:
    """One GPU changes within MIG, the other is cut from whole."""
    return Scene(
        (
            places("1g.18gb@0", "1g.18gb@1", "2g.35gb@2"),
            places("1g.18gb@0", "3g.71gb@4"),
            set(),
        ),
        (None, places("3g.71gb@0", "2g.35gb@4"), set()),
    )


@contextmanager
def on(scene: Scene) -> Iterator[Scene]:
    with installed(scene.node):
        yield scene
        scene.node.clear_injections()


def test_a_change_is_made_in_steps_and_a_second_time_not_at_all() -> None:
    with on(classic()) as scene:
        told: list[tuple[str, int, int]] = []

        def begun(step: Any, number: int, total: int) -> None:
            told.append((step.action.name, number, total))

        assert asyncio.run(scene.apply(begun=begun))
        assert scene.state() == "new"
        assert told == [
            ("DESTROY", 1, 6), ("DESTROY", 2, 6), ("CREATE", 3, 6),
            ("ENABLE", 4, 6), ("CREATE", 5, 6), ("CREATE", 6, 6),
        ]  # fmt: skip
        written = [each.step for each in scene.notes.written if each.step is not None]
        assert [each.action.name for each in written] == [word for word, _, _ in told]
        assert all(each.generation > 0 for each in written)
        assert [each.number for each in written if each.action is Action.DESTROY] == [2, 3]
        again: list[Any] = []
        assert asyncio.run(scene.apply(begun=lambda *step: again.append(step)))
        assert again == []


def test_a_crash_at_any_point_ends_in_the_old_or_the_new_layout() -> None:
    """Killed before and after each act, and after each line of the journal; then settled."""
    ends = set()
    for point in range(100):
        with on(classic()) as scene:
            seen = iter(range(1000))

            def crash(after: bool, seen: Iterator[int] = seen, point: int = point) -> bool:
                return next(seen) == point

            try:
                asyncio.run(scene.apply(crash))
            except Crash:
                assert scene.notes.kept is not None
                new = asyncio.run(scene.executor().settle(scene.notes.kept))
                assert scene.state() == ("new" if new else "old"), point
                ends.add(new)
            else:
                assert (scene.state(), point) == ("new", 12), "two points for each of six acts"
                break
    assert ends == {True, False}


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_IN_USE]
)
def test_a_failure_of_any_call_ends_in_the_old_or_the_new_layout(code: int) -> None:
    outcomes = {True: 0, False: 0}
    # Every call with the plainest error, every fourth with those that some calls bear.
    for number in range(0, 2000, 1 if code == pynvml.NVML_ERROR_UNKNOWN else 4):
        with on(classic()) as scene:
            driver = Direct()
            scene.node.inject(Fault(code, after_calls=number, times=1))
            executor = Executor(driver, scene.sharing, scene.notes.note)
            try:
                asyncio.run(executor.apply(scene.change))
                new = True
            except NotRolledBackError:
                raise
            except PartitionerError:
                new = False
            assert scene.state() == ("new" if new else "old"), number
            outcomes[new] += 1
            if scene.node.faults_ahead:
                break  # The change makes fewer calls than this.
    assert number > 100
    assert outcomes[False] > 20


def test_one_that_cannot_be_taken_back_now_is_settled_later() -> None:
    with on(classic()) as scene:
        scene.node.inject(
            Fault(pynvml.NVML_ERROR_UNKNOWN, "nvmlDeviceCreateGpuInstanceWithPlacement")
        )
        with pytest.raises(NotRolledBackError, match="when hotbayd starts"):
            asyncio.run(scene.apply())
        assert scene.state() not in ("old", "new")
        scene.node.clear_injections()
        assert scene.notes.kept is not None
        assert asyncio.run(scene.executor().settle(scene.notes.kept)) is False
        assert scene.state() == "old"


@pytest.mark.parametrize("seed", range(12))
def test_random_changes_beside_foreign_instances(seed: int) -> None:
    """Through a crash or a failure at a random place, or undisturbed."""
    dice = random.Random(seed)
    for _ in range(12):
        full = set(dice.choice(LAYOUTS))
        foreign = {each for each in full if dice.random() < 0.3}
        beside = [each for each in LAYOUTS if foreign <= set(each)]
        after = set(dice.choice(beside)) - foreign
        with on(Scene((full - foreign, after, foreign))) as scene:
            stop = dice.randrange(16)
            if dice.random() < 0.5:
                seen = iter(range(1000))
                with_crash = lambda after, seen=seen, stop=stop: next(seen) == stop  # noqa: E731
                try:
                    asyncio.run(scene.apply(with_crash))
                except Crash:
                    assert scene.notes.kept is not None
                    asyncio.run(scene.executor().settle(scene.notes.kept))
            else:
                fault = Fault(pynvml.NVML_ERROR_UNKNOWN, after_calls=stop * 12, times=1)
                executor = scene.executor()
                scene.node.inject(fault)
                try:
                    asyncio.run(executor.apply(scene.change))
                except NotRolledBackError:
                    raise
                except PartitionerError:
                    pass
            assert scene.state() in ("old", "new")


def test_holders_are_named_before_anything_is_touched() -> None:
    with on(classic()) as scene:
        gpu = scene.node.gpus[0]
        gpu.processes = (
            ProcessSpec(pid=501, memory_mib=1, on="1g.18gb@0"),
            ProcessSpec(pid=502, memory_mib=1, on="2g.35gb@2"),
            ProcessSpec(pid=503, memory_mib=1, on="1g.18gb@1"),
        )
        executor = scene.executor()
        with pytest.raises(
            InstanceHeldError, match=r"destroy gpu0/2g\.35gb@2.*\(pid 502\)"
        ) as held:
            asyncio.run(executor.refuse_held(scene.change, [503]))
        assert held.value.pids == (502,)
        assert asyncio.run(scene.apply(own_pids=[503])) is False
        assert (scene.state(), len(scene.notes.written)) == ("old", 2)
        gpu.processes = gpu.processes[:1]
        # A holder of what is kept is in nobody's way.
        assert asyncio.run(scene.apply())
        assert scene.state() == "new"


def test_cancelled_between_steps_it_goes_back() -> None:
    for steps in range(6):
        with on(classic()) as scene:
            answers = iter([False] * steps + [True])
            executor = scene.executor()
            with pytest.raises(ChangeCancelledError, match="cancelled before"):
                asyncio.run(executor.apply(scene.change, cancelled=answers.__next__))
            assert scene.state() == "old"


def test_a_kept_instance_that_somebody_else_took_is_not_made_up() -> None:
    with on(classic()) as scene:
        gpu = scene.node.gpus[0]
        scene.node.cut(gpu, gpu.instances[1:])
        with pytest.raises(LayoutMovedError, match=r"gpu0/1g\.18gb@0 was to be kept"):
            asyncio.run(scene.executor().refuse_held(scene.change))


def test_success_that_cannot_be_seen_is_an_error() -> None:
    with on(classic()) as scene:
        direct = Direct()

        class Liar:
            def __getattr__(self, name: str) -> Any:
                if name in CHANGES:
                    return self.nothing
                return getattr(direct, name)

            async def nothing(self, *arguments: Any) -> None:
                uuid: str = arguments[0]
                direct.reader.invalidate(uuid)

        executor = Executor(Liar(), scene.sharing, scene.notes.note)
        with pytest.raises(ChangeNotMadeError, match=r"did destroy gpu0/1g\.18gb@1, but"):
            asyncio.run(executor.apply(scene.change))
        assert scene.state() == "old"


def test_an_instance_half_destroyed_is_made_whole_again() -> None:
    with on(classic()) as scene:
        scene.node.inject(Fault(pynvml.NVML_ERROR_IN_USE, "nvmlGpuInstanceDestroy", times=1))
        with pytest.raises(GpuInUseError, match="end the processes"):
            asyncio.run(scene.executor().apply(scene.change))
        assert scene.state() == "old"
        assert scene.notes.written[-1].step is not None
        assert scene.notes.written[-1].step.action is Action.COMPLETE


def test_marks_fit_one_instance_of_one_boot() -> None:
    with on(classic()) as scene:
        assert asyncio.run(scene.apply())
        direct = Direct()
        gpu: Gpu = direct.reader.reread(scene.node.gpus[0].uuid)
        assert gpu.instances is not None
        marks = owned_after(gpu, scene.change.gpus[0], BOOT, forward=True)
        assert [str(each.place) for each in marks] == ["1g.18gb@0", "3g.71gb@4"]
        for mark, instance in zip(marks, gpu.instances, strict=True):
            assert mark.marks(gpu.uuid, instance, BOOT)
            assert not mark.marks(gpu.uuid, instance, "boot-2")
            assert not mark.marks("GPU-2", instance, BOOT)
            assert not mark.marks(gpu.uuid, replace(instance, number=9), BOOT)
