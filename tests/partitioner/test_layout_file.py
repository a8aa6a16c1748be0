"""Layout files: what they mean on boards that are there, and how bad ones are refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from partitioner.catalogue import load_catalogue
from partitioner.errors import DocumentError
from partitioner.geometry import Geometry, Instance, geometry_of
from partitioner.layout import Costs, GpuState, Share
from partitioner.layout_file import CONTEXT_BYTES, export_layout, parse_size
from partitioner.layout_resolve import plan_file

GIB = 1 << 30
BOARDS = ("h200", "h200", "a100-80", "a30")


def node(*boards: str) -> list[GpuState]:
    """GPUs in MIG mode without instances."""
    catalogue = load_catalogue()
    return [
        GpuState(
            uuid=f"GPU-{index}",
            index=index,
            product=catalogue.board(name).product,
            pci_id=f"00000000:{index + 1:x}0:00.0",
            geometry=geometry_of(catalogue.board(name)),
            memory_bytes=catalogue.board(name).memory_mib << 20,
            mig_enabled=True,
        )
        for index, name in enumerate(boards or BOARDS)
    ]


def created(text: str, states: list[GpuState] | None = None) -> list[tuple[str, ...]]:
    planned = plan_file(text, "node.yaml", states or node(), Costs())
    return [gpu.create for gpu in planned.gpus]


def refused(text: str, states: list[GpuState] | None = None) -> tuple[int, str]:
    with pytest.raises(DocumentError) as caught:
        plan_file(text, "node.yaml", states or node(), Costs())
    assert str(caught.value).startswith(f"node.yaml, line {caught.value.line}: ")
    return caught.value.line, caught.value.problem


def one_gpu(*lines: str) -> str:
    return "\n".join(["version: 1", "gpus:", "- index: 0", *(f"  {line}" for line in lines)])


def test_profiles_needs_and_shares() -> None:
    text = one_gpu(
        "partitions:",
        "- {profile: 3g.71gb, start: 4, owner: a}",
        "- memory: 30GiB",
        "  sm: 30",
        "  shares:",
        "  - {memory: 12GiB, threads: 50, owner: b}",
        "  - {owner: c, isolation: none}",
    )
    assert created(text) == [
        ("gpu0/2g.35gb@0/mps0", "gpu0/2g.35gb@0/mps1", "gpu0/3g.71gb@4"),
    ]


def test_a_need_is_met_by_what_is_there_before_anything_new() -> None:
    (state,) = node("h200")
    there = Instance(0, 4, "4g.71gb")
    states = [replace(state, instances=(there,))]
    planned = plan_file(one_gpu("partitions:", "- memory: 30GiB"), "f", states, Costs())
    assert (planned.changes, planned.gpus[0].keep) == (False, ("gpu0/4g.71gb@0",))


def test_memory_is_compared_with_what_the_driver_tells_not_with_the_name() -> None:
    """1g.18gb of an H200 has 16 GiB: 17 GiB need the next larger one."""
    assert created(one_gpu("partitions:", "- memory: 16GiB")) == [("gpu0/1g.18gb@6",)]
    assert created(one_gpu("partitions:", "- memory: 17GiB"))[0][0].startswith("gpu0/1g.35gb@")


@pytest.mark.parametrize(
    ("selector", "indices"),
    [
        ("product: NVIDIA H200", [0, 1]),
        ("product: nvidia h200", [0, 1]),
        ("uuid: GPU-3", [3]),
        ("pci: '0000:30:00.0'", [2]),
        ("pci: '00000000:30:00.0'", [2]),
        ("pci: '30:00.0'", [2]),
        ("{product: NVIDIA H200, index: 1}", [1]),
    ],
)
def test_config_spec_matches_device_filter(selector: str, indices: list[int]) -> None:
    """mig-parted: TestMigConfigSpecMatchesDeviceFilter."""
    entry = selector if selector.startswith("{") else f"{{{selector}}}"
    text = f"version: 1\ngpus:\n- {entry}\n"
    planned = plan_file(text, "node.yaml", node(), Costs())
    assert [gpu.index for gpu in planned.gpus] == indices


@pytest.mark.parametrize("selector", ["pci: '0000:77:00.0'", "product: NVIDIA B200", "index: 9"])
def test_config_spec_matches_device_filter_malformed(selector: str) -> None:
    """mig-parted: TestMigConfigSpecMatchesDeviceFilter, filters that match nothing."""
    line, problem = refused(f"version: 1\ngpus:\n- {{{selector}}}\n")
    assert line == 3
    assert "no GPU of this node has" in problem
    assert "gpu0 NVIDIA H200 (00000000:10:00.0, GPU-0)" in problem


def test_set_mig_config_resolves_mig_profile_on_target_gpu() -> None:
    """mig-parted: TestSetMigConfigResolvesMigProfileOnTargetGPU; one name, two meanings."""
    states = node("a100-40", "a100-80")
    text = (
        "version: 1\ngpus:\n- {index: 0, partitions: [{profile: 1g.10gb}]}\n"
        "- {index: 1, partitions: [{profile: 1g.10gb}]}\n"
    )
    planned = plan_file(text, "node.yaml", states, Costs())
    assert [gpu.chosen[0].size for gpu in planned.gpus] == [2, 1]


@pytest.mark.parametrize("board", ["a30", "a100-40", "a100-80", "h200"])
def test_get_set_mig_config_and_clear(board: str) -> None:
    """mig-parted: TestGetSetMigConfig, TestClearMigConfig; each profile as often as it may be."""
    (state,) = node(board)
    for profile in state.geometry.plain:
        entries = ", ".join([f"{{profile: {profile.name}}}"] * profile.max_instances)
        text = f"version: 1\nfound: adopt\ngpus:\n- {{index: 0, partitions: [{entries}]}}\n"
        (gpu,) = plan_file(text, "node.yaml", [state], Costs()).gpus
        there = [replace(state, instances=tuple(sorted(gpu.chosen)))]
        assert not plan_file(text, "node.yaml", there, Costs()).changes
        assert not plan_file(export_layout(there), "export", there, Costs()).changes
        clear = "version: 1\nfound: adopt\ngpus:\n- {index: 0, partitions: []}\n"
        (cleared,) = plan_file(clear, "node.yaml", there, Costs()).gpus
        assert cleared.destroyed_instances == tuple(sorted(gpu.chosen))


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        (["partition: []"], 4, ["unknown key 'partition'", "did you mean 'partitions'"]),
        (["partitions:", "- {profile: 3g.40gb}"], 5, ["no profile '3g.40gb'", "3g.71gb"]),
        (["partitions:", "- {profile: 3g.71gb, start: 2}"], 5, ["start at slot 2", "0, 4"]),
        (
            ["partitions:", "- {profile: 3g.71gb, start: 4}", "- {profile: 2g.35gb, start: 4}"],
            6,
            ["2g.35gb@4 overlaps 3g.71gb@4 of line 5"],
        ),
        (
            ["partitions:", *["- {profile: 3g.71gb}"] * 3],
            3,
            ["do not fit together", "nearest layout that would fit is: 3g.71gb@0, 3g.71gb@4"],
        ),
        (["partitions:", "- {memory: 900GiB}"], 5, ["no instance of gpu0", "7g.141gb, has"]),
        (["partitions:", "- {memory: 30GB}"], 5, ["is not a size", "30GiB"]),
        (["partitions:", "- {profile: 3g.71gb, sm: 4}"], 5, ["either profile, or the need"]),
        (["partitions:", "- {start: 4, sm: 4}"], 5, ["start goes with profile"]),
        (["partitions:", "- {sm: 4, isolation: none}"], 5, ["write it under `shares`"]),
        (["shares:", "- {threads: 0}"], 5, ["greater than or equal to 1"]),
        (["shares:", "- {threads: 300}"], 5, ["less than or equal to 100"]),
        (["shares:", "- {memory: 100MiB}"], 5, ["below what one CUDA context takes", "512MiB"]),
        (["shares:", "- {threads: 50, isolation: none}"], 5, ["keeps no limits"]),
        (["shares:", "- {isolation: hardware}"], 5, ["walls between processes only"]),
        (["shares:", "- {owner: Team A}"], 5, ["owner"]),
        (["shares:", *["- {memory: 80GiB}"] * 2], 6, ["promise 160GiB", "lower their memory"]),
        (["partitions: []", "shares: [{threads: 9}]"], 3, ["partitions or shares"]),
        (["isolation: process"], 3, ["is for shares"]),
        (["partitions: []", "- index: 0"], 0, []),
    ],
)
def test_bad_files_name_line_reason_and_cure(lines: list[str], line: int, words: list[str]) -> None:
    """Also mig-parted's TestValidConfiguration: nothing of a bad file is planned."""
    text = one_gpu(*lines)
    if not words:  # Two entries for one GPU.
        text = "version: 1\ngpus:\n- index: 0\n- product: NVIDIA H200\n"
        line, words = 4, ["chooses gpu0, which line 3 has chosen already"]
    found, problem = refused(text)
    assert found == line, problem
    for each in words:
        assert each in problem


