"""Calls that come beside each other: each ends, and what was refused is forgotten."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.link import control
from engine.link.control import EngineStatus
from engine.worker import calls, loop
from engine.worker.calls import Calls
from engine.worker.errors import OperationInProgress
from engine.worker.options import Options
from tests.support.worker_stage import load
from tests.worker.conftest import Model
from tests.worker.inside import WAIT_S, Inside


def test_a_staging_that_is_asked_for_between_measurements_waits_for_them(
    inside: Inside, prose: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, go_on = threading.Event(), threading.Event()

    def measure(*arguments: Any, **options: Any) -> float:
        measuring.set()
        assert go_on.wait(WAIT_S)
        return 1e9

    monkeypatch.setattr(calls, "measure_link", measure)

    async def run() -> None:
        served = Calls(
            Options("whole", Path("/nowhere"), 1, 1 << 30),
            inside.residency,
            inside.loop,
            tell=lambda stage: None,
            ended=pytest.fail,
            stuck=pytest.fail,
        )
        spec = load(prose.key, prose.image).incoming
        assert spec is not None
        asked = (
            control.MeasureLink(copy_bytes=1 << 16),
            control.MeasureLink(copy_bytes=1 << 16),
            control.StageWeights("stage", spec),
        )
        # They begin in this order, and the second and third wait while the first one measures.
        tasks = [asyncio.create_task(served.serve(message, [])) for message in asked]
        assert await asyncio.to_thread(measuring.wait, WAIT_S)
        go_on.set()
        async with asyncio.timeout(WAIT_S):
            first, second, staged = await asyncio.gather(*tasks)
        assert first.link_bytes_per_s == second.link_bytes_per_s == 1e9
        assert staged.result.error == ""
        served.close()

    asyncio.run(run())
    assert inside.statuses() == {prose.key: EngineStatus.STAGED}


def test_a_call_for_which_there_was_no_room_is_in_nobodys_way(
    inside: Inside, prose: Model, code: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(loop, "JOBS_MAX", 0)
        for call in (inside.exchange, inside.stage):
            with pytest.raises(OperationInProgress, match="0 calls are under way"):
                call(load(prose.key, prose.image, "refused"))
    assert inside.loop.snapshot.exchanging == ""
    assert inside.exchange(load(prose.key, prose.image, "1")).error == ""
    assert inside.stage(load(code.key, code.image, "2")).error == ""
