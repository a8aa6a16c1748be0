"""part: listings, plans and differences as people and programs read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf.json_format import Parse
from hotbay.reasons import Reason
from hotbay.v1 import node_pb2, partition_pb2

from tests.gpuctl.conftest import Run
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import GIB, Refusal

PLAN = partition_pb2.LayoutPlan(
    plan_id="plan-1", changes=True, predicted_downtime_ms=1500.0,
    keep=["gpu0/1g.18gb@0"], destroy=["gpu1"], create=["gpu1/3g.71gb@4"], move=["gpu1"],
    foreign=["gpu0/3g.71gb@4"],
    gpus=[
        partition_pb2.GpuLayoutPlan(index=0, keep=["gpu0/1g.18gb@0"], foreign=["gpu0/3g.71gb@4"],
                                    fragmentation_before=0.25, fragmentation_after=0.25),
        partition_pb2.GpuLayoutPlan(index=1, mig_change="enable", reset=True, destroy=["gpu1"],
                                    create=["gpu1/3g.71gb@4"], move=["gpu1"]),
    ],
)  # fmt: skip


@pytest.fixture
def layout(tmp_path: Path) -> str:
    path = tmp_path / "node.yaml"
    path.write_text("version: 1\n")
    return str(path)


def test_plan_lists_every_step_in_order(node: ScriptedNode, gpuctl: Run, layout: str) -> None:
    node.layout_plan = PLAN
    done = gpuctl("part", "plan", "-f", layout)
    assert (done.code, done.err) == (0, "")
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    assert rows == [
        "DO PARTITION MODELS",
        "leave alone gpu0/3g.71gb@4 not ours",
        "keep gpu0/1g.18gb@0 -",
        "destroy gpu1 must move",
        "enable MIG gpu1 resets the GPU",
        "create gpu1/3g.71gb@4 -",
        "",
        "gpu0: fragmentation 25% now, 25% then",
        "gpu1: fragmentation 0% now, 0% then",
        "plan-1: predicted downtime of models: 1.5 s",
    ]
    request = node.last(partition_pb2.PlanLayoutRequest)
    assert (request.layout, request.source) == ("version: 1\n", layout)


def test_diff_exits_1_when_something_would_change(
    node: ScriptedNode, gpuctl: Run, layout: str
) -> None:
    done = gpuctl("part", "diff", "-f", layout)
    assert (done.code, done.out, done.err) == (0, "", "")
    node.layout_plan = PLAN
    done = gpuctl("part", "diff", "-f", "-", stdin="version: 1\n")
    assert done.code == 1
    assert done.out.splitlines() == [
        "~ gpu1 enable MIG mode, with a reset",
        "- gpu1 (models move)",
        "+ gpu1/3g.71gb@4",
    ]
    assert node.last(partition_pb2.PlanLayoutRequest).source == "standard input"
    done = gpuctl("part", "diff", "-f", layout, "-o", "json")
    assert (done.code, Parse(done.out, partition_pb2.LayoutPlan())) == (1, PLAN)


def test_a_refused_file_is_a_usage_error(node: ScriptedNode, gpuctl: Run, layout: str) -> None:
    node.refusals["PlanLayout"] = Refusal(Reason.LAYOUT_INVALID, "node.yaml, line 3: no")
    done = gpuctl("part", "diff", "-f", layout)
    assert done.code == 2
    assert "node.yaml, line 3: no" in done.err
    done = gpuctl("part", "plan", "-f", layout + "x")
    assert (done.code, "cannot read" in done.err) == (2, True)


def test_ls_shows_partitions_and_instances_that_do_not_serve(
    node: ScriptedNode, gpuctl: Run
) -> None:
    node.gpus.gpus[0].instances.append(
        node_pb2.GpuInstance(id="gpu0/3g.71gb@4", memory_bytes=70 * GIB, multiprocessors=60)
    )
    node.gpus.gpus[0].instances_hidden = True
    done = gpuctl("part", "ls")
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    assert rows[1:] == [
        "gpu0 whole 0 2.00 GiB - READY",
        "gpu0/3g.71gb@4 mig 0 70.0 GiB 60 not serving",
        "warning: gpu0: the daemon may not see its instances",
    ]
    assert set(json.loads(gpuctl("part", "ls", "-o", "json").out)) == {"partitions", "gpus"}
    node.gpus.gpus[0].instances[0].id = "gpu"
    assert "not serving" in gpuctl("part", "ls").out, "gpu0 is not a share of gpu"
    node.gpus.gpus[0].instances[0].id = "gpu0/3g.71gb@4"
    node.partitions[0].id = "gpu0/3g.71gb@4/mps0"
    assert gpuctl("part", "ls").out.splitlines()[2].split()[-1] == "shared"


def test_profiles_and_export(node: ScriptedNode, gpuctl: Run) -> None:
    assert gpuctl("part", "profiles").out == "no GPU of this node can be cut into instances\n"
    node.profiles = partition_pb2.ListProfilesResponse(
        gpus=[
            partition_pb2.GpuProfiles(
                index=1, memory_slots=8, compute_slices=7,
                profiles=[partition_pb2.MigProfile(
                    name="3g.71gb", compute_slices=3, memory_bytes=70 * GIB, multiprocessors=60,
                    instances_max=2, memory_slots=4, starts=[0, 4])],
            )
        ]
    )  # fmt: skip
    row = gpuctl("part", "profiles").out.splitlines()[1]
    assert row.split() == ["1", "3g.71gb", "70.0", "GiB", "60", "3/7", "4/8", "2", "0", "4"]
    assert gpuctl("part", "export").out == "version: 1\n"
    assert json.loads(gpuctl("part", "export", "-o", "json").out) == {"text": "version: 1\n"}


def test_apply_carries_out_the_plan_it_has_shown(
    node: ScriptedNode, gpuctl: Run, layout: str
) -> None:
    node.layout_plan = PLAN
    done = gpuctl("part", "apply", "-f", layout, "--request-id", "one")
    assert (done.code, done.err) == (0, "")
    assert "plan-1: predicted downtime" in done.out
    assert done.out.splitlines()[-1] == (
        "destroyed gpu1; created gpu1/3g.71gb@4; a@1 lost their place and are brought back"
    )
    request = node.last(partition_pb2.ApplyLayoutRequest)
    assert (request.plan_id, request.request_id, request.validate_only) == ("plan-1", "one", False)
    done = gpuctl("part", "apply", "plan-7", "--dry-run")
    assert done.out == "plan-7 can be applied; nothing was changed\n"
    request = node.last(partition_pb2.ApplyLayoutRequest)
    assert (request.plan_id, request.validate_only) == ("plan-7", True)
    done = gpuctl("part", "apply", "plan-7", "-o", "json")
    assert json.loads(done.out)["response"]["created"] == ["gpu1/3g.71gb@4"]


def test_apply_wants_a_file_or_an_id_and_tells_of_a_stale_one(
    node: ScriptedNode, gpuctl: Run, layout: str
) -> None:
    assert gpuctl("part", "apply").code == 2
    assert gpuctl("part", "apply", "plan-1", "-f", layout).code == 2
    node.refusals["ApplyLayout"] = Refusal(Reason.PLAN_STALE, "the GPUs are no longer cut so")
    done = gpuctl("part", "apply", "plan-1")
    assert (done.code, "no longer cut so" in done.err) == (4, True)


def test_assert_is_an_exit_code(node: ScriptedNode, gpuctl: Run, layout: str) -> None:
    done = gpuctl("part", "assert", "-f", layout)
    assert (done.code, done.out) == (0, "as the file says\n")
    node.layout_plan = PLAN
    done = gpuctl("part", "assert", "-f", layout)
    assert (done.code, done.out.splitlines()[-1]) == (1, "+ gpu1/3g.71gb@4")
    assert "ApplyLayout" not in node.calls


def holder(node: ScriptedNode) -> None:
    node.ended = [
        partition_pb2.ForeignProcess(
            pid=71, partition="gpu0/2g.35gb@0", command="python train.py", owner="alice"
        )
    ]


def test_force_lists_whom_it_would_end_and_stops_without_yes(
    node: ScriptedNode, gpuctl: Run, layout: str
) -> None:
    holder(node)
    done = gpuctl("part", "apply", "-f", layout, "--force")
    assert done.code == 4
    assert "71  gpu0/2g.35gb@0  alice  python train.py" in done.out
    assert "Say --yes to end them" in done.err
    assert "part apply plan-0 --force" in done.err
    request = node.last(partition_pb2.ApplyLayoutRequest)
    assert (request.force, request.validate_only) == (True, True), "nothing but a look"


@pytest.mark.parametrize("how", ["yes", "plan"])
def test_force_ends_only_whom_it_has_listed(
    node: ScriptedNode, gpuctl: Run, layout: str, how: str
) -> None:
    holder(node)
    words = ("-f", layout, "--yes") if how == "yes" else ("plan-0",)
    done = gpuctl("part", "apply", *words, "--force")
    assert done.code == 0, done.err
    request = node.last(partition_pb2.ApplyLayoutRequest)
    assert (request.force, list(request.end_pids), request.validate_only) == (True, [71], False)


def test_how_long_the_parts_took_is_told(node: ScriptedNode, gpuctl: Run, layout: str) -> None:
    node.phases_ms = {"drain": 620.0, "cut": 12.0}
    assert "drain 0.62 s, cut 0.01 s" in gpuctl("part", "apply", "-f", layout).out


def test_force_without_anybody_in_the_way_forces_nothing(
    node: ScriptedNode, gpuctl: Run, layout: str
) -> None:
    assert gpuctl("part", "apply", "-f", layout, "--force").code == 0
    request = node.last(partition_pb2.ApplyLayoutRequest)
    assert (request.force, request.validate_only) == (False, False)


def test_instances_of_others_that_go_are_told_apart(
    node: ScriptedNode, gpuctl: Run, layout: str
) -> None:
    one, three = "gpu0/1g.18gb@2", "gpu0/3g.71gb@4"
    gpu = partition_pb2.GpuLayoutPlan(keep=[three], destroy=[one], cleared=[one, three])
    node.layout_plan = partition_pb2.LayoutPlan(plan_id="plan-1", changes=True, gpus=[gpu])
    rows = [
        " ".join(line.split()) for line in gpuctl("part", "plan", "-f", layout).out.splitlines()
    ]
    assert rows[1:3] == [
        f"keep {three} of others; must be empty",
        f"destroy {one} of others; must be empty",
    ]
