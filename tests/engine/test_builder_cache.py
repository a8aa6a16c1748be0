"""The image builder and images on disk: a real process, killed and lied to."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.builder import inspect
from engine.link.build import Build, BuildProgress, Inspect, Inspected, Restore, Restored, Save
from engine.link.errors import LinkError
from swap.cached_image import PARTIAL_SUFFIX, PIECE_BYTES, save_image
from swap.identity import SETTLE_S
from swap.image import TensorRecipe, complete, plan_image, read_manifest, segment_bytes
from swap.segment import Segment
from swap.writing import write_manifest
from tests.engine.test_builder import Session, builder, hollow_checkpoint

TEST_S = 120.0
EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "prose" / "1"


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of a checkpoint, each for one test to change, old enough to be trusted."""
    root = tmp_path_factory.mktemp("settled")
    for name in ("plain", "changed", "replaced", "unreadable"):
        shutil.copytree(EXAMPLE, root / name)
    newest = max(path.stat().st_ctime for path in root.rglob("*"))
    while time.time() < newest + SETTLE_S:
        time.sleep(0.05)  # the file system's clock cannot be set
    return root


def run(scenario: Callable[[Session], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(TEST_S), builder() as session:
            await scenario(session)

    asyncio.run(main())


def flip(path: Path, offset: int) -> None:
    """Alter one byte in place."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 255]))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def built(session: Session, directory: Path) -> tuple[Inspected, Segment, Any]:
    inspected = await session.call(Inspect(str(directory)))
    segment = Segment.create(inspected.segment_bytes, "test")
    return inspected, segment, await session.call(Build(), segment.descriptor)


def test_an_image_is_kept_and_read_back_by_another_process(settled: Path, tmp_path: Path) -> None:
    file = tmp_path / "an.image"

    async def keep(session: Session) -> None:
        inspected, segment, done = await built(session, settled / "plain")
        with segment:
            assert done.key == inspected.key
            await session.call(Save(str(file)), segment.descriptor)
            assert file.stat().st_size == segment.size_bytes
        digests.append(done.digest)

    async def back(session: Session) -> None:
        inspected = await session.call(Inspect(str(settled / "plain")))
        with Segment.create(inspected.segment_bytes, "back") as segment:
            request = Restore(str(file), digests[0])
            assert isinstance(await session.call(request, segment.descriptor), Restored)
            assert segment.sealed
            assert read_manifest(segment.descriptor).digest == digests[0]
            with segment.map() as mapping:
                assert bytes(mapping.view()) == file.read_bytes()
        last = session.progress[-1]
        assert last == BuildProgress(last.bytes_total, last.bytes_total)

    digests: list[str] = []
    run(keep)
    run(back)


def test_a_damaged_file_is_refused_and_the_checkpoint_built_after_all(
    settled: Path, tmp_path: Path
) -> None:
    file = tmp_path / "an.image"

    async def scenario(session: Session) -> None:
        _, segment, done = await built(session, settled / "plain")
        with segment:
            await session.call(Save(str(file)), segment.descriptor)
        flip(file, 5000)
        before = session.open_files()
        with Segment.create(segment.size_bytes, "again") as again:
            failed = await session.call(Restore(str(file), done.digest), again.descriptor)
            assert failed.reason == "CORRUPT_WEIGHTS"
            assert not again.sealed
        with Segment.create(segment.size_bytes, "fresh") as fresh:
            assert (await session.call(Build(), fresh.descriptor)).digest == done.digest
        gone = await _restore(session, segment.size_bytes, tmp_path / "gone", done.digest)
        assert gone.reason == "IMAGE_CACHE_FAILED"
        assert session.open_files() == before

    run(scenario)


async def _restore(session: Session, size_bytes: int, path: Path, digest: str) -> Any:
    with Segment.create(size_bytes, "x") as segment:
        return await session.call(Restore(str(path), digest), segment.descriptor)


@pytest.mark.parametrize("how", ["changed", "replaced"])
def test_a_changed_checkpoint_never_has_the_key_of_before(settled: Path, how: str) -> None:
    """Changed in place with its times put back, or replaced by one of the same size and times."""
    directory = settled / how
    file = directory / "model.safetensors"

    async def before(session: Session) -> None:
        found.append((await session.call(Inspect(str(directory)))).key)

    async def after(session: Session) -> None:
        inspected, segment, done = await built(session, directory)
        segment.close()
        assert inspected.key != found[0]
        assert done.key == ""  # it changed a moment ago: a further change might not show
        assert done.digest

    found: list[str] = []
    run(before)
    status = file.stat()
    if how == "replaced":
        shutil.copy2(file, directory / "other")
        os.replace(directory / "other", file)
    else:
        flip(file, status.st_size - 1)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    run(after)


def test_a_checkpoint_changed_during_its_build_is_not_kept(settled: Path) -> None:
    directory = settled / "unreadable"

    async def scenario(session: Session) -> None:
        inspected = await session.call(Inspect(str(directory)))
        os.chmod(directory / "model.safetensors", 0o600)  # a change of state is enough
        with Segment.create(inspected.segment_bytes, "test") as segment:
            done = await session.call(Build(), segment.descriptor)
            assert done.digest
            assert done.key == ""

    run(scenario)


def test_a_checkpoint_that_is_gone_is_not_served_from_disk(settled: Path, tmp_path: Path) -> None:
    async def scenario(session: Session) -> None:
        shutil.copytree(settled / "plain", tmp_path / "gone")
        (tmp_path / "gone" / "model.safetensors").unlink()
        assert (await session.call(Inspect(str(tmp_path / "gone")))).reason == "CHECKPOINT_INVALID"
        failed = await _restore(session, 4096, tmp_path / "x", "0" * 64)
        assert failed.reason == "BUILD_REFUSED"  # nothing was inspected

    run(scenario)


def test_only_sealed_segments_and_sensible_threads_are_taken(settled: Path, tmp_path: Path) -> None:
    async def scenario(session: Session) -> None:
        inspected = await session.call(Inspect(str(settled / "plain")))
        with Segment.create(inspected.segment_bytes, "open") as segment:
            replies = [
                await session.call(Save(str(tmp_path / "x")), segment.descriptor),
                await session.call(Save(str(tmp_path / "x"))),
                await session.call(Build(threads=0), segment.descriptor),
                await session.call(Restore("x", "y", threads=1000), segment.descriptor),
            ]
        assert [reply.reason for reply in replies] == ["BUILD_REFUSED"] * 4
        assert names(tmp_path) == []

    run(scenario)


def large_image() -> Segment:
    """256 MiB that nobody wrote to: enough to be in the middle of."""
    layout = plan_image([TensorRecipe("w", 0, (), (64 << 20,))], "float32", {})
    segment = Segment.create(segment_bytes(layout), "large")
    write_manifest(segment.descriptor, complete(layout, {"w": "0" * 32}))
    segment.seal()
    return segment


@pytest.mark.parametrize("end", ["kill", "hang up"])
def test_a_writer_that_ends_in_the_middle_leaves_no_image(tmp_path: Path, end: str) -> None:
    file = tmp_path / "large.image"
    partial = f"{file.name}{PARTIAL_SUFFIX}"

    async def main() -> None:
        async with asyncio.timeout(TEST_S):
            context = builder()
            session = await context.__aenter__()
            with large_image() as segment:
                saving = asyncio.create_task(session.call(Save(str(file)), segment.descriptor))
                while not names(tmp_path):  # noqa: ASYNC110 (another process makes it)
                    await asyncio.sleep(0.001)
                if end == "kill":
                    session.process.send_signal(signal.SIGKILL)
                else:
                    await session.peer.close()
                with pytest.raises(LinkError):
                    await saving
                assert await session.wait() == (-signal.SIGKILL if end == "kill" else 0)
                assert names(tmp_path) == ([partial] if end == "kill" else [])
                # The next writer is not held up by what is left.
                save_image(segment, file)
            assert names(tmp_path) == ["large.image"]

    asyncio.run(main())


def test_a_reader_that_is_killed_in_the_middle_leaves_no_image(tmp_path: Path) -> None:
    """A checkpoint and an image of 256 MiB, both of them holes in their files."""
    directory, file = tmp_path / "model", tmp_path / "large.image"
    directory.mkdir()
    hollow_checkpoint(directory)
    inspection = inspect(str(directory), "bfloat16")
    inspection.checkpoint.close()
    checksums = {entry.name: "0" * 32 for entry in inspection.layout.tensors}
    manifest = complete(inspection.layout, checksums)
    with open(file, "xb") as stream:
        stream.truncate(segment_bytes(inspection.layout))
        write_manifest(stream.fileno(), manifest)

    async def main() -> None:
        async with asyncio.timeout(TEST_S):
            context = builder()
            session = await context.__aenter__()
            inspected = await session.call(Inspect(str(directory), "bfloat16"))
            with Segment.create(inspected.segment_bytes, "x") as target:
                request = Restore(str(file), manifest.digest)
                reading = asyncio.create_task(session.call(request, target.descriptor))
                await session.told.wait()
                session.process.send_signal(signal.SIGKILL)
                with pytest.raises(LinkError):
                    await reading
                assert not target.sealed
            assert await session.wait() == -signal.SIGKILL
            assert len(session.progress) < segment_bytes(inspection.layout) // PIECE_BYTES

    asyncio.run(main())
