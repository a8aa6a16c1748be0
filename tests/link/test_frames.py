"""Frames over real sockets: partial reads, descriptors, back-pressure, garbage, closing."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import uvloop

from engine.link import frames
from engine.link.errors import FrameInvalid, LinkClosed, LinkCongested, LinkError
from engine.link.frames import Link
from tests.support.descriptors import open_descriptors


class Text(msgspec.Struct, frozen=True, tag=True):
    text: str


class Number(msgspec.Struct, frozen=True, tag=True):
    number: int


Messages = Text | Number
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    """Run a coroutine function on either event loop; leaked descriptors are an error."""

    def go(main: Callable[[], Awaitable[Any]]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(120):
                return await main()

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.get_loop()
            before = open_descriptors()
            result = runner.run(bounded())
            after = open_descriptors()
            assert len(after) <= len(before), f"descriptors leaked: {after - before}"
            return result

    return go


def pair() -> tuple[Link[Messages], Link[Messages]]:
    ours, theirs = socket.socketpair()
    return Link(ours, Messages, name="left"), Link(theirs, Messages, name="right")


def raw_pair() -> tuple[Link[Messages], socket.socket]:
    ours, theirs = socket.socketpair()
    return Link(ours, Messages, name="peer"), theirs


def frame(message: Messages, descriptors: int = 0) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return struct.pack("<IB", len(payload), descriptors) + payload


def test_messages_arrive_whole_and_in_order(run: Any) -> None:
    async def main() -> None:
        left, right = pair()
        sent: list[Messages] = [Text("a" * size) for size in (0, 1, 70_000, 3_000_000)]
        sent += [Number(n) for n in range(3000)]

        async def send() -> None:
            for message in sent:
                await left.send(message)

        task = asyncio.create_task(send())
        assert [(await right.receive())[0] for _ in sent] == sent
        await task
        left.close()
        right.close()

    run(main)


def test_a_frame_may_come_byte_by_byte(run: Any) -> None:
    async def main() -> None:
        link, theirs = raw_pair()
        for byte in frame(Text("slow")) + frame(Number(7)):
            theirs.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await link.receive())[0] == Text("slow")
        assert (await link.receive())[0] == Number(7)
        theirs.close()
        link.close()

    run(main)


def test_descriptors_come_with_their_own_frame(run: Any) -> None:
    async def main() -> None:
        left, right = pair()
        files = [os.memfd_create(f"file{n}") for n in range(5)]
        for place, file in enumerate(files):
            os.write(file, b"%d" % place)
        # Large frames between them, so that descriptors and bytes travel in many pieces.
        plan = [(files[0],), (), (files[1], files[2]), (), (files[3], files[4])]

        async def send() -> None:
            for place, descriptors in enumerate(plan):
                await left.send(Text(str(place) * 400_000), descriptors)
            for file in files:
                os.close(file)  # the link has its own

        task = asyncio.create_task(send())
        contents = []
        for place in range(len(plan)):
            message, descriptors = await right.receive()
            assert message == Text(str(place) * 400_000)
            contents.append([os.pread(descriptor, 9, 0) for descriptor in descriptors])
            for descriptor in descriptors:
                assert not os.get_inheritable(descriptor)
                os.close(descriptor)
        assert contents == [[b"0"], [], [b"1", b"2"], [], [b"3", b"4"]]
        await task
        left.close()
        right.close()

    run(main)


def test_closing_with_descriptors_on_the_way_leaks_none(run: Any) -> None:
    async def main() -> None:
        for closer in ("sender", "receiver"):
            left, right = pair()
            file = os.memfd_create("file")
            for _ in range(40):  # some sent, some still queued
                left.post(Text("x" * 100_000), (file,))
            os.close(file)
            _, descriptors = await right.receive()
            os.close(descriptors[0])
            (left if closer == "sender" else right).close()
            (right if closer == "sender" else left).close()

    run(main)


def test_a_slow_peer_makes_send_wait_and_post_fail(run: Any) -> None:
    async def main() -> None:
        link, theirs = raw_pair()
        megabyte = Text("x" * (1 << 20))
        count = 0
        with contextlib.suppress(LinkCongested):
            while True:
                link.post(megabyte)
                count += 1
        with pytest.raises(LinkCongested, match="peer does not read"):
            link.post(megabyte)
        assert count * (1 << 20) <= frames.OUTBOX_BYTES_MAX + (1 << 20)
        waiting = [asyncio.create_task(link.send(Number(n))) for n in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        received = 0
        while not all(task.done() for task in waiting):
            received += len(await loop.sock_recv(theirs, 1 << 20))
        assert received > count * (1 << 20) - frames.OUTBOX_BYTES_HIGH - (1 << 20)
        await asyncio.gather(*waiting)
        link.close()
        theirs.close()

    run(main)


def test_a_full_inbox_stops_reading_and_goes_on_later(run: Any) -> None:
    async def main() -> None:
        left, right = pair()
        total = 20_000
        sent = 0

        async def send() -> None:
            nonlocal sent
            for number in range(total):
                await left.send(Text(str(number) + "x" * 500))
                sent += 1

        task = asyncio.create_task(send())
        for _ in range(200):
            await asyncio.sleep(0)
        # What is on the way is bounded by the inbox, both sockets' buffers and the outbox.
        assert sent < total
        for number in range(total):
            message, _ = await right.receive()
            assert isinstance(message, Text)
            assert message.text.startswith(str(number))
        await task
        left.close()
        right.close()

    run(main)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<IB", frames.FRAME_BYTES_MAX + 1, 0),
        struct.pack("<IB", 4, frames.DESCRIPTORS_PER_FRAME_MAX + 1),
        struct.pack("<IB", 3, 0) + b"abc",
        struct.pack("<IB", 0, 0),
        frame(Text("x"), descriptors=1),
        struct.pack("<IB", 20, 0) + b"\x82\xa4type\xa4Text\xa4text\xa3\xff\xfe\xfd",
        struct.pack("<IB", 200_013, 0) + b"\x83\xa4type\xa4Text\xa1b" + b"\x91" * 200_000,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["long", "descriptors", "no-msgpack", "empty", "absent", "utf8", "nested", "http"],
)
def test_garbage_closes_the_link_after_what_was_sound(run: Any, data: bytes) -> None:
    async def main() -> None:
        link, theirs = raw_pair()
        theirs.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(theirs, frame(Number(1)) + data)
        assert (await link.receive())[0] == Number(1)
        with pytest.raises(FrameInvalid, match="peer"):
            await link.receive()
        assert link.closed
        with pytest.raises(LinkClosed):
            link.post(Number(2))
        link.close()
        theirs.close()

    run(main)


def test_descriptors_nobody_announced_close_the_link(run: Any) -> None:
    async def main() -> None:
        link, theirs = raw_pair()
        file = os.memfd_create("file")
        many = array.array("i", [file] * 40)
        for _ in range(2):
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)]
            theirs.sendmsg([frame(Number(1))], ancillary)
        for _ in range(2):
            await link.receive()
        with pytest.raises(FrameInvalid, match="did not announce"):
            await link.receive()
        os.close(file)
        link.close()
        theirs.close()

    run(main)


def test_what_had_arrived_is_taken_before_the_end_is_told(run: Any) -> None:
    async def main() -> None:
        left, right = pair()
        for number in range(5):
            left.post(Number(number))
        left.close()
        assert [(await right.receive())[0] for _ in range(5)] == [Number(n) for n in range(5)]
        for _ in range(2):
            with pytest.raises(LinkClosed, match="closed the link"):
                await right.receive()
        right.close()

    run(main)


def test_closing_wakes_whoever_waits(run: Any) -> None:
    async def main() -> None:
        link, theirs = raw_pair()
        receiving = asyncio.create_task(link.receive())
        for _ in range(4):
            link.post(Text("x" * (1 << 20)))
        sending = asyncio.create_task(link.send(Number(1)))
        await asyncio.sleep(0)
        link.close()
        link.close()  # idempotent
        for task in (receiving, sending):
            with pytest.raises(LinkError):
                await task
        theirs.close()

    run(main)


def test_what_is_too_large_is_refused_and_the_link_lives(run: Any) -> None:
    async def main() -> None:
        left, right = pair()
        with pytest.raises(FrameInvalid, match="over the limit"):
            left.post(Text("x" * frames.FRAME_BYTES_MAX))
        with pytest.raises(FrameInvalid, match="descriptors"):
            left.post(Number(1), tuple([0] * (frames.DESCRIPTORS_PER_FRAME_MAX + 1)))
        left.post(Number(2))
        assert (await right.receive())[0] == Number(2)
        left.close()
        right.close()

    run(main)
