"""The image builder as it touches memory: a real process over its real socket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from engine.link.build import Build, Built, Failed, Inspect, Inspected, Touch, Touched
from swap.segment import Segment
from tests.engine.test_builder import Session, builder

TEST_S = 120.0
EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "prose" / "1"


def run(scenario: Callable[[Session], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(TEST_S), builder() as session:
            await scenario(session)

    asyncio.run(main())


def present_bytes(segment: Segment) -> int:
    return os.fstat(segment.descriptor).st_blocks * 512


def test_touched_memory_becomes_an_image() -> None:
    async def scenario(session: Session) -> None:
        inspected = await session.call(Inspect(str(EXAMPLE)))
        assert isinstance(inspected, Inspected)
        with Segment.create(inspected.segment_bytes, "touched") as segment:
            assert present_bytes(segment) == 0
            touched = await session.call(Touch(threads=2), segment.descriptor)
            assert isinstance(touched, Touched)
            assert present_bytes(segment) >= segment.size_bytes
            built = await session.call(Build(), segment.descriptor)
            assert isinstance(built, Built)
            assert segment.sealed

    run(scenario)


def test_what_cannot_be_touched_is_refused_with_a_reason() -> None:
    async def scenario(session: Session) -> None:
        with Segment.create(1 << 20, "a") as segment, Segment.create(1 << 20, "b") as sealed:
            sealed.seal()
            for request, descriptors, reason in (
                (Touch(), (), "BUILD_REFUSED"),
                (Touch(threads=0), (segment.descriptor,), "BUILD_REFUSED"),
                (Touch(), (sealed.descriptor,), "BUILD_REFUSED"),
            ):
                answer = await session.call(request, *descriptors)
                assert isinstance(answer, Failed)
                assert answer.reason == reason
            os.ftruncate(segment.descriptor, 0)
            answer = await session.call(Touch(), segment.descriptor)
            assert isinstance(answer, Touched)  # nothing is there to be touched

    run(scenario)


def test_memory_that_is_taken_back_meanwhile_is_free_at_once() -> None:
    async def scenario(session: Session) -> None:
        with Segment.create(256 << 20, "large") as segment:
            touching = asyncio.create_task(session.call(Touch(threads=1), segment.descriptor))
            while not present_bytes(segment):  # noqa: ASYNC110 (another process touches)
                await asyncio.sleep(0.001)
            os.ftruncate(segment.descriptor, 0)
            answer = await touching
            assert isinstance(answer, Failed)
            assert answer.reason == "INSUFFICIENT_HOST_MEMORY"
            assert present_bytes(segment) == 0

    run(scenario)
