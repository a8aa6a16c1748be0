"""What fits into one room: memory to the byte, walls between tenants, time per token."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from partitioner.packing.rooms import Rooms, instance_rooms, whole_room
from partitioner.packing.sharing import load_rules
from partitioner.packing.values import Arrangement, Isolation, ModelNeed, Refusal, Room
from tests.partitioner.packing.node import GIB, MIB, gpu, need, random_models, rules

WHOLE = whole_room(gpu())
SMALL = instance_rooms(gpu())["1g.18gb"]


def judge(room: Room, *models: ModelNeed) -> Arrangement | Refusal:
    return Rooms(models, rules()).judge(frozenset(range(len(models))), room)


def refused(room: Room, *models: ModelNeed) -> Refusal:
    found = judge(room, *models)
    assert isinstance(found, Refusal)
    return found


def arranged(room: Room, *models: ModelNeed) -> Arrangement:
    found = judge(room, *models)
    assert isinstance(found, Arrangement)
    return found


def test_rooms_have_what_the_driver_tells_not_what_their_name_says() -> None:
    assert SMALL.memory_bytes == 16 * GIB
    assert whole_room(gpu(mig=False)).memory_bytes == 143104 * MIB
    # The part of memory or the part of multiprocessors, whichever is less of the GPU.
    assert SMALL.slowdown == pytest.approx(132 / 16)
    assert instance_rooms(gpu(board="a100-80"))["7g.80gb"].slowdown == pytest.approx(108 / 98)
    assert WHOLE.slowdown == 1.0


def test_a_worker_takes_its_context_and_workspace_and_whole_pages() -> None:
    # 16 GiB less 3 GiB for the worker leave 13 GiB; a byte more is a page more.
    assert arranged(SMALL, need(weights_gib=9, kv_gib=4)).used_bytes == 16 * GIB
    more = replace(need(weights_gib=9, kv_gib=4), kv_bytes=4 * GIB + 1)
    lack = refused(SMALL, more)
    assert (lack.kind, lack.want - lack.have) == ("memory", 64 * MIB)


def test_models_of_one_worker_pay_for_it_once_and_shares_each_of_them() -> None:
    one, other = need("a", 8, 4, tenant="x"), need("b", 8, 4, tenant="y")
    own = arranged(WHOLE, one, replace(other, tenant="x"))
    assert (len(own.workers), own.used_bytes) == (1, 27 * GIB)
    walled = arranged(WHOLE, one, other)
    assert [each.models for each in walled.workers] == [(0,), (1,)]
    assert [each.memory_bytes for each in walled.workers] == [15 * GIB, 15 * GIB]
    # And the MPS server besides.
    assert walled.used_bytes == 30 * GIB + 256 * MIB


def test_memory_of_each_context_decides_whether_shares_fit() -> None:
    models = [need(f"m{i}", 14, 4, tenant=f"t{i}") for i in range(6)]
    together = [replace(each, isolation=Isolation.NONE) for each in models]
    room = instance_rooms(gpu())["7g.141gb"]
    assert len(arranged(room, *together).workers) == 1
    assert len(arranged(room, *models).workers) == 6
    # Seven models are 126 GiB: one context fits beside them, seven do not.
    seven = need("m6", 14, 4, tenant="t6")
    assert (
        arranged(room, *together, replace(seven, isolation=Isolation.NONE)).used_bytes < 130 * GIB
    )
    lack = refused(room, *models, seven)
    assert (lack.kind, lack.want) == ("memory", 7 * 21 * GIB + 256 * MIB)


@pytest.mark.parametrize(
    ("mine", "others", "tenant", "workers"),
    [
        (Isolation.NONE, Isolation.NONE, "y", 1),
        (Isolation.NONE, Isolation.PROCESS, "y", 2),
        (Isolation.HARDWARE, Isolation.NONE, "y", 0),
        (Isolation.NONE, Isolation.HARDWARE, "y", 0),
        (Isolation.HARDWARE, Isolation.HARDWARE, "x", 1),
    ],
)
def test_the_stronger_wall_of_two_tenants_holds(
    mine: Isolation, others: Isolation, tenant: str, workers: int
) -> None:
    pair = (need("a", tenant="x", isolation=mine), need("b", tenant=tenant, isolation=others))
    if workers:
        assert len(arranged(WHOLE, *pair).workers) == workers
    else:
        assert refused(WHOLE, *pair).kind == "isolation"


def test_shares_of_one_tenant_are_one_worker_where_others_are_walled_off() -> None:
    models = [need("a", 4, tenant="x"), need("b", 4, tenant="y"), need("c", 4, tenant="x")]
    assert [each.models for each in arranged(WHOLE, *models).workers] == [(0, 2), (1,)]
    without = Rooms(models, rules(shares=False)).judge(frozenset(range(3)), WHOLE)
    assert isinstance(without, Refusal)
    assert without.kind == "shares"


def test_two_mps_clients_are_gated_on_time_per_token_though_memory_would_do() -> None:
    # As measured: 52.3 ms alone are 62.5 ms beside one other client.
    pair = [need(n, 4, tenant=n, alone_ms=52.3, requests=32, ms_per_token=63) for n in ("a", "b")]
    assert arranged(WHOLE, *pair).ms_per_token == pytest.approx((62.5, 62.5), abs=0.05)
    strict = [replace(each, ms_per_token=60) for each in pair]
    late = refused(WHOLE, *strict)
    assert (late.kind, late.want) == ("time", 60)
    assert late.have == pytest.approx(62.5, abs=0.05)
    assert arranged(WHOLE, strict[0]).ms_per_token == (52.3,)
    # One that is seldom busy costs less: 10 tokens/s of 612 that it could have.
    idle = replace(strict[1], tokens_per_s=10, ms_per_token=0)
    assert arranged(WHOLE, strict[0], idle).ms_per_token[0] == pytest.approx(52.5, abs=0.1)


def test_throughput_and_large_models_have_figures_of_their_own() -> None:
    pair = [need(n, 4, tenant=n, alone_ms=50, requests=10, tokens_per_s=184) for n in ("a", "b")]
    assert arranged(WHOLE, *pair).models == (0, 1)
    # 200 tokens/s alone, 7.5% less for each other client that is busy all the time.
    full = replace(pair[0], tokens_per_s=0)
    short = refused(WHOLE, full, replace(pair[1], tokens_per_s=190))
    assert (short.kind, short.have) == ("rate", pytest.approx(185))
    # Above what sharing was measured to pay for, the two are taken to take turns.
    large = [need(n, 14, tenant=n, alone_ms=20) for n in ("a", "b")]
    assert arranged(WHOLE, *large).ms_per_token == pytest.approx((40, 40))


def test_models_of_one_worker_wait_for_each_others_steps() -> None:
    fast, slow = need("a", alone_ms=10, requests=4), need("b", alone_ms=30, requests=4)
    assert arranged(WHOLE, fast, slow).ms_per_token == pytest.approx((40, 40))
    # Busy a quarter of the time: 33 of its 133 tokens/s.
    seldom = replace(slow, tokens_per_s=4000 / 30 / 4)
    assert arranged(WHOLE, fast, seldom).ms_per_token == pytest.approx((17.5, 40))


def test_a_smaller_room_is_slower_and_bandwidth_stands_in_for_a_measurement() -> None:
    assert arranged(SMALL, need(alone_ms=4)).ms_per_token == pytest.approx((33,))
    room = whole_room(gpu(bytes_per_s=4.8e12))
    assert arranged(room, need(weights_gib=9)).ms_per_token[0] == pytest.approx(3.36, abs=0.01)
    assert refused(WHOLE, need(ms_per_token=50)).kind == "unknown"
    assert arranged(WHOLE, need()).ms_per_token == (0.0,)


def test_a_reserve_smaller_than_a_context_is_all_context() -> None:
    tiny = load_rules(2 * MIB, 0)
    assert (tiny.context_bytes, tiny.worker_bytes) == (0, 0)
    assert rules().worker_bytes == 3 * GIB
    assert [rules().threads_percent(clients) for clients in (1, 2, 3, 4)] == [100, 60, 40, 30]


def test_a_group_fits_wherever_a_larger_one_does_and_who_is_apart_never_goes_together() -> None:
    chance = random.Random(5)
    models = [
        replace(each, tokens_per_s=chance.choice((0, 0, 20, 60)))
        for each in random_models(chance, 10)
    ]
    asked = Rooms(models, rules())
    places = (WHOLE, *instance_rooms(gpu()).values())
    for one, other in itertools.combinations(range(len(models)), 2):
        for room in places:
            asked.judge(frozenset((one,)), room)
            asked.judge(frozenset((one, other)), room)
    shared = kept_apart = 0
    for _ in range(600):
        group = frozenset(chance.sample(range(len(models)), chance.randint(2, 5)))
        room = chance.choice(places)
        fresh = Rooms(models, rules()).fits(group, room) is not None
        apart = any(
            asked.apart(room)[one] >> other & 1 for one, other in itertools.permutations(group, 2)
        )
        assert not (fresh and apart)
        kept_apart += apart
        if fresh:
            shared += 1
            for left in group:
                assert asked.fits(group - {left}, room) is not None
    assert shared > 20
    assert kept_apart > 100
