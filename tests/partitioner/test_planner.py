"""Plans keep what both layouts have, destroy as little as can be, and end where they should."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.catalogue import load_catalogue
from partitioner.errors import LayoutDoesNotFitError
from partitioner.geometry import Geometry, Instance, geometry_of, legal_layouts
from partitioner.layout import Costs, GpuPlan, GpuState, GpuWanted, MigChange, Share, Wanted
from partitioner.placing import nearest_fit
from partitioner.planner import plan, plan_id

H200 = geometry_of(load_catalogue().board("h200"))
A30 = geometry_of(load_catalogue().board("a30"))
LAYOUTS = {id(each): sorted(legal_layouts(each)) for each in (H200, A30)}
GIB = 1 << 30


def gpu(geometry: Geometry = H200, *instances: Instance, foreign: int = 0) -> GpuState:
    """A GPU in MIG mode; the first `foreign` of its instances are not ours."""
    return GpuState(
        uuid="GPU-0",
        index=0,
        product="a board",
        pci_id="00000000:10:00.0",
        geometry=geometry,
        memory_bytes=140 * GIB,
        mig_enabled=True,
        instances=instances,
        foreign=frozenset(instances[:foreign]),
    )


def profile(geometry: Geometry, name: str, *shares: Share) -> Wanted:
    return Wanted(geometry.by_name[name].placements, name, shares=shares)


def exactly(place: Instance) -> Wanted:
    return Wanted((place,), str(place))


def h200(*names: str) -> GpuWanted:
    return GpuWanted("GPU-0", tuple(profile(H200, name) for name in names))


def place(name: str, start: int, geometry: Geometry = H200) -> Instance:
    return next(each for each in geometry.by_name[name].placements if each.start == start)


boards = st.sampled_from([H200, A30])


@st.composite
def problems(draw: st.DrawFn) -> tuple[GpuState, GpuWanted]:
    """A GPU with some foreign instances, and wishes that the profiles of a legal layout meet."""
    geometry = draw(boards)
    current = draw(st.sampled_from(LAYOUTS[id(geometry)]))
    shuffled = draw(st.permutations(current))
    foreign = draw(st.integers(0, min(2, len(current))))
    state = gpu(geometry, *shuffled, foreign=foreign)
    beside = [each for each in LAYOUTS[id(geometry)] if state.foreign <= set(each)]
    target = draw(st.sampled_from(beside))
    wishes = []
    for each in draw(st.permutations([one for one in target if one not in state.foreign])):
        kind = draw(st.sampled_from(["profile", "exact", "need"]))
        if kind == "exact":
            wishes.append(exactly(each))
        elif kind == "profile":
            wishes.append(profile(geometry, each.profile))
        else:
            least = geometry.by_name[each.profile]
            enough = [
                one for one in geometry.profiles
                if one.memory_bytes >= least.memory_bytes and one.sm_count >= least.sm_count
            ]  # fmt: skip
            options = tuple(option for one in enough for option in one.placements)
            wishes.append(Wanted(options, "a need"))
    return state, GpuWanted("GPU-0", tuple(wishes))


def applied(state: GpuState, wish: GpuWanted) -> GpuState:
    """Carry a plan out on a model of the board that refuses what hardware would."""
    (done,) = plan([state], [wish], Costs()).gpus
    standing = list(state.instances)
    for each in done.destroyed_instances:
        assert each not in state.foreign
        standing.remove(each)
    for each in done.created_instances:
        assert state.geometry.fits(standing, each), (standing, each)
        standing.append(each)
    return replace(state, instances=tuple(sorted(standing)), mig_enabled=True)


def least_destroyed(state: GpuState, wish: GpuWanted) -> int | None:
    """The answer found by looking at every legal layout, with nothing of the planner's search."""
    own = set(state.instances) - state.foreign
    wishes = wish.instances or ()
    best = None
    for layout in LAYOUTS[id(state.geometry)]:
        if not state.foreign <= set(layout) or len(layout) != len(wishes) + len(state.foreign):
            continue
        rest = [each for each in layout if each not in state.foreign]
        serves = any(
            all(one in each.options for one, each in zip(order, wishes, strict=True))
            for order in itertools.permutations(rest)
        )
        if serves:
            destroyed = len(own - set(rest))
            best = destroyed if best is None else min(best, destroyed)
    return best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_a_plan_ends_in_the_wanted_layout_and_planning_again_does_nothing(
    problem: tuple[GpuState, GpuWanted],
) -> None:
    state, wish = problem
    after = applied(state, wish)
    assert after.geometry.problem(after.instances) == ""
    assert state.foreign <= set(after.instances)
    (first,) = plan([state], [wish], Costs()).gpus
    for chosen, wanted in zip(first.chosen, wish.instances or (), strict=True):
        assert chosen in wanted.options
    assert set(after.instances) == set(first.chosen) | state.foreign
    assert not set(first.kept_instances) & set(first.destroyed_instances)
    again = plan([after], [wish], Costs())
    assert not again.changes
    assert (again.gpus[0].create, again.gpus[0].destroy, again.gpus[0].move) == ((), (), ())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_as_few_instances_are_destroyed_as_can_be(problem: tuple[GpuState, GpuWanted]) -> None:
    state, wish = problem
    (done,) = plan([state], [wish], Costs()).gpus
    assert len(done.destroyed_instances) == least_destroyed(state, wish)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(boards, st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(0, 400))
