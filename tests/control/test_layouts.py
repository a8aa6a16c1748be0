"""Layouts through hotbayd: planned, exported, refused; nothing on the GPUs is changed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pynvml
import pytest
from hotbay.v1 import partition_pb2

from daemon.control.actions.layouts import Layouts
from daemon.control.errors import Refused
from partitioner.bounded import BoundedNvml
from partitioner.catalogue import load_catalogue
from partitioner.simulated.install import installed
from partitioner.simulated.node import Fault, SimulatedNode
from partitioner.simulated.sharing import MemorySharing
from partitioner.simulation import parse_node
from tests.support.control_api import Api, play, refusal

SERVICE = "hotbay.v1.PartitionService"
THREE = "version: 1\ngpus:\n- index: 0\n  partitions: [{profile: 3g.71gb}]\n"
MIXED = """
version: 1
gpus:
- {board: h200, mig_enabled: true, instances: [{profile: 3g.71gb, start: 4}]}
- {board: a30}
"""


async def plan(api: Api, layout: str, source: str = "") -> Any:
    request = partition_pb2.PlanLayoutRequest(layout=layout, source=source)
    return await api.call(f"{SERVICE}/PlanLayout", request, partition_pb2.LayoutPlan)


def test_a_plan_names_who_must_move_and_for_how_long(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        free = await plan(api, THREE)
        assert (list(free.move), free.predicted_downtime_ms) == ([], 0.0)
        assert free.changes
        await api.wait(await api.model("LoadModel", model="prose"))
        planned = await plan(api, THREE)
        assert list(planned.destroy) == list(planned.move) == ["gpu0"]
        assert list(planned.create) == ["gpu0/3g.71gb@4"]
        assert planned.predicted_downtime_ms > 0
        assert planned.gpus[0].mig_change == "enable"
        assert planned.plan_id == free.plan_id == (await plan(api, THREE)).plan_id

    play(tmp_path, scenario, "prose")


def test_an_export_plans_to_nothing_and_bad_files_name_their_line(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        exported = await api.call(
            f"{SERVICE}/GetLayout",
            partition_pb2.GetLayoutRequest(),
            partition_pb2.Layout,
        )
        planned = await plan(api, exported.text)
        assert not planned.changes
        assert list(planned.keep) == ["gpu0"]
        bad = THREE.replace("3g.71gb", "3g.40gb")
        code, reason, metadata, message = await refusal(plan(api, bad, "node.yaml"))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "LAYOUT_INVALID")
        assert metadata == {"line": "4"}
        assert message.startswith("node.yaml, line 4: gpu0 (NVIDIA H200) has no profile")
        code, reason, _, _ = await refusal(plan(api, ""))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        profiles = await api.call(
            f"{SERVICE}/ListProfiles",
            partition_pb2.ListProfilesRequest(),
            partition_pb2.ListProfilesResponse,
        )
        assert [each.name for each in profiles.gpus[0].profiles][:2] == ["1g.18gb", "2g.35gb"]

    play(tmp_path, scenario)


def with_layouts(scenario: Any) -> None:
    """Run a scenario with the layouts of a node whose first GPU has a foreign instance."""

    async def run(node: SimulatedNode) -> None:
        nvml = BoundedNvml()
        processes = SimpleNamespace(workers={})
        world: Any = SimpleNamespace(gpus=(), owned=(), owners={}, processes=processes)
        await scenario(node, Layouts(world, nvml.discover, nvml.geometry, MemorySharing()))
        await nvml.close()

    node = SimulatedNode(parse_node(MIXED, "mixed.yaml", load_catalogue()))
    with installed(node):
        asyncio.run(run(node))


def test_instances_found_are_left_alone_and_reported() -> None:
    async def scenario(node: SimulatedNode, layouts: Layouts) -> None:
        planned = await layouts.plan(THREE, "")
        assert list(planned.foreign) == ["gpu0/3g.71gb@4"]
        assert list(planned.create) == ["gpu0/3g.71gb@0"]
        exported = await layouts.export()
        assert "found: adopt" in exported
        again = await layouts.plan(exported, "")
        assert not again.changes
        assert list(again.keep) == ["gpu0/3g.71gb@4", "gpu1"]

    with_layouts(scenario)


def test_switching_an_ampere_board_needs_a_reset() -> None:
    async def scenario(node: SimulatedNode, layouts: Layouts) -> None:
        text = "version: 1\ngpus: [{product: NVIDIA A30, partitions: [{memory: 8GiB}]}]\n"
        planned = await layouts.plan(text, "")
        assert (planned.gpus[0].mig_change, planned.gpus[0].reset) == ("enable", True)
        assert [name.partition("@")[0] for name in planned.create] == ["gpu1/2g.12gb"]

    with_layouts(scenario)


def test_what_cannot_be_read_is_never_planned_for() -> None:
    async def scenario(node: SimulatedNode, layouts: Layouts) -> None:
        hidden = Fault(pynvml.NVML_ERROR_NO_PERMISSION, "nvmlDeviceGetGpuInstances")
        node.inject(hidden)
        with pytest.raises(Refused, match="may not see its instances") as caught:
            await layouts.plan(THREE, "")
        assert caught.value.reason == "INSTANCES_HIDDEN"
        node.clear_injections()
        node.inject(Fault(pynvml.NVML_ERROR_UNKNOWN, "nvmlDeviceGetCount_v2"))
        with pytest.raises(Refused, match="cannot be read") as caught:
            await layouts.plan(THREE, "")
        assert caught.value.reason == "GPU_LOST"
        node.clear_injections()
        node.vanish(node.gpus[0].uuid)
        with pytest.raises(Refused, match="no GPU of this node has index 0"):
            await layouts.plan(THREE, "")

    with_layouts(scenario)
