"""Every board that ships, held to the published counts and driven through the real pynvml.

Layouts are counted twice: by the enumeration that plans rest on, and slot by slot with a running
tally, which never builds a layout. Names in brackets are those of the cases of NVIDIA's mig-parted
that a test answers in this project's way.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from partitioner.catalogue import load_catalogue
from partitioner.geometry import Geometry, Instance, geometry_of, legal_layouts, maximal_layouts
from partitioner.layout import Costs, GpuState, GpuWanted, Wanted
from partitioner.layout_resolve import plan_file
from partitioner.nvml import PynvmlReader
from partitioner.planner import plan
from partitioner.simulated.install import installed
from partitioner.simulated.node import SimulatedNode
from partitioner.simulation import GpuSpec, NodeSpec, parse_simulate

CATALOGUE = load_catalogue()
BOARDS = sorted(CATALOGUE.boards)
# GiB and multiprocessors of the smallest, of three slices (or half the board) and of the largest
# profile, as listings show them.
LISTED: dict[str, tuple[tuple[float, int], tuple[float, int], tuple[float, int]]] = {
    "a30": ((5.7, 14), (11.4, 28), (22.8, 56)),
    "a100-40": ((4.75, 14), (19.5, 42), (39.25, 98)),
    "a100-80": ((9.5, 14), (39.25, 42), (78.75, 98)),
    "h100-80": ((9.75, 16), (39.5, 60), (79.25, 132)),
    "h100-94": ((10.75, 16), (46.38, 60), (93.12, 132)),
    "gh200": ((11.0, 16), (46.5, 60), (93.0, 132)),
    "h200": ((16.0, 16), (69.5, 60), (139.75, 132)),
    "b200": ((22.0, 18), (88.5, 70), (177.0, 148)),
    "rtx-pro-6000": ((23.12, 46), (46.25, 94), (95.12, 188)),
}


def geometry(key: str) -> Geometry:
    """The board's plain profiles."""
    return Geometry(geometry_of(CATALOGUE.board(key)).plain)


def classic(key: str) -> Geometry:
    """Without the one-slice profile of double memory, which quoted counts leave out."""
    profiles = geometry(key).profiles
    one = min(each.slots for each in profiles if each.compute_slices == 1)
    return Geometry(tuple(e for e in profiles if e.compute_slices > 1 or e.slots == one))


def tally(board: Geometry) -> tuple[int, int]:
    """Layouts with instances, and full ones among them, counted slot by slot.

    A layout is full when no profile that still may exist once more has a start whose slots are
    free; so the tally carries which slots are free, and looks at them once, at the end.
    """
    profiles = board.profiles

    @functools.cache
    def count(slot: int, free: int, slices: int, counts: tuple[int, ...]) -> tuple[int, int]:
        if slot >= board.memory_slots:
            more = any(
                profile.compute_slices <= slices
                and counts[index] < profile.max_instances
                and any(place.mask & ~free == 0 for place in profile.placements)
                for index, profile in enumerate(profiles)
            )
            return 1, int(not more)
        every, full = count(slot + 1, free | 1 << slot, slices, counts)
        for index, profile in enumerate(profiles):
            starts = [place.start for place in profile.placements]
            if slot not in starts or profile.compute_slices > slices:
                continue
            if counts[index] == profile.max_instances:
                continue
            with_one = (*counts[:index], counts[index] + 1, *counts[index + 1 :])
            rest = count(slot + profile.slots, free, slices - profile.compute_slices, with_one)
            every, full = every + rest[0], full + rest[1]
        return every, full

    every, full = count(0, 0, board.compute_slices, (0,) * len(profiles))
    return every - 1, full


def test_every_board_that_is_promised_can_be_simulated() -> None:
    assert set(LISTED) == set(BOARDS)
    for name in [*CATALOGUE.names(), "A100", "GH200", "RTX-PRO-6000"]:
        assert len(parse_simulate(f"{name}x2").gpus) == 2


