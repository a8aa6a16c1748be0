"""The host was started: what was cut before is cut again, once and by an operation, or waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pynvml
import pytest
from hotbay.status import operation_metadata
from hotbay.v1 import partition_pb2

from daemon.control.config import AfterReboot
from daemon.control.config_file import load
from partitioner.geometry import Instance
from partitioner.simulated.node import Fault
from tests.control.test_layout_changes import NAMES, SERVICE, THREE, TWO, apply, begin, board, plan
from tests.support.control_api import QUIET, Api
from tests.support.control_peers import Worker
from tests.support.control_stage import Theatre, staged, until

BOOTS = (
    "actions.after_reboot",
    "actions.layout_changes",
    "actions.layout_marks",
    "actions.layouts",
    "state.remembered_world",
)
Scenario = Callable[[Api, "Host"], Awaitable[None]]


class Host:
    """Can be started anew: instances and processes are gone, and the boot has another name."""

    def __init__(self, stage: Theatre, patch: pytest.MonkeyPatch) -> None:
        self.stage = stage
        self._patch = patch
        self.boots = 0

    async def reboot(self, *, mig: bool = False) -> None:
        await self.stage.kill()
        self.boots += 1
        for module in BOOTS:
            name = f"boot-{self.boots}"
            self._patch.setattr(f"daemon.control.{module}.boot_id", lambda name=name: name)
        gpu = self.stage.board.gpus[0]
        self.stage.board.cut(gpu, ())
        self.stage.board.set_mig(gpu, mig, at_once=True)
        await self.stage.start()

    def reapplied(self) -> list[Any]:
        operations = self.stage.node.parts.operations.all()
        return [each for each in operations if each.method == "AfterReboot"]

    async def through(self) -> None:
        """The operation is over, and whoever began it has heard of it."""
        tasks = self.stage.node._tasks
        (task,) = [each for each in tasks if each.get_name() == "layout after a reboot"]
        await task

    @property
    def warnings(self) -> list[str]:
        return list(self.stage.node.world.warnings)


def play(
    root: Path, patch: pytest.MonkeyPatch, scenario: Scenario, policy: AfterReboot = "apply"
) -> None:
    settings = f'{QUIET}[partitions]\nafter_reboot = "{policy}"\n'

    async def run() -> None:
        async with staged(root, "prose", settings=settings, start=False) as stage:
            for name in NAMES:
                stage.workers[name] = Worker(root / "run", name, 64 << 20)
            await stage.start()
            async with asyncio.timeout(120):
                path = stage.config().control_socket
                async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                    await scenario(Api(stage, channel), Host(stage, patch))

    asyncio.run(run())


def test_the_layout_is_applied_again_and_models_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(api: Api, host: Host) -> None:
        stage = api.stage
        await apply(api, TWO)
        await api.wait(await api.model("LoadModel", model="prose", partition="gpu0/3g.71gb@4"))
        await host.reboot()
        await host.through()
        assert board(stage) == ["2g.35gb@0", "3g.71gb@4"]
        (operation,) = host.reapplied()
        assert (operation.intent.cause.value, operation.result is not None) == ("recovery", True)
        shown = await api.operation("GetOperation", name=operation.name)
        assert operation_metadata(shown).kind == "layout"
        world = stage.node.world
        assert set(world.partitions) == {"gpu0/2g.35gb@0", "gpu0/3g.71gb@4"}
        await until(lambda: world.serving.get("prose@1") == "gpu0/3g.71gb@4")
        assert host.warnings == []
        # In this boot it is there: another start of the daemon does nothing.
        await stage.kill()
        await stage.start()
        await host.through()
        assert len(host.reapplied()) == 1
        assert not (await plan(api, TWO)).changes

    play(tmp_path, monkeypatch, scenario)


def test_what_was_applied_last_counts_and_mig_mode_may_have_stayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(api: Api, host: Host) -> None:
        await apply(api, TWO)
        await apply(api, THREE)
        await host.reboot(mig=True)
        await host.through()
        assert board(api.stage) == ["1g.18gb@0", "3g.71gb@4"]
        await apply(api, "version: 1\ngpus: [{index: 0}]\n")
        await host.reboot()
        await host.through()
        assert board(api.stage) == ["whole"], "nothing was ours any more"
        assert len(host.reapplied()) == 1

    play(tmp_path, monkeypatch, scenario)


def test_whom_partitions_are_for_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(api: Api, host: Host) -> None:
        stage = api.stage
        await apply(api, TWO.replace("start: 4", "start: 4, owner: team-a"))
        owners = {"gpu0/3g.71gb@4": "team-a"}
        assert stage.node.world.owners == owners
        exported = await api.call(
            f"{SERVICE}/GetLayout", partition_pb2.GetLayoutRequest(), partition_pb2.Layout
        )
        assert "owner: team-a" in exported.text
        assert not (await plan(api, exported.text)).changes
        await stage.kill()
        await stage.start()
        await host.through()
        assert stage.node.world.owners == owners
        await host.reboot()
        await host.through()
        assert (board(stage), stage.node.world.owners) == (["2g.35gb@0", "3g.71gb@4"], owners)
        await apply(api, "version: 1\ngpus: [{index: 0, owner: team-b}]\n")
        await stage.kill()
        await stage.start()
        await host.through()
        assert stage.node.world.owners == {"gpu0": "team-b"}
        await apply(api, "version: 1\ngpus: [{index: 0}]\n")
        assert stage.node.world.owners == {}

    play(tmp_path, monkeypatch, scenario)


def test_with_wait_it_is_only_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(api: Api, host: Host) -> None:
        await apply(api, TWO)
        await host.reboot()
        await host.through()
        assert (board(api.stage), host.reapplied()) == (["whole"], [])
        gone, waits = host.warnings
        assert "gone since the host was started" in gone
        plan_id = waits.rpartition("gpuctl part apply ")[2].rstrip("`")
        await api.wait(await begin(api, plan_id))
        assert board(api.stage) == ["2g.35gb@0", "3g.71gb@4"]

    play(tmp_path, monkeypatch, scenario, "wait")


def test_what_fails_is_named_and_tried_again_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(api: Api, host: Host) -> None:
        stage = api.stage
        await apply(api, TWO)
        stage.board.inject(
            Fault(
                pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES,
                "nvmlDeviceCreateGpuInstanceWithPlacement",
            )
        )
        await host.reboot()
        await host.through()
        assert board(stage) == ["whole"], "rolled back"
        assert any("it is tried again when hotbayd starts" in each for each in host.warnings)
        stage.board.clear_injections()
        await stage.kill()
        await stage.start()
        await host.through()
        assert board(stage) == ["2g.35gb@0", "3g.71gb@4"]

    play(tmp_path, monkeypatch, scenario)


def test_instances_of_others_are_in_the_way_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(api: Api, host: Host) -> None:
        stage = api.stage
        await apply(api, TWO)
        made = stage.board.cut

        def cut(gpu: Any, instances: Any) -> None:
            """A script of the host's boots makes an instance where ours was."""
            made(gpu, (stage.board.make_instance(gpu, 1, Instance(4, 4, "3g.71gb")),))

        monkeypatch.setattr(stage.board, "cut", cut)
        await host.reboot(mig=True)
        monkeypatch.setattr(stage.board, "cut", made)
        await host.through()
        assert board(stage) == ["3g.71gb@4"]
        assert host.reapplied() == []
        assert any("not ours" in each for each in host.warnings), host.warnings

    play(tmp_path, monkeypatch, scenario)


def test_killed_on_the_way_it_goes_on_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(api: Api, host: Host) -> None:
        stage = api.stage
        await apply(api, TWO)
        stall = stage.board.stall("nvmlDeviceCreateGpuInstanceWithPlacement")
        await host.reboot()
        await until(stall.entered.is_set)
        stage.board.clear_injections()
        await stage.kill()
        await stage.start()
        await host.through()
        assert board(stage) == ["2g.35gb@0", "3g.71gb@4"]
        assert set(stage.node.world.partitions) == {"gpu0/2g.35gb@0", "gpu0/3g.71gb@4"}

    play(tmp_path, monkeypatch, scenario)


def test_the_policy_is_one_of_two_words(tmp_path: Path) -> None:
    from daemon.control.errors import ConfigInvalid

    path = tmp_path / "hotbayd.toml"
    directories = {"state_dir": str(tmp_path), "runtime_dir": str(tmp_path)}
    path.write_text('[partitions]\nafter_reboot = "never"\n')
    with pytest.raises(ConfigInvalid, match="after_reboot"):
        load(path, directories, {})
    path.write_text("")
    assert load(path, directories, {}).partitions.after_reboot == "apply"