def test_what_is_refused_has_no_layout_and_the_nearest_one_is_legal(
    geometry: Geometry, picks: list[int], seed: int
) -> None:
    names = [each.name for each in geometry.profiles]
    wishes = tuple(profile(geometry, names[pick % len(names)]) for pick in picks)
    wish = GpuWanted("GPU-0", wishes)
    layouts = LAYOUTS[id(geometry)]
    state = gpu(geometry, *layouts[seed % len(layouts)])
    possible = any(
        sorted(each.profile for each in layout) == sorted(one.what for one in wishes)
        for layout in layouts
    )
    if possible:
        assert not plan([applied(state, wish)], [wish], Costs()).changes
        return
    with pytest.raises(LayoutDoesNotFitError, match="the nearest layout that would fit is"):
        plan([state], [wish], Costs())
    nearest = nearest_fit(geometry, wishes)
    assert nearest
    assert geometry.problem(nearest) == ""
    assert len(nearest) <= len(wishes)


def test_an_instance_in_both_layouts_is_never_touched() -> None:
    serving = place("3g.71gb", 4)
    (done,) = plan([gpu(H200, serving)], [h200("1g.18gb", "3g.71gb", "2g.35gb")], Costs()).gpus
    assert done.kept_instances == (serving,)
    assert done.keep == ("gpu0/3g.71gb@4",)
    assert done.destroyed_instances == ()


def test_new_instances_are_placed_where_they_fragment_least() -> None:
    """A 3g at 4 leaves room for a 4g; a 1g at 6 takes a slot that few profiles can use."""
    (done,) = plan([gpu()], [h200("3g.71gb")], Costs()).gpus
    assert done.created_instances == (place("3g.71gb", 4),)
    (done,) = plan([gpu()], [h200("1g.18gb")], Costs()).gpus
    assert done.created_instances == (place("1g.18gb", 6),)


def test_of_equal_plans_the_one_that_moves_the_cheaper_model_is_taken() -> None:
    state = gpu(H200, place("3g.71gb", 0), place("3g.71gb", 4))
    for dear, cheap in ((0, 4), (4, 0)):
        move_ms = {f"gpu0/3g.71gb@{dear}": 900.0, f"gpu0/3g.71gb@{cheap}": 300.0}
        costs = Costs(create_ms=10, destroy_ms=1000, move_ms=move_ms)
        planned = plan([state], [h200("3g.71gb", "2g.35gb")], costs)
        assert planned.gpus[0].move == (f"gpu0/3g.71gb@{cheap}",)
        assert planned.downtime_ms == 1000 + 10 + 300
    assert plan([state], [h200("3g.71gb")], Costs()).downtime_ms == 0.0


