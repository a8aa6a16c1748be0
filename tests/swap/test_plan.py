"""The plan of a swap: arithmetic in whole pages, and errors that name the figure."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swap.errors import InsufficientDeviceMemory
from swap.plan import IncomingModel, Partition, ResidentModel, plan_swap

PARTITION = Partition(page_bytes=100, pages_total=20, pages_free=4, link_bytes_per_s=1000.0)
RESIDENTS = (ResidentModel("a", 810, 10), ResidentModel("b", 300, 4), ResidentModel("c", 150, 2))


def test_a_swap_in_figures():
    plan = plan_swap(
        PARTITION,
        RESIDENTS,
        outgoing=("a",),
        incoming=IncomingModel("d", weights_bytes=901, kv_bytes_min=250),
        overhead_ms=7,
    )
    assert (plan.incoming, plan.evicted, plan.evicted_bytes) == ("d", ("a",), 810)
    assert (plan.copy_bytes, plan.pages_needed, plan.pages_freed) == (901, 13, 10)
    assert plan.pages_free_after == 1
    assert plan.predicted_ms == pytest.approx(908)


def test_no_more_is_evicted_than_is_needed():
    def evicted(weights_bytes: int) -> tuple[str, ...]:
        return plan_swap(
            PARTITION,
            RESIDENTS,
            outgoing=(),
            incoming=IncomingModel("d", weights_bytes, 100),
            may_evict=("c", "a"),
        ).evicted

    assert evicted(300) == ()
    assert evicted(301) == ("c",)
    assert evicted(501) == ("c", "a")


def test_an_unload_copies_nothing():
    plan = plan_swap(PARTITION, RESIDENTS, outgoing=("b", "c", "b"), incoming=None)
    assert (plan.evicted, plan.copy_bytes, plan.predicted_ms) == (("b", "c"), 0, 0)
    assert plan.pages_free_after == 10


def test_a_model_may_be_reloaded_in_place():
    plan = plan_swap(PARTITION, RESIDENTS, outgoing=("a",), incoming=IncomingModel("a", 1300, 100))
    assert plan.pages_free_after == 0


@pytest.mark.parametrize(
    ("weights_bytes", "outgoing", "residents", "says"),
    [
        (1900, ("a", "b", "c"), RESIDENTS, "partition of at least 2100 bytes"),
        (600, ("b",), RESIDENTS, "100 bytes more off it: a, c would stay"),
        (1500, ("a",), RESIDENTS[:1], "wait until 300 bytes more are free"),
    ],
)
def test_what_does_not_fit_names_the_figure_to_change(weights_bytes, outgoing, residents, says):
    incoming = IncomingModel("d", weights_bytes, 200 if weights_bytes != 600 else 300)
    with pytest.raises(InsufficientDeviceMemory, match=says) as refused:
        plan_swap(PARTITION, residents, outgoing=outgoing, incoming=incoming)
    metadata = refused.value.metadata
    assert int(metadata["needed_bytes"]) > int(metadata["available_bytes"])
    assert metadata["total_bytes"] == "2000"


@pytest.mark.parametrize(
    ("outgoing", "incoming"), [(("x",), None), (("a",), "b"), ((), "a"), (("a", "x"), "d")]
)
def test_models_must_be_where_the_plan_says(outgoing, incoming):
    model = IncomingModel(incoming, 1, 1) if incoming else None
    with pytest.raises(ValueError, match=r"not on|on the partition already"):
        plan_swap(PARTITION, RESIDENTS, outgoing=outgoing, incoming=model)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=4),
    st.integers(0, 10),
    st.integers(0, 4000),
    st.integers(0, 1000),
    st.data(),
)
def test_a_plan_always_fits_and_a_refusal_is_always_right(sizes, free, weights, kv, data):
    residents = tuple(ResidentModel(f"m{i}", n * 90, n) for i, n in enumerate(sizes))
    partition = Partition(100, free + sum(sizes), free, 1.0)
    chosen = data.draw(st.permutations([resident.model for resident in residents]))
    split = data.draw(st.integers(0, len(chosen)))
    needed = -(-weights // 100) - (-kv // 100)
    reachable = free + sum(sizes)
    try:
        plan = plan_swap(
            partition,
            residents,
            outgoing=tuple(chosen[:split]),
            incoming=IncomingModel("new", weights, kv),
            may_evict=tuple(chosen[split:]),
        )
    except InsufficientDeviceMemory:
        assert needed > reachable
    else:
        assert plan.pages_needed == needed <= free + plan.pages_freed
        assert plan.pages_free_after == free + plan.pages_freed - needed
        assert set(chosen[:split]) <= set(plan.evicted)
