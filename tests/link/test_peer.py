"""Calls and replies over a real link: pairing, deadlines, events in between, closing."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from engine.link.errors import CallTimedOut, LinkClosed, LinkError
from engine.link.peer import Peer
from tests.support.descriptors import open_descriptors


class Ask(msgspec.Struct, frozen=True, tag=True):
    what: str
    call: int = 0


class Answer(msgspec.Struct, frozen=True, tag=True):
    call: int
    what: str


class Event(msgspec.Struct, frozen=True, tag=True):
    what: str


Everything = Ask | Answer | Event


class Ends:
    """Two peers on one socket pair; `handle` is the right one's."""

    def __init__(self, handle: Callable[[Any, Any, list[int]], Awaitable[None]]) -> None:
        ours, theirs = socket.socketpair()
        self.events: list[Any] = []
        self.closes: list[LinkError] = []
        self.right_closes: list[LinkError] = []

        async def note(message: Any, descriptors: list[int]) -> None:
            self.events.append(message)

        async def right(message: Any, descriptors: list[int]) -> None:
            await handle(self.right, message, descriptors)

        self.left: Peer[Any] = Peer(
            ours,
            Everything,
            name="right",
            replies=(Answer,),
            handler=note,
            on_close=self.closes.append,
        )
        self.right: Peer[Any] = Peer(
            theirs,
            Everything,
            name="left",
            replies=(Answer,),
            handler=right,
            on_close=self.right_closes.append,
        )

    async def close(self) -> None:
        await self.left.close()
        await self.right.close()


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run with a bound, and with no descriptor left behind."""

    async def bounded() -> None:
        async with asyncio.timeout(120):
            await main()

    with asyncio.Runner() as runner:
        runner.get_loop()
        before = len(open_descriptors())
        runner.run(bounded())
        assert len(open_descriptors()) <= before


def test_replies_find_their_calls_in_any_order() -> None:
    async def main() -> None:
        asked: list[Ask] = []

        async def handle(peer: Any, message: Any, _: list[int]) -> None:
            asked.append(message)
            if len(asked) == 5:
                for question in reversed(asked):
                    peer.post(Event("in between"))
                    peer.post(Answer(question.call, question.what.upper()))

        ends = Ends(handle)
        answers = await asyncio.gather(*(ends.left.call(Ask(c), timeout_s=60) for c in "abcde"))
        assert [answer.what for answer, _ in answers] == list("ABCDE")
        assert len(ends.events) == 5
        assert len({question.call for question in asked}) == 5
        await ends.close()

    run(main)


def test_both_ends_may_call_at_once() -> None:
    async def main() -> None:
        async def handle(peer: Any, message: Any, _: list[int]) -> None:
            peer.post(Answer(message.call, "right"))

        ends = Ends(handle)
        asked = asyncio.create_task(ends.right.call(Ask("x"), timeout_s=60))
        assert (await ends.left.call(Ask("y"), timeout_s=60))[0].what == "right"
        # The other end's question was sent first, and so it is here before the answer.
        ends.left.post(Answer(ends.events[0].call, "left"))
        assert (await asked)[0].what == "left"
        await ends.close()

    run(main)


def test_a_reply_brings_its_descriptors() -> None:
    async def main() -> None:
        async def handle(peer: Any, message: Any, descriptors: list[int]) -> None:
            peer.post(Answer(message.call, "here"), tuple(descriptors))
            for descriptor in descriptors:
                os.close(descriptor)

        ends = Ends(handle)
        file = os.memfd_create("file")
        _, (back,) = await ends.left.call(Ask("x"), (file,), timeout_s=60)
        assert os.fstat(back).st_ino == os.fstat(file).st_ino
        os.close(back)
        os.close(file)
        await ends.close()

    run(main)


def test_a_call_without_an_answer_times_out_and_a_late_answer_is_dropped() -> None:
    async def main() -> None:
        asked: list[Ask] = []

        async def handle(peer: Any, message: Any, _: list[int]) -> None:
            asked.append(message)
            if message.what == "again":
                file = os.memfd_create("late")
                peer.post(Answer(asked[0].call, "late"), (file,))
                os.close(file)
                peer.post(Answer(message.call, "now"))

        ends = Ends(handle)
        with pytest.raises(CallTimedOut, match=r"right did not answer Ask within 0\.05 s"):
            await ends.left.call(Ask("first"), timeout_s=0.05)
        assert (await ends.left.call(Ask("again"), timeout_s=60))[0].what == "now"
        await ends.close()

    run(main)


def test_the_deadline_holds_when_the_peer_has_stopped_reading() -> None:
    async def main() -> None:
        reading = asyncio.Event()

        async def handle(peer: Any, message: Any, _: list[int]) -> None:
            await reading.wait()  # nothing further is read meanwhile

        ends = Ends(handle)
        for _ in range(4):
            ends.left.post(Event("x" * (1 << 20)))
        with pytest.raises(CallTimedOut):
            await ends.left.call(Ask("x"), timeout_s=0.05)
        reading.set()
        await ends.close()

    run(main)


@pytest.mark.parametrize("closer", ["here", "there"])
def test_calls_that_wait_end_when_the_link_does(closer: str) -> None:
    async def main() -> None:
        asked = asyncio.Event()

        async def handle(peer: Any, message: Any, _: list[int]) -> None:
            asked.set()

        ends = Ends(handle)
        call = asyncio.create_task(ends.left.call(Ask("x"), timeout_s=60))
        await asked.wait()
        await (ends.left if closer == "here" else ends.right).close()
        with pytest.raises(LinkClosed, match="right"):
            await call
        assert ends.left.closed
        assert len(ends.closes) == (closer == "there")  # told once, and not of one's own doing
        with pytest.raises(LinkClosed):
            await ends.left.call(Ask("y"), timeout_s=60)
        await ends.close()
        await ends.close()  # idempotent

    run(main)


def test_a_handlers_bug_ends_the_link_loudly() -> None:
    async def main() -> None:
        async def handle(peer: Any, message: Any, _: list[int]) -> None:
            raise ZeroDivisionError("a bug")

        ends = Ends(handle)
        with pytest.raises(LinkClosed):
            await ends.left.call(Ask("x"), timeout_s=60)
        assert "ZeroDivisionError" in str(ends.right_closes[0])
        await ends.close()

    run(main)
