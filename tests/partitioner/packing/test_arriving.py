"""One arrival after another: cheaper places first, nobody disturbed unless moves are allowed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from partitioner.geometry import Instance
from partitioner.packing.arriving import (
    MOVES_MAX,
    Admission,
    Arrivals,
    Choice,
    Node,
    Standing,
    first_fit,
    least_fragmenting,
    least_fragmenting_or_moving,
)
from partitioner.packing.rooms import Rooms, instance_rooms, whole_room
from partitioner.packing.values import Isolation, ModelNeed
from tests.partitioner.packing.node import gpu, need, random_models, rules

SMALL, HALF = (8, 4), (40, 8)


def walled(*sizes: tuple[int, int]) -> list[ModelNeed]:
    """Models of tenants of their own, behind walls in hardware."""
    return [
        need(f"m{i}", *size, tenant=f"t{i}", isolation=Isolation.HARDWARE)
        for i, size in enumerate(sizes)
    ]


def places(node: Node) -> list[list[str]]:
    return [sorted(str(place) for place, _ in each.groups) for each in node]


def admit(choice: Choice, models: list[ModelNeed], node: Node) -> list[Admission | None]:
    arrivals, admitted = Arrivals(Rooms(models, rules())), []
    for index in range(len(models)):
        found = choice(arrivals, node, index)
        node = found.node if found is not None else node
        admitted.append(found)
    return admitted


def test_who_may_be_joined_has_the_largest_room_and_who_may_not_the_smallest() -> None:
    node = (Standing(gpu()), Standing(gpu(1)))
    models = [need("a", 8, 4, tenant="x"), need("b", 50, 4, tenant="y"), *walled(SMALL)]
    last = admit(least_fragmenting, models, node)[-1]
    assert last is not None
    assert [[len(group) for _, group in each.groups] for each in last.node] == [[2], [1]]
    assert places(last.node) == [["7g.141gb@0"], ["1g.18gb@6"]]
    # Where nothing is divided into shares nobody of another tenant could come in.
    alone = Arrivals(Rooms(models, rules(shares=False)))
    found = least_fragmenting(alone, node, 0)
    assert found is not None
    assert places(found.node)[0] == ["1g.18gb@6"]


def test_an_arrival_joins_its_own_tenant_and_else_where_least_is_left_over() -> None:
    models = [
        need("large", 40, 4, tenant="x"),
        need("small", 16, 4, tenant="y"),
        need("other", 2, 1, tenant="z"),
        need("own", 2, 1, tenant="x"),
    ]
    half, quarter = Instance(0, 4, "3g.71gb"), Instance(4, 2, "1g.35gb")
    there = ((half, frozenset({0})), (quarter, frozenset({1})))
    arrivals = Arrivals(Rooms(models, rules()))
    for index, place in ((2, quarter), (3, half)):
        found = least_fragmenting(arrivals, (Standing(gpu(), there),), index)
        assert found is not None
        assert index in dict(found.node[0].groups)[place]


def test_the_slot_that_breaks_up_least_is_taken_and_first_fit_takes_the_first() -> None:
    models = walled(SMALL, HALF, HALF)
    node = (Standing(gpu()),)
    chosen = admit(least_fragmenting, models[:2], node)[-1]
    assert chosen is not None
    assert places(chosen.node) == [["1g.18gb@6", "3g.71gb@0"]]
    # Both halves are begun then, and the third finds no room; but one may move.
    refused = admit(least_fragmenting, [models[0], models[1], models[2]], node)[-1]
    assert refused is None
    first = admit(first_fit, models[:1], node)[-1]
    assert first is not None
    assert places(first.node) == [["1g.18gb@0"]]


def test_small_ones_make_way_within_the_limit_of_moves() -> None:
    node = (Standing(gpu()), Standing(gpu(1)))
    models = walled(SMALL, SMALL, HALF, HALF, HALF)
    before = admit(first_fit, models[:1], node)[-1]
    assert before is not None
    # A small one on each board.
    spread = (
        before.node[0],
        replace(before.node[1], groups=((Instance(4, 1, "1g.18gb"), frozenset({1})),)),
    )
    arrivals = Arrivals(Rooms(models, rules()))
    moved = 0
    for index in (2, 3, 4):
        found = least_fragmenting_or_moving(arrivals, spread, index)
        assert found is not None
        spread, moved = found.node, moved + found.moved
    assert moved == 1
    there = sorted(index for each in spread for _, group in each.groups for index in group)
    assert there == [0, 1, 2, 3, 4]


def test_foreign_instances_and_uncut_gpus_are_left_alone() -> None:
    foreign = [Instance(0, 4, "3g.71gb"), Instance(4, 4, "3g.71gb")]
    models = walled(SMALL)
    for choice in (first_fit, least_fragmenting, least_fragmenting_or_moving):
        assert admit(choice, models, (Standing(gpu(foreign=foreign)),)) == [None]
    alone = admit(least_fragmenting, walled((120, 4), SMALL), (Standing(gpu(mig=False)),))
    assert [found is not None for found in alone] == [True, False]


@pytest.mark.parametrize("choice", [first_fit, least_fragmenting, least_fragmenting_or_moving])
def test_nobody_is_refused_what_was_promised_over_a_long_stream(choice: Choice) -> None:
    chance = random.Random(7)
    models = random_models(chance, 60)
    rooms = Rooms(models, rules())
    arrivals = Arrivals(rooms)
    node: Node = (Standing(gpu()), Standing(gpu(1, "a100-80")))
    there: list[int] = []
    for index in range(len(models)):
        if there and chance.random() < 0.4:
            leaving = there.pop(chance.randrange(len(there)))
            node = tuple(each.without(leaving) for each in node)
        found = choice(arrivals, node, index)
        if found is None:
            continue
        assert found.moved <= MOVES_MAX
        node = found.node
        there.append(index)
        held = [each for gpu_ in node for _, group in gpu_.groups for each in group]
        assert sorted(held) == sorted(there)
        for each in node:
            assert not each.bin.state.geometry.problem(each.instances) or each.whole
            by_name = instance_rooms(each.bin)
            for place, group in each.groups:
                room = whole_room(each.bin) if place is None else by_name[place.profile]
                assert rooms.fits(group, room) is not None
    assert len(there) > 5
