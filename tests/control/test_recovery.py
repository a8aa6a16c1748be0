"""Starting is recovering: daemons that end at every fail point, dying workers, lost journals."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from daemon.control.failpoints import LAYOUT_POINTS, FailPoint
from daemon.control.state.journal import FILE_NAME
from daemon.control.state.records import Cause, Intent, Kind, Operation
from daemon.control.state.running import Request
from engine.link import control
from tests.support.control_stage import Theatre, staged, until

QUIET = "[scheduling]\nmin_residency_s = 3600\n"


async def begin(stage: Theatre, kind: Kind, **fields: object) -> Operation:
    intent = Intent(kind, **fields)  # type: ignore[arg-type]
    return await stage.node.parts.conductor.submit(Request("test"), intent)


async def run(stage: Theatre, kind: Kind, **fields: object) -> Operation:
    return await stage.node.parts.operations.wait((await begin(stage, kind, **fields)).name, 100)


def overwrite(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    path.write_bytes(b"not a database" * 1000)


def serving(stage: Theatre) -> dict[str, str]:
    return {
        route.model: route.partition
        for route in stage.gateway.tables[-1].routes
        if route.disposition == "serve"
    }


def test_restarted_daemon_adopts_and_reads_nothing_from_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with staged(tmp_path, "prose", "code", settings=QUIET) as stage:
            await run(stage, Kind.LOAD, incoming="prose")
            await run(stage, Kind.LOAD, incoming="code", standby=True)
            tables = len(stage.gateway.tables)
            await stage.kill()
            stage.builders.builds.clear()
            stage.builders.inspections.clear()
            node = await stage.start()
            assert serving(stage) == {"prose@1": "gpu0"}
            assert stage.gateway.tables[-1].version > stage.gateway.tables[tables - 1].version
            assert len(node.world.store.images()) == 2
            assert node.world.state(node.world.registry["code@1"])[0] == "STANDBY"
            assert stage.builders.builds == stage.builders.inspections == []
            assert len(stage.worker.exchanges) == 1
            operation = await run(stage, Kind.SWAP, outgoing=("prose",), incoming="code")
            assert operation.failure is None
            assert stage.builders.builds == []

    asyncio.run(scenario())


@pytest.mark.parametrize("source", ["repository", "api"])
def test_another_dtype_lets_serve_what_serves_and_is_that_of_what_comes_in(
    tmp_path: Path, source: str
) -> None:
    async def scenario() -> None:
        async with staged(tmp_path, "prose", "code", settings=QUIET) as stage:
            world, registry = stage.node.world, stage.node.world.registry
            key = "code@1"
            if source == "api":
                registered = await registry.register("also", stage.repository / "code" / "1", 0)
                await stage.node._journal.commit([registry.put(registered)])
                key = registered.key
            await run(stage, Kind.LOAD, incoming=key)
            await run(stage, Kind.LOAD, incoming="prose", standby=True)
            old = registry[key].digest
            assert world.store.manifest(old).dtype == "float32"
            await stage.kill()
            stage.dtype = "bfloat16"
            stage.builders.builds.clear()
            world = (await stage.start()).world
            assert serving(stage) == {key: "gpu0"}
            assert (stage.builders.builds, world.registry[key].digest) == ([], "")
            for outgoing, incoming in ((key, "prose@1"), ("prose@1", key)):
                done = await run(stage, Kind.SWAP, outgoing=(outgoing,), incoming=incoming)
                assert done.failure is None
                digest = stage.worker.engines[incoming].digest
                assert world.registry[incoming].digest == digest != old
                assert world.store.manifest(digest).dtype == "bfloat16"
            assert len(stage.builders.builds) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("ends", ["committed", "rolled back"])
def test_exchange_that_goes_on_without_hotbayd_is_followed_to_its_end(
    tmp_path: Path, ends: str
) -> None:
    async def scenario() -> None:
        async with staged(tmp_path, "prose", "code", settings=QUIET) as stage:
            await run(stage, Kind.LOAD, incoming="prose")
            stage.worker.pause_at = control.Stage.COPYING
            if ends == "rolled back":
                stage.worker.fail_at = control.Stage.COPYING
            operation = await begin(stage, Kind.SWAP, outgoing=("prose",), incoming="code")
            await stage.worker.paused.wait()
            await stage.kill()
            await stage.start()
            held = stage.node.parts.operations.holder("partition:gpu0")
            assert held is not None
            assert held.name == operation.name
            assert serving(stage) == ({"prose@1": "gpu0"})
            stage.worker.go_on.set()
            operation = await stage.node.parts.operations.wait(operation.name, 100)
            await stage.node.parts.router.publish()
            if ends == "committed":
                assert operation.failure is None
                assert serving(stage) == {"code@1": "gpu0"}
                assert list(stage.node.world.placements) == ["code@1"]
            else:
                assert operation.failure is not None
                assert operation.failure.reason == "TRANSFER_FAILED"
                assert serving(stage) == {"prose@1": "gpu0"}
            await stage.kill()
            await stage.start()
            assert stage.node.parts.operations.get(operation.name).done

    asyncio.run(scenario())


@pytest.mark.parametrize("action", ["raise", "hang"])
@pytest.mark.parametrize("point", [each for each in FailPoint if each not in LAYOUT_POINTS])
def test_daemon_that_breaks_at_a_fail_point_leaves_a_sound_node(
    tmp_path: Path, point: FailPoint, action: str
) -> None:
    """`raise` ends the operation there; `hang` and then an end leave what a kill leaves."""

    async def scenario() -> None:
        async with staged(tmp_path, "prose", "code", settings=QUIET) as stage:
            await run(stage, Kind.LOAD, incoming="prose")
            await stage.kill()
            stage.settings = f'failpoints = "{point.value}={action}"\n{QUIET}'
            await stage.start()
            if point is FailPoint.DRAINED:
                operation = await begin(stage, Kind.DRAIN, outgoing=("prose",))
            else:
                operation = await begin(stage, Kind.SWAP, outgoing=("prose",), incoming="code")
            failpoints = stage.node.parts.conductor._failpoints
            await until(lambda: not failpoints._actions)
            if action == "hang":
                await stage.kill()
                stage.settings = QUIET
                await stage.start()
            operation = await stage.node.parts.operations.wait(operation.name, 100)
            assert operation.done
            committed = point in (FailPoint.EXCHANGED, FailPoint.PLACED)
            expected = ["code@1"] if committed else ["prose@1"]
            await until(lambda: stage.worker.active() == expected)
            await stage.node.parts.router.publish()
            assert list(serving(stage)) == expected
            assert list(stage.node.world.placements) == expected
            assert stage.node.world.store.reserved_bytes == 0
            assert stage.node.parts.operations.holder("partition:gpu0") is None
            # And it is as good as new.
            other = "prose" if committed else "code"
            operation = await run(
                stage,
                Kind.SWAP,
                outgoing=tuple(each.split("@")[0] for each in expected),
                incoming=other,
            )
            assert operation.failure is None

    asyncio.run(scenario())


def test_worker_that_dies_in_mid_swap_comes_back_with_the_old_model(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with staged(tmp_path, "prose", "code", settings=QUIET) as stage:
            await run(stage, Kind.LOAD, incoming="prose")
            stage.worker.die_at = control.Stage.COPYING
            operation = await run(stage, Kind.SWAP, outgoing=("prose",), incoming="code")
            assert operation.failure is not None
            assert operation.failure.reason == "WORKER_CRASHED"
            await stage.fleet.lose("gpu0")
            await until(lambda: not serving(stage))
            assert stage.gateway.route("prose@1").disposition == "hold"
            stage.worker.images.clear()
            stage.builders.builds.clear()
            await stage.fleet.connect("gpu0")
            await until(lambda: serving(stage) == {"prose@1": "gpu0"})
            assert stage.builders.builds == [], "warm: from the host store, not from disk"
            newest = stage.node.parts.operations.all()[0]
            assert (newest.intent.cause, newest.failure) == (Cause.RECOVERY, None)

    asyncio.run(scenario())


def test_model_that_takes_its_worker_down_again_and_again_is_left_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with staged(tmp_path, "prose", settings=QUIET) as stage:
            await run(stage, Kind.LOAD, incoming="prose")
            for _ in range(4):
                stage.worker.engines.clear()
                await stage.fleet.lose("gpu0")
                stage.worker.die_at = control.Stage.COPYING
                await stage.fleet.connect("gpu0")
                await until(lambda: stage.worker.die_at is None or stage.node.world.warnings)
                await until(lambda: stage.node.parts.operations.open_count == 0)
            assert "ended 3 times" in stage.node.world.warnings[-1]
            assert stage.node.world.placements == {}

    asyncio.run(scenario())


def test_lost_journal_is_rebuilt_from_repository_and_workers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with staged(tmp_path, "prose", "code", settings=QUIET) as stage:
            await run(stage, Kind.LOAD, incoming="prose")
            await stage.kill()
            overwrite(tmp_path / "state" / FILE_NAME)
            await stage.start()
            assert "damaged" in stage.node.world.warnings[0]
            assert serving(stage) == {"prose@1": "gpu0"}
            assert stage.node.world.registry["prose@1"].digest in stage.node.world.store
            assert any("damaged-" in name for name in os.listdir(tmp_path / "state"))
            operation = await run(stage, Kind.SWAP, outgoing=("prose",), incoming="code")
            assert operation.failure is None

    asyncio.run(scenario())


def test_cold_start_brings_back_what_was_placed(tmp_path: Path) -> None:
    """After a reboot nothing runs and no image is left; the journal says what was meant."""

    async def scenario() -> None:
        async with staged(tmp_path, "prose", settings=QUIET) as stage:
            await run(stage, Kind.LOAD, incoming="prose")
            await stage.kill()
            stage.worker.engines.clear()
            stage.gateway.segments.clear()
            stage.worker.images.clear()
            stage.builders.builds.clear()
            await stage.start()
            await until(lambda: serving(stage) == {"prose@1": "gpu0"})
            assert stage.builders.builds == ["prose"]

    asyncio.run(scenario())


def test_drained_model_stays_drained_over_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with staged(tmp_path, "prose", settings=QUIET) as stage:
            await run(stage, Kind.LOAD, incoming="prose")
            await run(stage, Kind.DRAIN, outgoing=("prose",))
            await stage.kill()
            await stage.start()
            assert serving(stage) == {}
            assert stage.node.world.placements["prose@1"].drained
            # Its worker dies as well: resuming it then means to load it again.
            stage.worker.engines.clear()
            await stage.fleet.lose("gpu0")
            await stage.fleet.connect("gpu0")
            operation = await run(stage, Kind.RESUME, incoming="prose")
            assert operation.failure is None
            assert stage.worker.active() == ["prose@1"]
            await stage.node.parts.router.publish()
            assert serving(stage) == {"prose@1": "gpu0"}

    asyncio.run(scenario())
