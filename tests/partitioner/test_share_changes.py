"""Changes of layout with MPS shares: in what order, what is left alone, crashes at every step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from partitioner.cutting import Cut, Divided, LayoutChange, owned_after
from partitioner.errors import MpsShareError, NotRolledBackError, PartitionerError
from partitioner.executor import Executor
from partitioner.geometry import Instance
from partitioner.gpu import Gpu
from partitioner.layout import Share
from partitioner.mps.control import Language
from partitioner.mps.shared import SharedPlace
from partitioner.partition import PartitionKind, partitions_of
from partitioner.simulated.sharing import MemorySharing
from partitioner.simulation import ProcessSpec
from tests.partitioner.test_executor import Crash, Direct, Scene, on, place, places

HALF, QUARTER = Share(1 << 34, 50, "team-a"), Share(None, 25)
BIG, SMALL = place("3g.71gb@4"), place("1g.18gb@0")


class Crashing(MemorySharing):
    """Asks `crash` before and after each change; one cut off between leaves a place half done."""

    def __init__(self) -> None:
        super().__init__()
        self.crash: Callable[[bool], bool] = lambda after: False
        self.fails: set[Instance | None] = set()
        self.done: list[str] = []

    async def share(self, gpu: Gpu, place: Instance | None, shares: tuple[Share, ...]) -> None:
        if self.crash(False):
            raise Crash
        self.half_done.add((gpu.uuid, place))
        self.places.setdefault((gpu.uuid, place), ())
        if self.crash(True):
            raise Crash
        if place in self.fails:
            raise MpsShareError("a client gets too much")
        await super().share(gpu, place, shares)
        self.done.append(f"share {place}")

    async def unshare(self, gpu: str, place: Instance | None) -> None:
        if self.crash(False):
            raise Crash
        await super().unshare(gpu, place)
        self.done.append(f"unshare {place}")
        if self.crash(True):
            raise Crash


def scene(
    before: dict[Instance | None, tuple[Share, ...]],
    after: dict[Instance | None, tuple[Share, ...]],
    instances: tuple[set[Instance] | None, set[Instance] | None],
) -> Scene:
    """One GPU with shares, and a change of them and of its instances."""
    made = Scene((*instances, set()))
    made.sharing = Crashing()
    (only,) = made.change.gpus
    divided = [
        replace(cut, divided=tuple(Divided(place, each) for place, each in shares.items()))
        for cut, shares in ((only.before, before), (only.after, after))
    ]
    change = replace(only, before=divided[0], after=divided[1])
    made.change = replace(made.change, gpus=(change,))
    made.sharing.places = {(only.gpu, place): shares for place, shares in before.items()}
    return made


def recut() -> Scene:
    """A shared instance goes, another is kept and shared otherwise, a third comes with shares."""
    return scene(
        {SMALL: (HALF,), BIG: (HALF, QUARTER)},
        {BIG: (HALF,), place("2g.35gb@0"): (QUARTER, QUARTER)},
        (places("1g.18gb@0", "3g.71gb@4"), places("2g.35gb@0", "3g.71gb@4")),
    )


def shares_of(made: Scene) -> str:
    """`old`, `new`, or what else there is."""
    (change,) = made.change.gpus
    there = {place: shares for (_, place), shares in made.sharing.places.items()}
    assert not made.sharing.half_done
    for word, cut in (("new", change.after), ("old", change.before)):
        if there == cut.shares:
            return word
    return str(there)


def test_servers_go_before_their_instances_and_come_after_them() -> None:
    with on(recut()) as made:
        told: list[str] = []

        def begun(step: Any, number: int, total: int) -> None:
            told.append(f"{step.action.value} {step.place} {number}/{total}")

        assert asyncio.run(made.apply(begun=begun))
        assert told == [
            "stop sharing 1g.18gb@0 1/5",
            "destroy 1g.18gb@0 2/5",
            "create 2g.35gb@0 3/5",
            "share 3g.71gb@4 4/5",
            "share 2g.35gb@0 5/5",
        ]
        assert (made.state(), shares_of(made)) == ("new", "new")
        made.sharing.done.clear()
        assert asyncio.run(made.apply())
        assert made.sharing.done == [], "a second time nothing is done"


@pytest.mark.parametrize(
    "make",
    [
        recut,
        lambda: scene({}, {None: (HALF, HALF)}, (None, None)),
        lambda: scene({None: (HALF,)}, {BIG: (HALF,)}, (None, places("3g.71gb@4"))),
        lambda: scene({None: (HALF, HALF)}, {}, (None, None)),
    ],
    ids=["recut", "divided", "whole to instance", "undivided"],
)
def test_a_crash_anywhere_ends_in_the_old_or_the_new_layout(make: Callable[[], Scene]) -> None:
    seen = {"old": 0, "new": 0}
    for number in range(64):
        with on(make()) as made:
            left = number

            def crash(after: bool) -> bool:
                nonlocal left
                left -= 1
                return left == -1

            made.sharing.crash = crash
            try:
                asyncio.run(made.apply(crash))
                break
            except Crash:
                pass
            made.sharing.crash = lambda after: False
            kept = made.notes.kept
            assert isinstance(kept, LayoutChange)
            new = asyncio.run(made.executor().settle(kept))
            assert shares_of(made) == ("new" if new else "old")
            (cuts,) = made.change.gpus
            if cuts.before.instances != cuts.after.instances:
                assert made.state() == shares_of(made)
            seen["new" if new else "old"] += 1
    else:
        pytest.fail("it never came through")
    assert seen["old"] > 0
    assert made.state() == shares_of(made) == "new"


def test_a_share_that_is_not_what_it_should_be_brings_the_old_layout_back() -> None:
    with on(recut()) as made:
        made.sharing.fails = {place("2g.35gb@0")}
        assert not asyncio.run(made.apply())
        assert (made.state(), shares_of(made)) == ("old", "old")
        made.sharing.fails = {place("2g.35gb@0"), SMALL}
        with pytest.raises(NotRolledBackError):
            asyncio.run(made.apply())


def test_the_daemons_of_shares_are_no_strangers_on_what_goes() -> None:
    """NVML lists a server among the processes of its instance, which is to be destroyed."""
    with on(recut()) as made:
        (gpu,) = made.node.gpus
        gpu.processes = (ProcessSpec(pid=77, memory_mib=1, on="1g.18gb@0"),)
        assert not asyncio.run(made.apply())
        made.sharing.pids = lambda: frozenset({77})

        async def refused() -> None:
            await Executor(Direct(), made.sharing, made.notes.note).refuse_held(made.change)

        asyncio.run(refused())
        gpu.processes = ()
        assert asyncio.run(made.apply())


def test_partitions_of_a_cut_and_of_a_node_have_the_same_names() -> None:
    with on(recut()) as made:
        gpu = Direct().reader.discover()[0]
        (change,) = made.change.gpus
        names = change.before.partitions(0)
        assert names == {
            "gpu0/1g.18gb@0/mps0": (HALF,),
            "gpu0/3g.71gb@4/mps0": (HALF,),
            "gpu0/3g.71gb@4/mps1": (QUARTER,),
        }
        assert Cut(False).partitions(3) == {"gpu3": (None,)}
        marks = owned_after(gpu, change, "boot-1", forward=False)
        shared = tuple(
            SharedPlace(
                f"gpu0/{each.place}", gpu.uuid, each.place, each.uuid, each.memory_bytes,
                each.sm_count, Language.LEGACY, change.before.shares[each.place], "boot-1", True,
            )
            for each in gpu.instances or ()
        )  # fmt: skip
        found = {each.id: each for each in partitions_of([gpu], marks, "boot-1", shared)}
        assert set(found) == set(names)
        part = found["gpu0/3g.71gb@4/mps1"]
        whole = next(each for each in gpu.instances or () if each.place == BIG)
        assert (part.kind, part.memory_bytes) == (PartitionKind.MPS, whole.memory_bytes)
        assert (part.sm_count, part.thread_percent) == (whole.sm_count // 4, 25)
        assert part.device_uuid == whole.uuid
        # A note of an instance that has another UUID now divides nothing.
        stale = tuple(replace(each, device="MIG-other") for each in shared)
        plain = partitions_of([gpu], marks, "boot-1", stale)
        assert [each.id for each in plain] == ["gpu0/1g.18gb@0", "gpu0/3g.71gb@4"]


def test_an_instance_that_is_gone_cannot_be_shared() -> None:
    with on(recut()) as made:
        gpu = Direct().reader.discover()[0]
        with pytest.raises(PartitionerError, match="not there"):
            asyncio.run(made.sharing.share(gpu, place("2g.35gb@0"), (HALF,)))