def test_switching_mig_on_and_off_takes_the_whole_gpu_away_and_brings_it_back() -> None:
    whole = replace(gpu(), mig_enabled=False, mig_toggle_needs_reset=True)
    costs = Costs(move_ms={"gpu0": 100.0}, mode_ms=20.0, reset_ms=3000.0, create_ms=1.0)
    (on,) = plan([whole], [h200("7g.141gb")], costs).gpus
    assert (on.mig_change, on.reset, on.destroy, on.move) == (
        *(MigChange.ENABLE, True), ("gpu0",), ("gpu0",),
    )  # fmt: skip
    assert on.downtime_ms == 3121.0
    (off,) = plan([gpu(H200, place("7g.141gb", 0))], [GpuWanted("GPU-0")], Costs()).gpus
    assert (off.mig_change, off.reset) == (MigChange.DISABLE, False)
    assert (off.destroy, off.create) == (("gpu0/7g.141gb@0",), ("gpu0",))


def test_shares_are_planned_under_their_place() -> None:
    half = Share(8 * GIB, 50, "a")
    serving = place("3g.71gb", 4)
    wish = GpuWanted("GPU-0", (profile(H200, "3g.71gb", half, half),))
    (done,) = plan([gpu(H200, serving)], [wish], Costs()).gpus
    assert done.destroyed_instances == ()
    assert done.create == ("gpu0/3g.71gb@4/mps0", "gpu0/3g.71gb@4/mps1")
    state = replace(gpu(H200, serving), shares={serving: (half, replace(half, thread_percent=30))})
    (done,) = plan([state], [wish], Costs()).gpus
    assert done.keep == ("gpu0/3g.71gb@4/mps0",)
    assert done.destroy == done.create == ("gpu0/3g.71gb@4/mps1",)
    # Of two alike instances the one that has the wanted shares keeps them.
    other = place("3g.71gb", 0)
    state = replace(state, instances=(serving, other), shares={serving: (half,)})
    wishes = (profile(H200, "3g.71gb"), profile(H200, "3g.71gb", half))
    assert not plan([state], [GpuWanted("GPU-0", wishes)], Costs()).changes


def test_of_shares_with_multiprocessors_of_their_own_none_stays_when_one_is_another() -> None:
    wide, narrow = Share(8 * GIB, None, "a", 96), Share(8 * GIB, None, "", 32)
    state = replace(gpu(H200), mig_enabled=False, shares={None: (wide, narrow)})
    both = ("gpu0/mps0", "gpu0/mps1")

    def planned(*shares: Share) -> GpuPlan:
        (done,) = plan([state], [GpuWanted("GPU-0", None, shares)], Costs()).gpus
        return done

    assert planned(wide, narrow).keep == both
    other = planned(wide, replace(narrow, sm_count=24))
    assert (other.keep, other.destroy, other.create) == ((), both, both)
    assert planned(wide).destroy == both, "the first cannot stay without the second"
    ceiling = Share(8 * GIB, 50, "a")
    assert planned(ceiling, ceiling).destroy == both
    wishes = [GpuWanted("GPU-0", None, (replace(wide, sm_count=count),)) for count in (88, 96)]
    assert len({plan_id([state], [each]) for each in wishes}) == 2


def test_foreign_instances_bar_the_whole_gpu_and_are_named_when_nothing_fits() -> None:
    state = gpu(H200, place("3g.71gb", 0), foreign=1)
    with pytest.raises(LayoutDoesNotFitError, match=r"gpu0/3g.71gb@0 on it are not ours"):
        plan([state], [GpuWanted("GPU-0")], Costs())
    with pytest.raises(LayoutDoesNotFitError, match=r"beside 3g.71gb@0, which are not ours"):
        plan([state], [h200("7g.141gb")], Costs())
    (done,) = plan([state], [h200("3g.71gb")], Costs()).gpus
    assert (done.foreign, done.create) == (("gpu0/3g.71gb@0",), ("gpu0/3g.71gb@4",))


def test_the_id_is_stable_and_changes_with_either_layout() -> None:
    state, wish = gpu(H200, place("3g.71gb", 4)), h200("3g.71gb")
    assert plan_id([state], [wish]) == plan_id([replace(state)], [h200("3g.71gb")])
    others = [
        plan_id([gpu(H200, place("3g.71gb", 0))], [wish]),
        plan_id([replace(state, foreign=frozenset(state.instances))], [wish]),
        plan_id([state], [h200("2g.35gb")]),
        plan_id([state], [replace(wish, owner="a")]),
    ]
    assert len({plan_id([state], [wish]), *others}) == 5
