"""Images on disk as hotbayd uses them: real files, on a whole node with scripted peers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from hotbay.v1 import model_pb2, model_pb2_grpc

from daemon.control.errors import CallRefused
from daemon.control.state.records import Intent, Kind
from daemon.control.state.running import Request
from tests.support.control_stage import Theatre, staged, until
from tests.support.descriptors import open_descriptors

CACHE_BYTES = 1 << 30
QUIET = "[scheduling]\nswap_on_demand = false\n"
IMAGE_BYTES = (1 << 20) + 4096


def kept_within(budget_bytes: int) -> str:
    """Settings that keep images which are not packed, too."""
    return f'[image_cache]\nkeep = "all"\nbudget_bytes = {budget_bytes}\n'


def key_of(directory: Path) -> str:
    return hashlib.sha256(str(directory).encode()).hexdigest()


def play(
    tmp_path: Path,
    scenario: Callable[[Theatre], Awaitable[None]],
    *models: str,
    settings: str = QUIET,
) -> None:
    if "[image_cache]" not in settings:
        settings += kept_within(CACHE_BYTES)

    async def main() -> None:
        async with asyncio.timeout(120), staged(tmp_path, *models, settings=settings) as stage:
            stage.builders.key = key_of
            await scenario(stage)

    asyncio.run(main())


async def submit(stage: Theatre, kind: Kind, model: str, **fields: Any) -> Any:
    which = {"outgoing": (model,)} if kind is Kind.UNLOAD else {"incoming": model}
    intent = Intent(kind, **which, **fields)
    operation = await stage.node.parts.conductor.submit(Request("test"), intent)
    return await stage.node.parts.operations.wait(operation.name, None)


async def load(stage: Theatre, model: str) -> Any:
    return await submit(stage, Kind.LOAD, model, standby=True)


async def unload(stage: Theatre, model: str) -> Any:
    return await submit(stage, Kind.UNLOAD, model, evict=True)


def kept(stage: Theatre) -> list[Path]:
    return sorted((stage.root / "state" / "images").glob("*.image"))


async def saved(stage: Theatre, count: int = 1) -> None:
    """Until so many checkpoints are found by their keys, and nothing is being written."""
    keys = stage.root / "state" / "images"
    await until(lambda: len(list(keys.glob("*.key"))) == count)
    await until(lambda: stage.node.parts.disk._saving is None)


def test_a_second_load_is_read_from_disk_also_after_a_restart(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        first = await load(stage, "prose")
        assert first.failure is None
        await saved(stage)
        digest = stage.node.world.registry["prose@1"].digest
        assert [path.name for path in kept(stage)] == [f"{digest}.image"]
        assert kept(stage)[0].stat().st_mode & 0o077 == 0
        await unload(stage, "prose")
        assert digest not in stage.node.world.store
        second = await load(stage, "prose")
        assert "image cache" in second.message
        assert digest in stage.node.world.store
        assert (stage.builders.builds, stage.builders.restores) == (["prose"], ["prose"])
        await unload(stage, "prose")
        text = await stage.node.metrics()
        assert 'hotbay_image_loads_total{origin="cache"} 1.0' in text
        assert 'hotbay_image_cache_bytes{kind="images"} 1.052672e+06' in text
        assert stage.node.parts.disk.kept_bytes == IMAGE_BYTES
        await stage.kill()
        await stage.start()
        assert (await load(stage, "prose")).failure is None
        assert stage.builders.restores == ["prose", "prose"]
        assert len(stage.builders.saves) == 1

    play(tmp_path, scenario, "prose")


def test_another_key_is_never_served(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        await saved(stage)
        await unload(stage, "prose")
        stage.builders.key = lambda directory: "f" * 64
        await load(stage, "prose")
        await saved(stage, 2)
        assert stage.builders.builds == ["prose", "prose"]
        assert stage.builders.restores == []
        assert len(stage.builders.saves) == 1  # same contents: the same file has a second name
        stage.builders.key = lambda directory: ""
        await unload(stage, "prose")
        await load(stage, "prose")
        assert len(stage.builders.builds) == 3

    play(tmp_path, scenario, "prose")


@pytest.mark.parametrize("damage", ["cut", "altered", "replaced"])
def test_a_damaged_file_is_removed_said_so_and_written_anew(tmp_path: Path, damage: str) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        await saved(stage)
        await unload(stage, "prose")
        path = kept(stage)[0]
        whole = path.read_bytes()
        path.write_bytes(
            {"cut": whole[:5000], "altered": b"\1" + whole[1:], "replaced": b"nonsense"}[damage]
        )
        done = await load(stage, "prose")
        assert done.failure is None
        assert stage.builders.builds == ["prose", "prose"]
        assert any("it was removed" in warning for warning in stage.node.world.warnings)
        await saved(stage)
        assert path.read_bytes() == whole
        assert "hotbay_image_cache_failures_total 1.0" in await stage.node.metrics()

    play(tmp_path, scenario, "prose")


def test_a_load_succeeds_when_its_image_cannot_be_kept(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        assert (await load(stage, "prose")).failure is None
        await until(lambda: stage.node.world.warnings)
        assert "image_cache.budget_bytes = 1000000" in stage.node.world.warnings[0]
        assert kept(stage) == []
        assert "prose@1" in str(stage.node.world.registry.of_digest(digest(stage)))

    def digest(stage: Theatre) -> str:
        return stage.node.world.registry["prose@1"].digest

    play(
        tmp_path,
        scenario,
        "prose",
        settings=QUIET + kept_within(1000000),
    )


def test_a_writer_that_fails_costs_a_warning(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        async def refuse(descriptor: int, path: Path) -> None:
            raise CallRefused("the disk is full", reason="IMAGE_CACHE_FAILED")

        stage.builders.save = refuse  # type: ignore[method-assign]
        assert (await load(stage, "prose")).failure is None
        await until(lambda: stage.node.world.warnings)
        assert "not kept on disk: the disk is full" in stage.node.world.warnings[0]
        image = stage.node.world.store.images()[0]
        await until(lambda: "image cache" not in stage.node.world.store.images()[0].holders)
        assert image.digest in stage.node.world.store

    play(tmp_path, scenario, "prose")


def test_a_reader_that_dies_fails_the_load_and_keeps_the_file(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        await saved(stage)
        await unload(stage, "prose")
        before = stage.node.world.store.used_bytes, len(open_descriptors())

        async def die(*_: object) -> None:
            raise CallRefused("no memory", reason="INSUFFICIENT_HOST_MEMORY")

        stage.builders.restore = die  # type: ignore[method-assign]
        failed = await load(stage, "prose")
        assert failed.failure.reason == "INSUFFICIENT_HOST_MEMORY"
        assert len(kept(stage)) == 1
        assert (stage.node.world.store.used_bytes, len(open_descriptors())) == before
        del stage.builders.restore
        assert (await load(stage, "prose")).failure is None
        assert stage.builders.builds == ["prose"]

    play(tmp_path, scenario, "prose")


def test_memory_that_is_needed_is_not_held_for_the_disk(tmp_path: Path) -> None:
    """The store has room for one image: the second load takes it from the writer of the first."""

    async def scenario(stage: Theatre) -> None:
        stage.builders.pause_save = asyncio.Event()
        await load(stage, "prose")
        await until(lambda: stage.builders.saves)
        stage.model("large", bytes=str((1 << 20) + 4096))
        second = await load(stage, "code")
        assert second.failure is None
        store = stage.node.world.store
        assert [image.digest for image in store.images()] == [
            stage.node.world.registry["code@1"].digest
        ]
        stage.builders.pause_save.set()
        await saved(stage)
        assert len(kept(stage)) == 1  # of the second one

    settings = QUIET + f"[host_store]\nbudget_bytes = {IMAGE_BYTES + 1000}\n"
    play(tmp_path, scenario, "prose", "code", settings=settings)


def test_without_a_budget_nothing_is_written(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await load(stage, "prose")
        await unload(stage, "prose")
        await load(stage, "prose")
        assert stage.builders.builds == ["prose", "prose"]
        assert not (stage.root / "state" / "images").exists()

    play(
        tmp_path,
        scenario,
        "prose",
        settings=QUIET + kept_within(0),
    )


def test_a_directory_that_cannot_be_used_costs_a_warning(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        assert "image_cache.directory" in stage.node.world.warnings[0]
        assert (await load(stage, "prose")).failure is None
        assert (await load(stage, "prose")).failure is None

    (tmp_path / "file").write_text("")
    table = kept_within(CACHE_BYTES) + f'directory = "{tmp_path}/file/images"\n'
    play(tmp_path, scenario, "prose", settings=QUIET + table)


def test_no_more_loads_than_allowed_run_at_once_and_the_others_in_turn(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.builders.pause = asyncio.Event()
        names = ["a", "b", "c", "d"]
        loads = []
        for name in names:
            loads.append(asyncio.create_task(load(stage, name)))
            await asyncio.sleep(0)
        await until(lambda: len(stage.builders.builds) == 2)
        reserved = stage.node.world.store.reserved_bytes
        assert reserved == 2 * IMAGE_BYTES  # those that wait hold nothing
        # A call that is cancelled before its operation is written down begins nothing.
        begun = stage.node.parts.operations._all
        await until(lambda: sum(live.durable.is_set() for live in begun.values()) == 4)
        loads[2].cancel()  # the caller's patience; the operation goes on
        stage.builders.pause.set()
        done = await asyncio.gather(*loads, return_exceptions=True)
        await until(lambda: len(stage.builders.builds) == 4)
        assert stage.builders.builds == names
        assert all(each.failure is None for each in (done[0], done[1], done[3]))

    play(tmp_path, scenario, "a", "b", "c", "d", settings=QUIET + "[limits]\nbuilds_max = 2\n")


# Pins.


async def pin(stage: Theatre, model: str, pinned: bool, **fields: Any) -> model_pb2.Model:
    request = model_pb2.PinModelRequest(model=model, pinned=pinned, **fields)
    socket = stage.root / "run" / "control.sock"
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        return await model_pb2_grpc.ModelServiceStub(channel).PinModel(request)


def test_a_pinned_image_is_never_evicted_also_after_a_restart(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        answer = await pin(stage, "prose", True, request_id="one")
        assert answer.pinned
        assert answer.versions[0].pinned
        await load(stage, "prose")
        registry, store = stage.node.world.registry, stage.node.world.store
        assert [image.pinned for image in store.images()] == [True]
        await stage.kill()
        await stage.start()
        registry, store = stage.node.world.registry, stage.node.world.store
        assert registry["prose@1"].pinned
        assert [image.pinned for image in store.images()] == [True]
        refused = await load_refused(stage, "code")
        assert refused == "INSUFFICIENT_HOST_MEMORY"
        kept_on = await unload(stage, "prose")
        assert kept_on.failure.reason == "IMAGE_IN_USE"
        assert "pin" in kept_on.failure.message
        again = await pin(stage, "prose", True, request_id="one")
        assert again.pinned
        assert not (await pin(stage, "prose", False)).pinned
        assert (await load(stage, "code")).failure is None
        assert store.images()[0].digest == registry["code@1"].digest

    settings = QUIET + f"[host_store]\nbudget_bytes = {IMAGE_BYTES + 1000}\n"
    play(tmp_path, scenario, "prose", "code", settings=settings)


async def load_refused(stage: Theatre, model: str) -> str:
    try:
        done = await load(stage, model)
    except Exception as error:
        return error.reason  # type: ignore[attr-defined, no-any-return]
    return done.failure.reason


def test_a_pin_outlives_a_changed_checkpoint_and_asking_changes_nothing(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        asked = await pin(stage, "prose", True, validate_only=True)
        assert not asked.pinned
        await pin(stage, "prose@1", True)
        await stage.kill()
        (stage.repository / "prose" / "1" / "config.json").write_text('{"new": 1}')
        await stage.start()
        assert stage.node.world.registry["prose@1"].pinned
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pin(stage, "prosa", True)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND

    play(tmp_path, scenario, "prose")


def test_what_is_built_as_fast_as_it_is_read_is_not_written_unless_asked(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        assert stage.node.parts.disk.budget_bytes == 64 << 30
        assert (await load(stage, "prose")).failure is None
        assert stage.node.parts.disk._wanted == {}
        digest = stage.node.world.registry["prose@1"].digest
        manifest = stage.node.world.store.manifest(digest)
        packed = msgspec.structs.replace(manifest, piece_weights=4096)
        stage.node.world.store._images[digest].manifest = packed
        stage.node.parts.disk.save_soon(key_of(tmp_path), digest)
        await until(lambda: stage.builders.saves)
        assert stage.builders.saves[0].name == f"{digest}.image"

    play(tmp_path, scenario, "prose", settings=QUIET + "[image_cache]\n")
