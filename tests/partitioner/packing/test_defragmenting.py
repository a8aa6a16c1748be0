"""Instances move only where more becomes of use than it costs, and never those of others."""

from __future__ import annotations

import random

import pytest

from partitioner.geometry import Instance, fragmentation, geometry_of, legal_layouts
from partitioner.layout import Costs, Found, GpuState, Share
from partitioner.layout_file import export_layout
from partitioner.layout_resolve import plan_file
from partitioner.packing.defragmenting import GIB, WORTH_MS_PER_GIB, Weighed, weigh
from tests.partitioner.packing.node import CATALOGUE, gpu

ONE, OTHER = Instance(0, 1, "1g.18gb"), Instance(4, 1, "1g.18gb")
NAME = "gpu0/1g.18gb@0"
SPREAD = gpu(own=[ONE, OTHER]).state


def weighed(state: GpuState, worth: float = WORTH_MS_PER_GIB, **move_ms: float) -> Weighed:
    costs = Costs(move_ms={name.replace("_", "@"): cost for name, cost in move_ms.items()})
    (found,) = weigh([state], costs, worth)
    return found


def test_two_small_ones_in_both_halves_are_put_into_one() -> None:
    found = weighed(SPREAD)
    assert {place.start // 4 for place in found.places} in ({0}, {1})
    assert found.after < found.before
    assert found.before == fragmentation(SPREAD.geometry, SPREAD.instances)
    assert found.gained_bytes == pytest.approx((found.before - found.after) * SPREAD.memory_bytes)
    # Nobody is on them: it costs nothing.
    assert (found.moved, found.cost_ms, found.worth_it) == ((), 0.0, True)


def test_the_gain_is_held_against_the_time_that_models_are_away() -> None:
    costs = Costs(move_ms={NAME: 300.0, "gpu0/1g.18gb@4": 900.0})
    (found,) = weigh([SPREAD], costs, WORTH_MS_PER_GIB)
    # The cheaper one moves: its copy, and an instance destroyed and one created.
    assert found.moved == (NAME,)
    assert found.cost_ms == 300 + costs.create_ms + costs.destroy_ms
    gained_gib = found.gained_bytes / GIB
    assert gained_gib > 20
    assert found.worth_it
    (poor,) = weigh([SPREAD], costs, found.cost_ms / gained_gib * 0.99)
    assert not poor.worth_it
    (rich,) = weigh([SPREAD], costs, found.cost_ms / gained_gib * 1.01)
    assert rich.worth_it


def test_what_is_worth_moving_is_a_layout_that_plans_to_just_that() -> None:
    share = Share(thread_percent=50)
    state = GpuState(
        **{**vars(SPREAD), "shares": {ONE: (share, share)}},
    )
    found = weighed(state)
    text = export_layout([found.then], Found.IGNORE)
    planned = plan_file(text, "x", [state], Costs()).gpus[0]
    assert planned.fragmentation_after == pytest.approx(found.after)
    assert set(found.places) == set(planned.chosen)
    assert len([name for name in (*planned.keep, *planned.create) if "/mps" in name]) == 2


def test_others_instances_and_whole_gpus_stay() -> None:
    foreign = Instance(4, 1, "1g.18gb")
    mine = weighed(gpu(own=[ONE], foreign=[foreign]).state)
    assert foreign in mine.then.foreign
    assert foreign not in mine.places
    assert mine.places[0].start > 4
    assert weigh([gpu(foreign=[foreign]).state, gpu(mig=False).state], Costs(), 1.0) == ()
    assert weigh([gpu(own=[Instance(0, 8, "7g.141gb")]).state], Costs(), 1.0) == ()


def test_random_layouts_end_where_no_other_is_worth_more() -> None:
    chance = random.Random(11)
    geometry = geometry_of(CATALOGUE.board("h200"))
    layouts = [each for each in legal_layouts(geometry) if each]
    moved = 0
    for _ in range(12):
        state = gpu(own=chance.choice(layouts)).state
        names = [state.partition_id(each) for each in state.instances]
        costs = Costs(move_ms={name: chance.uniform(100, 9000) for name in names})
        for found in weigh([state], costs, WORTH_MS_PER_GIB):
            assert sorted(e.profile for e in found.places) == sorted(
                each.profile for each in state.instances
            )
            assert not geometry.problem(found.places)
            moved += found.worth_it
            again = weigh([found.then], Costs(), WORTH_MS_PER_GIB)
            assert all(each.after <= found.after for each in again)
    assert moved
