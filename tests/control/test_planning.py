"""Placement arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from daemon.control.config import Worker
from daemon.control.errors import Refused
from daemon.control.state.failures import Failed
from daemon.control.state.history import Past, Sample
from daemon.control.state.planning import (
    PartitionView,
    Resident,
    Staged,
    context_tokens,
    place,
    plan_move,
    resident,
)
from daemon.control.state.records import Facts, Failure, Version
from swap.errors import InsufficientDeviceMemory

MIB = 1 << 20
FACTS = Facts("llama", 10, 10, 2, 4096, 5 * MIB, 6 * MIB, 5 * MIB, 1024)
VERSION = Version("prose", 1, "/m", "api", 0.0, "f", facts=FACTS)


def view(name: str, pages: int, *residents: Resident, **values: Any) -> PartitionView:
    return PartitionView(name, 2 * MIB, pages, 1e9, residents, **values)


def test_context_is_the_smaller_limit() -> None:
    assert context_tokens(FACTS, Worker(context_tokens_max=8192)) == 4096
    assert context_tokens(FACTS, Worker(context_tokens_max=100)) == 100


def test_a_model_takes_its_weights_and_the_kv_of_one_longest_request() -> None:
    found = resident(VERSION, Worker(context_tokens_max=2048))
    assert found == Resident("prose@1", 5 * MIB, 2 * MIB)
    # Whole pages for each: three for 5 MiB of weights, one for the KV.
    assert view("gpu0", 10).pages(found) == 4
    assert view("gpu0", 10, found).pages_free == 6


def test_of_a_model_with_a_window_no_context_takes_more_than_it_sees() -> None:
    facts = msgspec.structs.replace(FACTS, kv_window_tokens=512)
    version = msgspec.structs.replace(VERSION, facts=facts)

    def kv_bytes(**values: Any) -> int:
        return resident(version, Worker(**values)).kv_bytes_min

    assert kv_bytes(context_tokens_max=300) == 300 * 1024
    assert kv_bytes() == kv_bytes(context_tokens_max=2048) == (512 + 512 + 64) * 1024
    assert kv_bytes(step_tokens=16, running_requests_max=32) == (512 + 32 + 64) * 1024


def test_kv_that_is_stored_as_fp8_takes_what_inspecting_told() -> None:
    facts = msgspec.structs.replace(FACTS, kv_fp8_bytes_per_token=512)
    version = msgspec.structs.replace(VERSION, facts=facts)
    worker = Worker(context_tokens_max=2048, kv_dtype="fp8")
    assert resident(version, worker).kv_bytes_min == MIB
    assert resident(version, Worker(context_tokens_max=2048)).kv_bytes_min == 2 * MIB


def test_unusable_versions_say_why() -> None:
    failure = Failure("CHECKPOINT_INVALID", "tensor x is missing")
    with pytest.raises(Failed, match="tensor x is missing"):
        resident(Version("prose", 1, "/m", "api", 0.0, "f", failure=failure), Worker())


def test_plan_counts_what_moves() -> None:
    prose, code = Resident("prose@1", 5 * MIB, MIB), Resident("code@1", 7 * MIB, MIB)
    plan = plan_move(
        view("gpu0", 6, prose, past=Past(1e9, (Sample(1, 0.0, 0.0, 4.0, False),))),
        ("prose@1",),
        code,
        99,
    )
    assert plan.outgoing == ("prose@1",)
    assert (plan.copy_bytes, plan.build_bytes) == (7 * MIB, 99)
    # Of 6 pages, 2 are free and KV gives one; weights give two of their three.
    assert plan.evict_bytes == 3 * MIB
    assert plan.device_bytes_needed == 5 * 2 * MIB
    assert plan.device_bytes_available == 6 * 2 * MIB
    assert plan.predicted_ms == pytest.approx(7 * MIB / 1e9 * 1000 + 4.0)


def test_what_is_staged_needs_no_pages_and_no_copy() -> None:
    prose, code = Resident("prose@1", 5 * MIB, MIB), Resident("code@1", 8 * MIB, MIB)
    for pages, copy_bytes in ((1, 6 * MIB), (3, 2 * MIB), (4, 0)):
        part = Staged(pages * 2 * MIB, copy_bytes)
        here = dataclasses.replace(view("gpu0", 9, prose), staged={"code@1": part})
        plan = plan_move(here, (), code, 0)
        assert (plan.copy_bytes, plan.staged_bytes) == (copy_bytes, pages * 2 * MIB)
        assert plan.device_bytes_needed == (5 - pages) * 2 * MIB
        assert plan.predicted_ms == pytest.approx(copy_bytes / here.link_bytes_per_s * 1000)
        # Where most of it is, it is loaded.
        assert place([view("gpu1", 20), here], code, 0, 0).partition == "gpu0"


def test_a_copy_is_foreseen_to_wait_for_those_that_use_its_link() -> None:
    code = Resident("code@1", 7 * MIB, MIB)
    shared = dataclasses.replace(view("gpu0", 6, code), link_wait_ms=30.0)
    prose = Resident("prose@1", 5 * MIB, MIB)
    alone = plan_move(view("gpu0", 6, code), ("code@1",), prose, 0)
    assert plan_move(shared, ("code@1",), prose, 0).predicted_ms == alone.predicted_ms + 30.0
    # What copies nothing waits for nobody.
    assert plan_move(shared, ("code@1",), None, 0).predicted_ms == 0.0


def test_place_takes_the_emptiest_partition() -> None:
    full = view("gpu0", 9, Resident("x@1", 8 * MIB, MIB))
    assert place([full, view("gpu1", 8)], Resident("p@1", MIB, MIB), 0, 0).partition == "gpu1"


def test_place_explains_why_it_has_none() -> None:
    crowded = view("gpu0", 100, Resident("x@1", MIB, MIB))
    full = view("gpu1", 8, Resident("y@1", 14 * MIB, MIB))
    plan = place([crowded, full], Resident("p@1", 4 * MIB, MIB), 1, 7)
    assert plan.partition == ""
    assert (plan.incoming, plan.build_bytes) == ("p@1", 7)
    assert "gpu0 has 1 models already (scheduling.max_active_models = 1)" in plan.note
    assert "gpu1 has 1 models already" in plan.note
    tight = place([full], Resident("p@1", 4 * MIB, MIB), 0, 0)
    assert "y@1 would stay" in tight.note


def test_place_refuses_what_even_an_empty_partition_cannot_hold() -> None:
    with pytest.raises(InsufficientDeviceMemory, match="use a partition of at least"):
        place([view("gpu0", 3), view("gpu1", 2)], Resident("p@1", 20 * MIB, MIB), 0, 0)
    with pytest.raises(Refused) as refused:
        place([], Resident("p@1", MIB, MIB), 0, 0)
    assert refused.value.reason == "WORKER_UNAVAILABLE"