def test_shares_may_not_promise_more_than_their_instance() -> None:
    shares = "[{memory: 12GiB}, {memory: 12GiB}]"
    line, problem = refused(one_gpu("partitions:", "- profile: 1g.18gb", f"  shares: {shares}"))
    assert line == 6
    assert "promise 24GiB, 1g.18gb has 16GiB; lower their memory by 8GiB in all" in problem


def test_a_gpu_without_mig_has_no_partitions_but_may_have_shares() -> None:
    (state,) = node("h200")
    plain = replace(state, geometry=Geometry(()), mig_enabled=False)
    line, problem = refused(one_gpu("partitions: []"), [plain])
    assert (line, "it has no MIG" in problem) == (4, True)
    assert created(one_gpu("shares: [{threads: 50}]"), [plain]) == [("gpu0/mps0",)]
    assert created(one_gpu("owner: a"), [plain]) == [()]


def test_found_instances_are_left_alone_unless_adopted() -> None:
    (state,) = node("h200")
    there = Instance(4, 4, "3g.71gb")
    states = [replace(state, instances=(there,), foreign=frozenset([there]))]
    wish = ("partitions:", "- {profile: 3g.71gb, start: 4}")
    line, problem = refused(one_gpu(*wish), states)
    assert line == 5
    assert "overlaps gpu0/3g.71gb@4, which is there and not ours" in problem
    adopted = one_gpu(*wish).replace("version: 1", "version: 1\nfound: adopt")
    assert not plan_file(adopted, "f", states, Costs()).changes
    (gpu,) = plan_file(one_gpu("partitions: [{profile: 3g.71gb}]"), "f", states, Costs()).gpus
    assert (gpu.foreign, gpu.create) == (("gpu0/3g.71gb@4",), ("gpu0/3g.71gb@0",))


