"""Models that lost their partition: loaded again in the background, and never after the end."""

from __future__ import annotations

import asyncio
from pathlib import Path

from daemon.control.state.records import Cause
from engine.link.control import Stage
from tests.support.control_api import Api, play
from tests.support.control_stage import until


def under_way() -> list[asyncio.Task[None]]:
    return [each for each in asyncio.all_tasks() if each.get_name() == "bring back"]


def test_nothing_is_brought_back_by_a_daemon_that_has_ended(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        stage.worker.pause_at = Stage.COPYING
        begun = await api.model("LoadModel", model="code")
        try:
            stage.node.parts.returning.later(("prose@1",), "was lost", after=begun.name)
            assert under_way()
            await stage.kill()
            assert not under_way()
        finally:
            stage.worker.go_on.set()

    play(tmp_path, scenario, "prose", "code")


def test_who_has_a_place_or_is_forgotten_is_not_loaded(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        stage = api.stage
        await api.wait(await api.model("LoadModel", model="code"))
        models = ("code@1", "unheard@1", "prose@1")
        stage.node.parts.returning.later(models, "was lost")
        await until(lambda: not under_way())
        begun = [each.intent for each in stage.node.parts.operations.all()]
        brought = [each.incoming for each in begun if each.cause is Cause.RECOVERY]
        assert brought == ["prose@1"]
        assert stage.worker.active() == ["code@1", "prose@1"]
        assert not stage.node.world.warnings

    play(tmp_path, scenario, "prose", "code")
