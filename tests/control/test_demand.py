"""The judgement behind swaps on demand, case by case and as properties."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.actions.demand import Bring, Decision, Occupant, Room, Wanted, decide

YOUNG, OLD = 0.2, 50.0


def want(model: str, pages: int = 10, oldest_s: float = 1.0, partition: str = "") -> Wanted:
    return Wanted(model, 1, oldest_s, {"gpu0": pages, "gpu1": pages}, partition)


def room(*occupants: Occupant, name: str = "gpu0", pages: int = 20, busy: bool = False) -> Room:
    return Room(name, pages, occupants, busy)


def on(model: str, age_s: float = OLD, pages: int = 10, requests: int = 0) -> Occupant:
    return Occupant(model, pages, age_s, requests)


def look(wanted: list[Wanted], rooms: list[Room], most: int = 0) -> Decision:
    return decide(wanted, rooms, most, 1.0)


def test_nothing_wanted_nothing_done() -> None:
    assert look([], [room(on("a"))]) == Decision((), None)


def test_free_room_is_used_before_anybody_is_taken_off() -> None:
    assert look([want("b")], [room(on("a"))]).brings == (Bring("b", "gpu0", ()),)


def test_without_room_the_idle_and_longest_there_leaves() -> None:
    rooms = [room(on("busy", requests=3), on("idle", age_s=5.0))]
    assert look([want("b")], rooms).brings == (Bring("b", "gpu0", ("idle",)),)
    rooms = [room(on("newer", age_s=5.0), on("older", age_s=9.0))]
    assert look([want("b")], rooms).brings == (Bring("b", "gpu0", ("older",)),)


def test_as_many_leave_as_are_needed_and_no_more() -> None:
    rooms = [room(on("a", pages=5), on("b", pages=5), on("c", pages=10))]
    assert look([want("d", pages=8)], rooms).brings == (Bring("d", "gpu0", ("a", "b")),)


def test_young_models_stay_and_the_next_look_is_when_one_may_leave() -> None:
    decision = look([want("b")], [room(on("a", age_s=YOUNG, pages=15))])
    assert decision.brings == ()
    assert decision.look_again_s == pytest.approx(0.8)


def test_two_models_in_constant_demand_take_turns() -> None:
    """Each swap makes the other one old enough after min_residency_s, and not before."""
    active, since_s, now_s = "a", 0.0, 0.0
    turns = []
    while now_s < 10:
        other = "b" if active == "a" else "a"
        rooms = [room(on(active, age_s=now_s - since_s, pages=15, requests=9))]
        decision = look([want(other, pages=15)], rooms)
        if decision.brings:
            assert decision.brings[0].victims == (active,)
            active, since_s = other, now_s
            turns.append(now_s)
        now_s += decision.look_again_s or 0.25
    assert len(turns) == 9
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(turns))


def test_limit_of_active_models_counts() -> None:
    decision = look([want("b", pages=1)], [room(on("a", pages=1))], most=1)
    assert decision.brings == (Bring("b", "gpu0", ("a",)),)


def test_who_waited_longest_comes_first_and_partitions_are_used_side_by_side() -> None:
    rooms = [room(on("x", pages=20)), room(on("y", pages=20), name="gpu1")]
    wanted = [want("late", 20, 1.0), want("first", 20, 9.0), want("second", 20, 5.0)]
    brings = look(wanted, rooms).brings
    assert [each.model for each in brings] == ["first", "second"]
    assert {each.partition for each in brings} == {"gpu0", "gpu1"}


def test_busy_partitions_are_left_alone() -> None:
    assert look([want("b")], [room(on("a"), busy=True)]) == Decision((), None)


def test_kept_requests_are_served_where_they_are() -> None:
    rooms = [room(on("a", pages=20)), room(name="gpu1")]
    decision = look([want("b", partition="gpu0")], rooms)
    assert decision.brings == (Bring("b", "gpu0", ("a",)),)


def test_what_fits_nowhere_is_tried_once_so_that_the_plan_can_say_why() -> None:
    rooms = [room(on("a", age_s=YOUNG)), room(name="gpu1", pages=40)]
    assert look([want("huge", pages=99)], rooms).brings == (Bring("huge", "gpu1", ()),)


occupants = st.builds(
    Occupant,
    model=st.sampled_from("abcdef"),
    pages=st.integers(1, 10),
    active_for_s=st.floats(0, 5),
    requests=st.integers(0, 3),
)
rooms_ = st.lists(
    st.builds(
        Room,
        partition=st.sampled_from(["gpu0", "gpu1"]),
        pages_total=st.integers(5, 30),
        occupants=st.lists(occupants, max_size=4, unique_by=lambda each: each.model).map(tuple),
        busy=st.booleans(),
    ),
    max_size=2,
    unique_by=lambda each: each.partition,
)
wants = st.lists(
    st.builds(
        want,
        model=st.sampled_from("uvwxyz"),
        pages=st.integers(1, 40),
        oldest_s=st.floats(0, 10),
        partition=st.sampled_from(["", "gpu0"]),
    ),
    max_size=4,
    unique_by=lambda each: each.model,
)


@given(wants, rooms_, st.integers(0, 3))
def test_every_decision_is_sound(wanted: list[Wanted], rooms: list[Room], most: int) -> None:
    decision = decide(wanted, rooms, most, 1.0)
    by_name = {each.partition: each for each in rooms}
    pages = {each.model: each.pages for each in wanted}
    assert len({each.partition for each in decision.brings}) == len(decision.brings)
    for bring in decision.brings:
        place = by_name[bring.partition]
        assert not place.busy
        victims = [each for each in place.occupants if each.model in bring.victims]
        assert len(victims) == len(bring.victims)
        assert all(each.active_for_s >= 1.0 for each in victims)
        staying = [each for each in place.occupants if each.model not in bring.victims]
        needed = pages[bring.model][bring.partition]
        if needed <= place.pages_total:
            assert sum(each.pages for each in staying) + needed <= place.pages_total
            assert not most or len(staying) < most
    if decision.look_again_s is not None:
        assert 0 <= decision.look_again_s <= 1.0
