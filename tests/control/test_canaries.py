"""Canaries on a whole node with scripted peers: what workers are told, and what is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from daemon.control.actions.canaries import RUNTIMES_MAX
from daemon.control.state.journal import Journal
from engine.link import control
from tests.control.test_conductor import load, play, swap
from tests.support.control_stage import Theatre

TEXT = "to be or not"
PROMPT = (2, 2, 2, 3)


def canary(stage: Theatre, key: str = "prose@1") -> object:
    return stage.node.world.registry[key].canary


def test_a_canary_is_recorded_at_the_first_load_and_expected_from_then_on(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        assert (await load(stage, "prose", canary=TEXT)).failure is None
        assert stage.worker.exchanges[-1].canary == control.Canary(PROMPT)
        await swap(stage, "prose", "code")
        assert stage.worker.exchanges[-1].canary is None
        await swap(stage, "code", "prose")
        expected = {"scripted": PROMPT[::-1]}
        assert stage.worker.exchanges[-1].canary == control.Canary(PROMPT, expected)
        kept.append((canary(stage), stage.node.world.config.state_dir))
        assert stage.node.world.registry["prose@1"].digest == kept[0][0].digest
        # Given again, it is recorded anew; given up, it is gone.
        await load(stage, "prose", canary=TEXT)
        await swap(stage, "prose", "code")
        await swap(stage, "code", "prose")
        assert stage.worker.exchanges[-1].canary == control.Canary(PROMPT)
        await load(stage, "prose", forget_canary=True)
        assert canary(stage) is None
        await load(stage, "prose", canary=TEXT)
        await swap(stage, "prose", "code")
        await swap(stage, "code", "prose")

    kept: list[tuple[Any, Path]] = []
    play(tmp_path, scenario, "prose", "code")

    async def read() -> None:
        journal, contents = await Journal.open(kept[0][1])
        await journal.close()
        (version,) = [each for each in contents.versions if each.key == "prose@1"]
        assert version.canary == kept[0][0]

    asyncio.run(read())


def test_other_runtimes_are_remembered_side_by_side_up_to_a_limit(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose", canary=TEXT)
        for number in range(RUNTIMES_MAX + 2):
            stage.worker.runtime = f"board {number}"
            await swap(stage, "prose", "code")
            await swap(stage, "code", "prose")
        kept = stage.node.world.registry["prose@1"].canary
        assert kept is not None
        assert len(kept.expected) == RUNTIMES_MAX
        assert "scripted" not in kept.expected
        assert f"board {RUNTIMES_MAX + 1}" in kept.expected

    play(tmp_path, scenario, "prose", "code")


@pytest.mark.parametrize("text", [" ", "word " * 65])
def test_a_text_of_no_or_too_many_tokens_is_refused(tmp_path: Path, text: str) -> None:
    async def scenario(stage: Theatre) -> None:
        operation = await load(stage, "prose", canary=text)
        assert operation.failure is not None
        assert operation.failure.reason == "INVALID_ARGUMENT"
        assert "1 to 64" in operation.failure.message
        assert canary(stage) is None
        assert stage.worker.exchanges == []

    play(tmp_path, scenario, "prose")


def test_a_load_that_fails_leaves_the_canary_as_it_was(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        stage.worker.fail_at = control.Stage.VERIFYING
        operation = await load(stage, "code", canary=TEXT)
        assert operation.failure is not None
        assert canary(stage, "code@1") is None

    play(tmp_path, scenario, "prose", "code")


def test_a_record_is_of_one_image() -> None:
    from daemon.control.actions.canaries import asked
    from daemon.control.state.records import CanaryPrompt

    kept = CanaryPrompt(TEXT, PROMPT, "a" * 64, {"here": (1, 2)})
    assert asked(kept, "a" * 64) == control.Canary(PROMPT, {"here": (1, 2)})
    assert asked(kept, "b" * 64) == control.Canary(PROMPT)
    assert asked(None, "b" * 64) is None
