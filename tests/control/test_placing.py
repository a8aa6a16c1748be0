"""Placements and defragmentation through hotbayd: planned, refused, and handed on to be applied."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hotbay.v1 import partition_pb2, placement_pb2

from daemon.control.actions.layouts import Layouts
from daemon.control.actions.placing import Placing
from daemon.control.errors import Refused
from daemon.control.notify import boot_id
from partitioner.bounded import BoundedNvml
from partitioner.catalogue import load_catalogue
from partitioner.cutting import Owned
from partitioner.simulated.install import installed
from partitioner.simulated.node import SimulatedNode
from partitioner.simulated.sharing import MemorySharing
from partitioner.simulation import parse_node
from tests.support.control_api import Api, play, refusal

SERVICE = "hotbay.v1.PlacementService"
GIB = 1 << 30
TWO = """
version: 1
models:
  - {model: prose, requests: 2, tenant: team-a}
  - {name: large, weights: 60GiB, kv: 4GiB, tenant: team-b, isolation: hardware}
"""


async def place(api: Api, models: str, source: str = "") -> Any:
    request = placement_pb2.PlanPlacementRequest(models=models, source=source)
    return await api.call(f"{SERVICE}/PlanPlacement", request, placement_pb2.PlacementPlan)


def test_models_get_places_and_the_layout_is_planned_like_any_other(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        plan = await place(api, TWO)
        assert sorted(each.model for each in plan.placed) == ["large", "prose"]
        assert (list(plan.left_out), plan.value, plan.value_asked) == ([], 2.0, 2.0)
        prose = next(each for each in plan.placed if each.model == "prose")
        # Weights and KV of two requests of the node's own model, in pages of the device.
        assert 0 < prose.memory_bytes < GIB
        assert prose.partition_bytes == 3 * GIB + prose.memory_bytes
        request = partition_pb2.PlanLayoutRequest(layout=plan.layout)
        planned = await api.call(
            "hotbay.v1.PartitionService/PlanLayout", request, partition_pb2.LayoutPlan
        )
        assert {*planned.keep, *planned.create} == {each.partition for each in plan.placed}
        assert [each.index for each in plan.gpus] == [0]
        # The board is known, so that its bandwidth stands in for a measured time.
        assert all(each.predicted_ms_per_token > 0 for each in plan.placed)

    play(tmp_path, scenario, "prose")


def test_what_does_not_fit_is_explained_and_bad_files_name_their_line(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        huge = "version: 1\nmodels:\n  - {name: huge, weights: 130GiB, kv: 30GiB}\n"
        plan = await place(api, huge)
        (left,) = plan.left_out
        assert (left.model, left.line, plan.layout) == ("huge", 3, "")
        assert "lower its KV by" in left.remedy
        code, reason, metadata, message = await refusal(
            place(api, TWO.replace("prose", "proze"), "m")
        )
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        assert metadata["line"] == "4"
        assert message.startswith("m, line 4: there is no model 'proze'")
        empty = await refusal(place(api, ""))
        assert empty[1] == "INVALID_ARGUMENT"
        long = await refusal(place(api, "#" * ((1 << 20) + 1)))
        assert "larger than" in long[3]

    play(tmp_path, scenario, "prose")


SPREAD = """
version: 1
gpus:
- board: h200
  mig_enabled: true
  instances: [{profile: 1g.18gb, start: 0}, {profile: 1g.18gb, start: 4}]
- {board: h200}
"""


def scene(check: Any, *, ours: bool = True) -> None:
    """Placing on a node whose two small instances are ours, or are not."""

    async def run() -> None:
        with installed(SimulatedNode(parse_node(SPREAD, "x", load_catalogue()))):
            nvml = BoundedNvml()
            gpus = await nvml.discover()
            owned = tuple(
                Owned(gpu.uuid, each.place, each.number, each.uuid, boot_id())
                for gpu in gpus
                for each in gpu.instances or ()
                if ours
            )
            worker = SimpleNamespace(page_bytes=0, workspace_bytes=3 * GIB, context_tokens_max=8192)
            world: Any = SimpleNamespace(
                gpus=gpus,
                owned=owned,
                processes=SimpleNamespace(workers={}),
                closures=SimpleNamespace(cordons={}),
                config=SimpleNamespace(worker=worker),
                registry=None,
            )
            layouts = Layouts(world, nvml.discover, nvml.geometry, MemorySharing())
            await check(Placing(world, layouts), layouts, world)
            await nvml.close()

    asyncio.run(run())


def test_a_defragmentation_is_a_plan_that_can_be_applied_by_its_id() -> None:
    async def check(placing: Placing, layouts: Layouts, world: Any) -> None:
        answer = await placing.defragment(0.0)
        (gpu,) = answer.gpus
        assert (gpu.index, gpu.worth_it, gpu.cost_ms) == (0, True, 0.0)
        assert gpu.fragmentation_after < gpu.fragmentation_before
        assert answer.worth_ms_per_gib == 1000.0
        (destroyed,) = answer.plan.destroy
        assert destroyed in ("gpu0/1g.18gb@0", "gpu0/1g.18gb@4")
        assert len(answer.plan.create) == 1
        planned, _ = await layouts.again(answer.plan.plan_id)
        assert planned.id == answer.plan.plan_id
        assert planned.gpus[0].fragmentation_after == pytest.approx(gpu.fragmentation_after)
        with pytest.raises(Refused, match="worth_ms_per_gib"):
            await placing.defragment(-1.0)

    scene(check)


def test_what_is_not_worth_moving_or_not_ours_is_left_where_it_is() -> None:
    async def foreign(placing: Placing, layouts: Layouts, world: Any) -> None:
        answer = await placing.defragment(0.0)
        assert (list(answer.gpus), answer.layout, answer.plan.changes) == ([], "", False)

    scene(foreign, ours=False)

    async def dear(placing: Placing, layouts: Layouts, world: Any) -> None:
        engine = SimpleNamespace(weights_bytes=100 * GIB, status="ACTIVE")
        state = SimpleNamespace(engines=[engine], link_bytes_per_s=1e9)
        for name in ("gpu0/1g.18gb@0", "gpu0/1g.18gb@4"):
            world.processes.workers[name] = SimpleNamespace(state=state)
        answer = await placing.defragment(0.0)
        assert [each.worth_it for each in answer.gpus] == [False]
        assert answer.gpus[0].cost_ms > 100_000 > answer.gpus[0].gain_ms
        assert (answer.layout, answer.plan.plan_id) == ("", "")
        assert (await placing.defragment(1e6)).gpus[0].worth_it

    scene(dear)


def test_cordoned_gpus_are_not_packed_onto() -> None:
    async def check(placing: Placing, layouts: Layouts, world: Any) -> None:
        text = "version: 1\nmodels:\n  - {name: a, weights: 8GiB, kv: 4GiB}\n"
        assert (await placing.plan(text, "")).placed[0].partition.startswith("gpu0/")
        world.closures.cordons[world.gpus[0].uuid] = object()
        second = await placing.plan(text, "")
        assert second.placed[0].partition.startswith("gpu1")
        assert [each.index for each in second.gpus] == [1]

    scene(check)