@pytest.mark.parametrize("key", BOARDS)
def test_layouts_are_as_many_as_are_known_counted_in_two_ways(key: str) -> None:
    small = CATALOGUE.board(key).compute_slices == 4
    wanted = {False: ((297, 19, 14), (722, 78, 38)), True: ((25, 5, 4), (25, 5, 4))}[small]
    for board, (legal, full, kinds) in zip((classic(key), geometry(key)), wanted, strict=True):
        layouts = [each for each in legal_layouts(board) if each]
        largest = list(maximal_layouts(board))
        assert (len(layouts), len(largest)) == tally(board) == (legal, full)
        assert len({_kinds(each) for each in largest}) == kinds


@pytest.mark.parametrize("key", BOARDS)
def test_memory_and_multiprocessors_are_those_of_the_listings(key: str) -> None:
    board = CATALOGUE.board(key)
    plain = {each.compute_slices: each for each in classic(key).profiles}
    rows = [plain[1], plain.get(3) or plain[2], plain[board.compute_slices]]
    for profile, (memory_gib, multiprocessors) in zip(rows, LISTED[key], strict=True):
        assert profile.sm_count == multiprocessors
        # Listings round to 1/8 GiB, and print two digits of it.
        assert profile.memory_bytes / (1 << 30) == pytest.approx(memory_gib, abs=0.007)
    for profile in board.profiles:
        grid = board.memory_mib / board.memory_slots * profile.slots
        assert profile.memory_mib <= grid + 1, profile.name


def test_slots_need_be_neither_eight_nor_powers_of_two() -> None:
    board = CATALOGUE.board("rtx-pro-6000")
    assert board.memory_slots == 12
    assert {each.slots for each in board.profiles} == {3, 6, 12}
    assert [each.name for each in geometry("rtx-pro-6000").profiles] == [
        *("1g.24gb", "2g.48gb", "4g.96gb"),
    ]


def test_what_no_listing_shows_is_not_said_to_be_sure() -> None:
    sure = {
        (key, profile.name): profile.confidence
        for key, board in CATALOGUE.boards.items()
        for profile in board.profiles
    }
    assert sure["b200", "2g.45gb"] == sure["gh200", "7g.96gb"] == "high"
    guessed = ("3g.90gb", "4g.90gb", "7g.180gb")
    assert {sure["b200", name] for name in guessed} == {"low"}
    assert sure["rtx-pro-6000", "2g.48gb"] == "low"
    # Never more than the rows that were seen add up to.
    b200 = geometry("b200").by_name
    assert b200["7g.180gb"].memory_bytes <= 4 * b200["2g.45gb"].memory_bytes


# mig-parted's cases, on every board.


def _kinds(layout: tuple[Instance, ...]) -> tuple[str, ...]:
    return tuple(sorted(each.profile for each in layout))


@pytest.fixture(params=BOARDS)
def driver(request: pytest.FixtureRequest) -> Iterator[PynvmlReader]:
    """A board in MIG mode, read and changed through pynvml."""
    spec = GpuSpec(request.param, CATALOGUE.board(request.param), mig_enabled=True)
    with installed(SimulatedNode(NodeSpec((spec,)))):
        reader = PynvmlReader()
        yield reader
        reader.close()


def test_every_known_config_is_set_read_back_and_cleared(driver: PynvmlReader) -> None:
    """(TestGetSetMigConfig, TestClearMigConfig) each full set of profiles, by name only."""
    (gpu,) = driver.discover()
    board = driver.geometry(gpu.uuid, gpu.generation)
    plain = Geometry(board.plain)
    for kinds in sorted({_kinds(each) for each in maximal_layouts(plain)}):
        state = _state(board)
        wish = tuple(Wanted(board.by_name[name].placements, name) for name in kinds)
        chosen = plan([state], [GpuWanted("GPU-0", wish)], Costs()).gpus[0].created_instances
        assert _kinds(chosen) == kinds
        for place in chosen:
            driver.create_instance(gpu.uuid, driver.reread(gpu.uuid).generation, place)
        there = driver.reread(gpu.uuid).instances or ()
        assert tuple(sorted(each.place for each in there)) == chosen
        for each in there:
            now = driver.reread(gpu.uuid).generation
            driver.destroy_instance(gpu.uuid, now, each.number, each.place)
        assert driver.reread(gpu.uuid).instances == ()


