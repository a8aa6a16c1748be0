"""plan place and part defrag as people and programs read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hotbay.v1 import partition_pb2, placement_pb2

from tests.gpuctl.conftest import Run
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import GIB

LAYOUT = "version: 1\ngpus:\n- {uuid: GPU-0}\n"
PLACED = placement_pb2.PlacementPlan(
    placed=[
        placement_pb2.ModelPlace(
            model="chat", tenant="team-a", partition="gpu0/1g.18gb@6", memory_bytes=12 * GIB,
            partition_bytes=15 * GIB, predicted_ms_per_token=33.04, ms_per_token=40,
        ),
        placement_pb2.ModelPlace(
            model="code", partition="gpu1", memory_bytes=8 * GIB, beside=["small", "tiny"]
        ),
    ],
    left_out=[
        placement_pb2.ModelLeftOut(
            model="huge", reason="needs 163GiB", remedy="lower its KV by 24GiB", line=7
        )
    ],
    layout=LAYOUT, value=6, value_asked=8,
    gpus=[placement_pb2.GpuFill(index=0, used_bytes=15 * GIB, memory_bytes=140 * GIB,
                                fragmentation_before=0.15, fragmentation_after=0.08)],
)  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models.yaml"
    path.write_text("version: 1\n")
    return str(path)


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_place_shows_every_place_and_every_reason(
    node: ScriptedNode, gpuctl: Run, models: str
) -> None:
    node.placement = PLACED
    done = gpuctl("plan", "place", "-f", models)
    assert (done.code, done.err) == (1, ""), "one model has no place"
    assert lines(done.out) == [
        "MODEL TENANT PARTITION MEMORY MS/TOKEN ASKED BESIDE",
        "chat team-a gpu0/1g.18gb@6 12.0 GiB 33.0 40 -",
        "code - gpu1 8.00 GiB - - small, tiny",
        "",
        "huge (line 7) has no place: needs 163GiB",
        "lower its KV by 24GiB",
        "",
        "gpu0: 15.0 GiB of 140 GiB promised, fragmentation 15% now, 8% then",
        "2 of 3 models have a place, 75% of the value",
        "then: gpuctl part apply -f FILE; --layout FILE writes the layout",
    ]
    request = node.last(placement_pb2.PlanPlacementRequest)
    assert (request.models, request.source) == ("version: 1\n", models)


def test_place_writes_the_layout_and_answers_programs(
    node: ScriptedNode, gpuctl: Run, models: str, tmp_path: Path
) -> None:
    node.placement = PLACED
    target = tmp_path / "layout.yaml"
    done = gpuctl("plan", "place", "-f", models, "--layout", str(target), "-o", "json")
    assert target.read_text() == LAYOUT
    assert json.loads(done.out)["leftOut"][0]["line"] == 7
    assert gpuctl("plan", "place", "-f", models, "--layout", "-").out == LAYOUT
    bad = gpuctl("plan", "place", "-f", models, "--layout", str(tmp_path / "no" / "such"))
    assert (bad.code, "cannot write" in bad.err) == (2, True)


def test_place_with_all_placed_exits_0_and_with_none_writes_nothing(
    node: ScriptedNode, gpuctl: Run, models: str, tmp_path: Path
) -> None:
    node.placement = placement_pb2.PlacementPlan(placed=PLACED.placed, layout=LAYOUT)
    assert gpuctl("plan", "place", "-f", models).code == 0
    node.placement = placement_pb2.PlacementPlan(left_out=PLACED.left_out)
    target = tmp_path / "layout.yaml"
    done = gpuctl("plan", "place", "-f", models, "--layout", str(target))
    assert (done.code, "no model has a place" in done.err) == (1, True)
    assert not target.exists()
    assert gpuctl("plan", "place", "-f", str(target)).code == 2


def test_defrag_shows_gain_and_cost_and_the_plan_to_apply(node: ScriptedNode, gpuctl: Run) -> None:
    assert gpuctl("part", "defrag").out == "no GPU can be less fragmented than it is\n"
    one = placement_pb2.GpuDefragmentation(
        index=0, worth_it=True, move=["gpu0/1g.18gb@0"], fragmentation_before=0.4,
        fragmentation_after=0.2, gained_bytes=28 * GIB, gain_ms=28000, cost_ms=1500,
    )  # fmt: skip
    plan = partition_pb2.LayoutPlan(
        plan_id="plan-7", changes=True, destroy=["gpu0/1g.18gb@0"], create=["gpu0/1g.18gb@6"]
    )
    node.defragmentation = placement_pb2.DefragmentationPlan(
        gpus=[one], plan=plan, worth_ms_per_gib=1000
    )
    done = gpuctl("part", "defrag", "--worth", "2.5")
    shown = lines(done.out)
    assert shown[:3] == [
        "GPU FRAGMENTATION GAINS MODELS AWAY WORTH IT MOVES",
        "gpu0 40% to 20% 28.0 GiB 1.5 s yes gpu0/1g.18gb@0",
        "a GiB that becomes of use is worth 1 s of one model's absence",
    ]
    assert shown[-1] == "then: gpuctl part apply plan-7"
    assert node.last(placement_pb2.PlanDefragmentationRequest).worth_ms_per_gib == 2500
    plan.changes = False
    node.defragmentation = placement_pb2.DefragmentationPlan(gpus=[one], plan=plan)
    assert "nothing is worth moving" in gpuctl("part", "defrag").out
    answer = json.loads(gpuctl("part", "defrag", "-o", "json").out)
    assert answer["gpus"][0]["gainedBytes"] == str(28 * GIB)
    assert gpuctl("part", "defrag", "--worth", "-1").code == 2
