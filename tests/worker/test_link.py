"""The links at their edges: peers that stop reading, vanish, or send what they should not."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct

import msgspec
import pytest

from engine.link import control
from engine.link.errors import CallTimedOut, FrameInvalid, LinkClosed
from engine.link.frames import DESCRIPTORS_PER_FRAME_MAX, OUTBOX_BYTES_HIGH, Link
from engine.link.peer import Peer
from tests.support.descriptors import open_descriptors


def frame(message: object, announced: int = 0) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return struct.pack("<IB", len(payload), announced) + payload


def send_with_descriptors(sock: socket.socket, data: bytes, count: int) -> None:
    descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    rights = array.array("i", descriptors)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_message_and_its_descriptors_arrive_together() -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        sender, receiver = Link(here, control.Done, name="a"), Link(there, control.Done, name="b")
        read_end, write_end = os.pipe()
        for number in range(1, 4):
            sender.post(control.Done(number), (write_end,) * number)
        os.close(write_end)
        for number in range(1, 4):
            message, descriptors = await receiver.receive()
            assert message == control.Done(number)
            assert len(descriptors) == number
            for descriptor in descriptors:
                os.close(descriptor)
        # All copies of the writing end are closed, so the pipe is at its end.
        assert os.read(read_end, 1) == b""
        os.close(read_end)
        sender.close()
        receiver.close()

    asyncio.run(run())


def test_sending_a_large_message_to_a_vanished_peer_never_hangs() -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        link = Link(here, control.Done, name="peer")
        there.close()
        large = control.Failed(call=1, reason="X", message="x" * (OUTBOX_BYTES_HIGH * 2))
        link.post(large)
        with pytest.raises(LinkClosed):
            await asyncio.wait_for(link.send(control.Done(1)), 60)

    asyncio.run(run())


def test_a_frame_that_lacks_its_descriptors_closes_the_link_and_leaks_none() -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        before = len(open_descriptors())
        link = Link(here, control.Done, name="peer")
        send_with_descriptors(there, frame(control.Done(1), announced=3), 2)
        with pytest.raises(FrameInvalid, match="did not send"):
            await asyncio.wait_for(link.receive(), 60)
        # The link's own end is closed, and nothing it received is still open.
        assert len(open_descriptors()) == before - 1
        there.close()

    asyncio.run(run())


def test_descriptors_nobody_announced_are_bounded() -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        link = Link(here, control.Done, name="peer")
        before = len(open_descriptors())
        for _ in range(2):
            send_with_descriptors(there, frame(control.Done(1)), DESCRIPTORS_PER_FRAME_MAX)
        for _ in range(2):
            assert (await asyncio.wait_for(link.receive(), 60))[0] == control.Done(1)
        with pytest.raises(FrameInvalid, match="did not announce"):
            await asyncio.wait_for(link.receive(), 60)
        assert len(open_descriptors()) == before - 1
        there.close()

    asyncio.run(run())


def test_a_call_to_a_peer_that_stopped_reading_times_out() -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        closed: list[Exception] = []

        async def handle(message: object, descriptors: list[int]) -> None:
            raise AssertionError(message)

        peer: Peer[object] = Peer(
            here,
            control.FromWorker,
            name="worker",
            replies=(control.Done,),
            handler=handle,
            on_close=closed.append,
        )
        for _ in range(4):
            peer.post(control.Failed(call=0, reason="X", message="x" * OUTBOX_BYTES_HIGH))
        with pytest.raises(CallTimedOut):
            await asyncio.wait_for(peer.call(control.Describe(), timeout_s=0.05), 60)
        await peer.close()
        there.close()

    asyncio.run(run())


def test_a_reply_without_a_number_is_an_event() -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        events: asyncio.Queue[object] = asyncio.Queue()

        async def handle(message: object, descriptors: list[int]) -> None:
            events.put_nowait(message)

        peer: Peer[object] = Peer(
            here,
            control.FromWorker,
            name="worker",
            replies=(control.Done,),
            handler=handle,
            on_close=lambda error: None,
        )
        there.sendall(frame(control.Done(0)))
        assert await asyncio.wait_for(events.get(), 60) == control.Done(0)
        await peer.close()
        there.close()

    asyncio.run(run())