def _state(board: Geometry, index: int = 0, product: str = "") -> GpuState:
    return GpuState(f"GPU-{index}", index, product, "", board, 1, mig_enabled=True)


@pytest.mark.parametrize(
    "key", [key for key in BOARDS if not CATALOGUE.board(key).mig_toggle_needs_reset]
)
def test_mig_mode_is_enabled_and_disabled(key: str) -> None:
    """(TestNvmlEnableDisableMig) mode and pending mode, on the boards that need no reset for it."""
    with installed(SimulatedNode(NodeSpec((GpuSpec(key, CATALOGUE.board(key)),)))):
        reader = PynvmlReader()
        (gpu,) = reader.discover()
        for enabled in (True, False):
            reader.set_mig_mode(gpu.uuid, reader.reread(gpu.uuid).generation, enabled)
            after = reader.reread(gpu.uuid)
            assert (after.mig_enabled, after.mig_pending) == (enabled, enabled)
        reader.close()


@pytest.mark.parametrize("key", ["a100-80", "rtx-pro-6000"])
def test_no_order_of_the_wishes_is_better_than_another(key: str) -> None:
    """(TestIteratePermutationsUntilSuccess) orders are not tried: the places are searched."""
    board = geometry(key)
    for kinds in sorted({_kinds(each) for each in maximal_layouts(board)})[::7]:
        found = set()
        for order in set(itertools.permutations(kinds)):
            wish = tuple(Wanted(board.by_name[name].placements, name) for name in order)
            found.add(plan([_state(board)], [GpuWanted("GPU-0", wish)], Costs()).gpus[0].chosen)
        assert len({tuple(sorted(each)) for each in found}) == 1


@pytest.mark.parametrize("key", BOARDS)
def test_all_of_one_profile_and_a_balanced_mix_fit(key: str) -> None:
    """(TestBuildMigConfigSpec, TestBuildAllBalancedConfig) as many as may be, and a mix."""
    board = geometry_of(CATALOGUE.board(key))
    by_slices = {each.compute_slices: each.name for each in reversed(classic(key).profiles)}
    mixes = [Counter({each.name: each.max_instances}) for each in board.profiles]
    if board.compute_slices == 7:
        mixes.append(Counter({by_slices[1]: 2, by_slices[2]: 1, by_slices[3]: 1}))
    else:
        mixes.append(Counter({by_slices[1]: 2, by_slices[2]: 1}))
    for mix in mixes:
        rows = "".join(f"      - {{profile: {name}}}\n" for name in mix.elements())
        text = f"version: 1\ngpus:\n  - index: 0\n    partitions:\n{rows}"
        planned = plan_file(text, "all.yaml", [_state(board)], Costs())
        assert Counter(each.profile for each in planned.gpus[0].chosen) == mix


def test_one_file_cuts_a_mixed_node() -> None:
    """(TestBuildMigConfigSpec on mixed boards, TestMergeConfigSpecs) an entry for each product."""
    states = [
        _state(geometry_of(CATALOGUE.board(key)), index, CATALOGUE.board(key).product)
        for index, key in enumerate(("a100-80", "a30", "rtx-pro-6000"))
    ]
    rows = zip(states, ("3g.40gb", "2g.12gb", "1g.24gb-me"), strict=True)
    text = "version: 1\ngpus:\n" + "".join(
        f"  - {{product: {state.product}, partitions: [{{profile: {name}}}]}}\n"
        for state, name in rows
    )
    planned = plan_file(text, "mixed.yaml", states, Costs())
    assert [each.create for each in planned.gpus] == [
        ("gpu0/3g.40gb@4",),
        ("gpu1/2g.12gb@0",),
        ("gpu2/1g.24gb-me@0",),
    ]
