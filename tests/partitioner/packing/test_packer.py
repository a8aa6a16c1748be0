"""The packer against the exhaustive search, its promises, layout files, and explanations."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from partitioner.geometry import Instance
from partitioner.layout import Costs
from partitioner.layout_resolve import plan_file
from partitioner.packing import packer
from partitioner.packing.branching import best_packing
from partitioner.packing.exact import MODELS_MAX, best_value
from partitioner.packing.filling import cuts_of, score
from partitioner.packing.layout_text import layout_text, partitions
from partitioner.packing.packer import pack
from partitioner.packing.rooms import Rooms, instance_rooms, whole_room
from partitioner.packing.values import Bin, Isolation, ModelNeed, Packing
from partitioner.packing.why import explain
from tests.partitioner.packing.node import GIB, gpu, need, random_models, random_node, rules


def check(packing: Packing, models: list[ModelNeed], bins: list[Bin]) -> None:
    """Every promise that a packing makes, looked at again from nothing."""
    rooms = Rooms(models, rules())
    seen: list[int] = []
    for filled in packing.filled:
        state = filled.bin.state
        places = [place for place, _ in filled.rooms if place is not None]
        assert not state.geometry.problem((*places, *state.foreign))
        assert len(places) in (0, len(filled.rooms))
        for place, arrangement in filled.rooms:
            room = whole_room(filled.bin)
            if place is not None:
                room = instance_rooms(filled.bin)[place.profile]
            assert rooms.fits(frozenset(arrangement.models), room) == arrangement
            assert arrangement.used_bytes <= room.memory_bytes
            tenants = {models[each].tenant for each in arrangement.models}
            if any(models[e].isolation is Isolation.HARDWARE for e in arrangement.models):
                assert len(tenants) == 1
            seen += arrangement.models
    assert sorted([*seen, *packing.left_out]) == list(range(len(models)))
    assert packing.value == pytest.approx(sum(models[each].value for each in seen))


def graded(count: int, nodes: int, gpus: tuple[int, ...]) -> list[float]:
    """Packed value of the best there is, once for each random node."""
    shares = []
    for seed in range(nodes):
        chance = random.Random(seed)
        models = random_models(chance, count)
        bins = random_node(chance, chance.choice(gpus))
        packing = pack(models, bins, rules())
        check(packing, models, bins)
        exact = best_value(models, bins, rules())
        assert packing.value <= exact + 1e-9, "the exact search missed a packing"
        shares.append(packing.value / exact if exact else 1.0)
    return shares


def test_few_models_are_packed_as_well_as_can_be_on_every_node() -> None:
    assert min(graded(7, 12, (1, 2))) == pytest.approx(1.0)
    assert min(graded(9, 3, (3,))) == pytest.approx(1.0)


def test_greedy_and_mended_alone_comes_within_two_per_cent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packer, "FEW_MAX", 0)
    assert statistics.mean(graded(7, 12, (1, 2))) >= 0.98


def test_a_search_that_reaches_its_bound_says_so_and_is_mended_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = random_models(random.Random(1), 8)
    bins = [gpu(), gpu(1)]
    rooms, cuts = Rooms(models, rules()), cuts_of(bins)
    nothing = score(0.0, 0, 0)
    all_of_it = best_packing(rooms, cuts, range(8), nothing, 10_000)
    assert all_of_it.complete
    assert all_of_it.groups is not None
    cut_off = best_packing(rooms, cuts, range(8), nothing, 3)
    assert not cut_off.complete
    best = best_value(models, bins, rules())
    beaten = best_packing(rooms, cuts, range(8), score(best, 0, 0), 10_000)
    assert (beaten.complete, beaten.groups) == (True, None)
    # As much in fewer slots is better.
    fewer = best_packing(rooms, cuts, range(8), score(best, 17, 2), 10_000)
    assert fewer.groups is not None
    monkeypatch.setattr(packer, "BRANCHES_MAX", 3)
    mended = pack(models, bins, rules())
    check(mended, models, bins)
    assert mended.value >= 0.9 * best


def test_the_exact_search_counts_what_can_be_counted_by_hand() -> None:
    # Walled off in hardware seven models fill the seven small instances of one board, no more.
    walled = [need(f"m{i}", 4, 4, tenant=f"t{i}", isolation=Isolation.HARDWARE) for i in range(8)]
    assert best_value(walled, [gpu()], rules()) == 7.0
    assert best_value(walled, [gpu(), gpu(1)], rules()) == 8.0
    assert best_value([replace(e, tenant="x") for e in walled], [gpu()], rules()) == 8.0
    assert best_value([need(weights_gib=200)], [gpu()], rules()) == 0.0
    with pytest.raises(ValueError, match=f"at most {MODELS_MAX}"):
        best_value(walled * 2, [gpu()], rules())


def test_a_larger_node_is_packed_alike_every_time() -> None:
    models = random_models(random.Random(3), 40)
    bins = [gpu(index) for index in range(6)]
    first, second = pack(models, bins, rules()), pack(models, bins, rules())
    assert first == second
    check(first, models, bins)


def test_few_models_take_few_slots_and_leave_the_rest_whole() -> None:
    models = [need("a", 8, 4, isolation=Isolation.HARDWARE), need("b", 40, 8, tenant="x")]
    packing = pack(models, [gpu(), gpu(1)], rules())
    (filled,) = packing.filled
    # The half without a 4g, and the slot that breaks up least of the other half.
    assert [str(place) for place, _ in filled.rooms] == ["1g.18gb@0", "3g.71gb@4"]
    assert packing.left_out == ()


def test_what_is_there_is_used_again_and_foreign_instances_stay() -> None:
    own, foreign = Instance(2, 1, "1g.18gb"), Instance(4, 4, "3g.71gb")
    packing = pack([need(weights_gib=8)], [gpu(own=[own], foreign=[foreign])], rules())
    assert [place for place, _ in packing.filled[0].rooms] == [own]
    crowded = pack([need(weights_gib=60)] * 2, [gpu(foreign=[foreign])], rules())
    assert [str(place) for place, _ in crowded.filled[0].rooms] == ["3g.71gb@0"]
    assert len(crowded.left_out) == 1


def test_a_board_whose_mode_needs_a_reset_keeps_its_mode() -> None:
    models = [need("a", 8, 4), need("b", 8, 4, tenant="y", isolation=Isolation.HARDWARE)]
    uncut = pack(models, [gpu(board="a100-80", mig=False)], rules())
    assert [place for each in uncut.filled for place, _ in each.rooms] == [None]
    assert len(uncut.left_out) == 1
    cut = pack(models, [gpu(board="a100-80")], rules())
    assert len(cut.filled[0].rooms) == 2


def test_the_layout_file_plans_to_exactly_these_places() -> None:
    for seed in range(4):
        chance = random.Random(seed)
        models = random_models(chance, 12)
        bins = random_node(chance, 3)
        packing = pack(models, bins, rules())
        states = [each.state for each in bins]
        planned = plan_file(layout_text(packing, models, rules()), "x", states, Costs())
        names = {name for each in packing.filled for name, _, _ in partitions(each)}
        assert {name for each in planned.gpus for name in (*each.keep, *each.create)} == names
    assert layout_text(pack([need(weights_gib=900)], [gpu()], rules()), [need()], rules()) == ""


def test_shares_are_written_with_their_limits_and_owners() -> None:
    models = [need(n, 4, 2, tenant=n) for n in ("x", "y")] + [need("z", 30, 2, tenant="x")]
    text = layout_text(pack(models, [gpu(mig=False, board="a30")], rules()), models, rules())
    assert "{memory: 9GiB, threads: 60, owner: x}" in text
    assert "{memory: 9GiB, threads: 60, owner: y}" in text


# Why something was left out.


def left_out(models: list[ModelNeed], bins: list[Bin]) -> tuple[str, str]:
    packing = pack(models, bins, rules())
    (found,) = explain(models, bins, rules(), packing)
    return found.reason, found.remedy


def test_what_no_room_holds_says_how_much_less_it_would_have_to_be() -> None:
    reason, remedy = left_out([need(weights_gib=120, kv_gib=30)], [gpu()])
    assert "needs 153GiB with its worker's context" in reason
    assert "has 143104MiB" in reason
    lower = 153 * 1024 - 143104
    assert remedy == f"lower its KV by {lower}MiB: then it fits on gpu0"
    reason, remedy = left_out([need(weights_gib=200)], [gpu()])
    assert "needs 207GiB" in reason
    assert remedy == "smaller weights or a larger GPU: no other figure of it is enough"


def test_what_is_too_slow_says_what_time_would_do() -> None:
    slow = need(alone_ms=30, ms_per_token=20)
    reason, remedy = left_out([slow], [gpu()])
    assert "wants a token in 20 ms, and even by itself it may take 30.0 ms here" in reason
    assert remedy == "let a token take 30.1 ms instead of 20: then it fits on gpu0"
    busy = need(alone_ms=20, tokens_per_s=120, requests=2)
    reason, remedy = left_out([busy], [gpu()])
    assert "120 tokens/s, and 2 requests at once give at most 100 here" in reason
    assert remedy.startswith("ask for 100 tokens/s instead of 120")
    reason, remedy = left_out([need(ms_per_token=20)], [gpu()])
    assert "nothing tells how long its tokens take" in reason
    assert "alone_ms" in remedy


def test_what_lost_to_others_says_so_and_a_weaker_wall_may_help() -> None:
    models = [need("big", 120, 4, tenant="x", value=9.0)]
    models.append(need("small", 4, 2, tenant="y", isolation=Isolation.HARDWARE))
    reason, remedy = left_out(models, [gpu()])
    assert "not beside the models that were worth more" in reason
    assert remedy.startswith("ask for isolation: process instead of hardware: then it fits on gpu0")


def test_what_no_change_of_its_own_lets_in_says_whose_place_it_could_have() -> None:
    models = [need("a", 80, 4, tenant="x", value=9.0), need("b", 80, 4, tenant="y", value=2.0)]
    _, remedy = left_out(models, [gpu()])
    assert remedy == ("another GPU, or a value above 9: then it is worth the place of a on gpu0")
    swapped = [models[0], replace(models[1], value=9.5)]
    assert pack(swapped, [gpu()], rules()).left_out == (0,)


def test_of_two_remedies_the_nearer_is_told() -> None:
    bins = [gpu(mig=False), gpu(1, "a30", mig=False)]
    beside = need("big", 70, 4, tenant="x", value=9.0)
    walled = need("walled", 10, 40, tenant="y", isolation=Isolation.HARDWARE)
    # 30 of its 50 GiB to fit on the small board, or a weaker wall to fit beside the big one.
    assert "isolation: process" in left_out([beside, walled], bins)[1]
    smaller = replace(walled, weights_bytes=14 * GIB, kv_bytes=6 * GIB)
    _, remedy = left_out([beside, smaller], bins)
    assert remedy.startswith("lower its KV by")
    assert remedy.endswith("on gpu1")


def test_every_remedy_of_random_nodes_is_true() -> None:
    tried = 0
    for seed in range(8):
        chance = random.Random(100 + seed)
        models = random_models(chance, 16)
        bins = random_node(chance, 1)
        packing = pack(models, bins, rules())
        for each in explain(models, bins, rules(), packing):
            changed = _obey(models[each.model], each.remedy)
            if changed is None:
                continue
            tried += 1
            where = each.remedy.rpartition(" fits on ")[2]
            after = [*models[: each.model], changed, *models[each.model + 1 :]]
            assert _fits_there(after, each.model, where, packing, bins), each.remedy
    assert tried > 10


def _obey(model: ModelNeed, remedy: str) -> ModelNeed | None:
    """The model with the figures changed that a remedy names."""
    changed = model
    for part in remedy.partition(": then it")[0].split(" and "):
        words = part.split()
        if part.startswith("lower its KV by"):
            size = words[-1]
            unit = GIB if size.endswith("GiB") else 1 << 20
            changed = replace(changed, kv_bytes=changed.kv_bytes - int(size[:-3]) * unit)
        elif part.startswith("let a token take"):
            changed = replace(changed, ms_per_token=float(words[4]))
        elif part.startswith("ask for isolation"):
            changed = replace(changed, isolation=Isolation.PROCESS)
        elif part.startswith("ask for"):
            changed = replace(changed, tokens_per_s=float(words[2]))
    return changed if changed != model else None


def _fits_there(
    models: list[ModelNeed], index: int, where: str, packing: Packing, bins: list[Bin]
) -> bool:
    """Whether the room that a remedy names takes the changed model in beside who is there."""
    rooms = Rooms(models, rules())
    if where.startswith("a new "):
        profile, _, gpu_name = where.removeprefix("a new ").partition(" on ")
        chosen = next(each for each in bins if f"gpu{each.state.index}" == gpu_name)
        return rooms.fits(frozenset((index,)), instance_rooms(chosen)[profile]) is not None
    for each in packing.filled:
        for place, arrangement in each.rooms:
            if each.bin.state.partition_id(place) == where:
                room = whole_room(each.bin)
                if place is not None:
                    room = instance_rooms(each.bin)[place.profile]
                return rooms.fits(frozenset((*arrangement.models, index)), room) is not None
    return rooms.fits(frozenset((index,)), whole_room(bins[0])) is not None