def test_an_export_of_shares_plans_to_nothing() -> None:
    states = node("h200", "a30")
    there = Instance(4, 4, "3g.71gb")
    shares = (Share(CONTEXT_BYTES, 25, "a"), Share(3 * GIB // 2, None, ""), Share())
    states[0] = replace(states[0], instances=(there,), shares={there: shares})
    states[1] = replace(states[1], mig_enabled=False, shares={None: shares})
    text = export_layout(states)
    assert not plan_file(text, "export", states, Costs()).changes
    assert "1536MiB" in text


def whole(board: str = "h200", sm_count: int = 132, chunk: int = 8) -> list[GpuState]:
    (state,) = node(board)
    return [replace(state, mig_enabled=False, sm_count=sm_count, sm_chunk=chunk)]


def test_shares_with_multiprocessors_to_themselves() -> None:
    wish = one_gpu("shares:", "- {memory: 60GiB, sm: 96, owner: a}", "- {memory: 60GiB, sm: 32}")
    (planned,) = plan_file(wish, "f", whole(), Costs()).gpus
    shares = planned.shares[None]
    assert [(each.sm_count, each.thread_percent) for each in shares] == [(96, None), (32, None)]
    there = [replace(whole()[0], shares={None: shares})]
    text = export_layout(there)
    assert "sm: 96, " in text or "sm: 96}" in text
    assert not plan_file(text, "export", there, Costs()).changes


@pytest.mark.parametrize(
    ("shares", "line", "problem"),
    [
        (["{sm: 60}"], 5, "8 at a time, so 60 does not come out even: write 56 or 64"),
        (["{sm: 4}"], 5, "write 8"),
        (["{sm: 131}"], 5, "write 128"),
        (["{sm: 200}"], 5, "has 128 in whole chunks of 8; lower their sm by 72"),
        (["{sm: 96}", "{sm: 40}"], 6, "136 multiprocessors.*lower their sm by 8"),
        (["{sm: 96}", "{threads: 10}"], 6, "give this one `sm` too, or write `threads`"),
        (["{}", "{sm: 96}"], 5, "give this one `sm` too"),
        (["{sm: 8, threads: 10}"], 5, "take one of the two away"),
        (["{sm: 8, isolation: none}"], 5, "take memory, threads and sm away"),
        (["{sm: 0}"], 5, "greater than or equal to 1"),
    ],
)
def test_what_multiprocessors_cannot_be_given(shares: list[str], line: int, problem: str) -> None:
    text = one_gpu("shares:", *(f"- {each}" for each in shares))
    found, said = refused(text, whole())
    assert found == line, said
    assert re.search(problem, said), said


def test_where_no_multiprocessors_are_given() -> None:
    line, said = refused(one_gpu("shares:", "- {sm: 8}"), whole(chunk=0))
    assert (line, "Ampere" in said) == (5, True)
    line, said = refused(one_gpu("shares:", "- {sm: 8}"), whole(sm_count=0))
    assert line == 5
    text = one_gpu("partitions:", "- profile: 3g.71gb", "  shares:", "  - {sm: 8}")
    line, said = refused(text)
    assert line == 7
    assert "only shares of a whole GPU" in said


def test_sizes() -> None:
    assert parse_size("1.5GiB") == 3 * GIB // 2
    for bad in ("0GiB", "-1GiB", "1", "1TB", "GiB"):
        with pytest.raises(ValueError, match="size"):
            parse_size(bad)


def test_fetch_restore() -> None:
    """mig-parted: TestFetchRestore; an export taken before a wipe brings the same places back."""
    (state,) = node("h200")
    places = {(4, "3g.71gb"), (0, "2g.35gb"), (3, "1g.18gb")}
    there = tuple(
        sorted(each for each in state.geometry.placements if (each.start, each.profile) in places)
    )
    assert len(there) == 3
    text = export_layout([replace(state, instances=there)])
    (gpu,) = plan_file(text, "export", [state], Costs()).gpus
    assert (gpu.created_instances, gpu.destroyed_instances) == (there, ())
    whole = replace(state, mig_enabled=False)
    (gpu,) = plan_file(text, "export", [whole], Costs()).gpus
    assert (gpu.created_instances, gpu.mig_change) == (there, "enable")
