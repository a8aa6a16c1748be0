"""Framed messages and file descriptors over a Unix stream socket.

A frame is a little-endian u32 payload length, a u8 descriptor count, and a msgpack payload (a
tagged msgspec struct). Descriptors travel as SCM_RIGHTS with the first byte of their frame. The
module owns buffering and back-pressure and nothing else; it never interprets a message. Invariant:
memory held for a peer is bounded both ways, by OUTBOX_BYTES_MAX and INBOX_FRAMES_MAX: a full inbox
stops reading, which fills the socket, which makes the peer's `send` wait.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from typing import Any, Generic, TypeVar

import msgspec

from engine.link.errors import FrameInvalid, LinkClosed, LinkCongested

FRAME_BYTES_MAX = 16 << 20
OUTBOX_BYTES_MAX = 32 << 20
OUTBOX_BYTES_HIGH = 1 << 20
INBOX_FRAMES_MAX = 1024
DESCRIPTORS_PER_FRAME_MAX = 64
READ_BYTES = 1 << 16
"""A larger buffer is mapped and unmapped for every read, which costs several times the read."""

_HEADER = struct.Struct("<IB")

Message = TypeVar("Message")


class Link(Generic[Message]):
    """One end of a link, on a running event loop.

    `sock` is a connected Unix stream socket (made non-blocking and owned by the link); `message` is
    the union of structs that may arrive. Not thread-safe: other threads use
    `loop.call_soon_threadsafe(link.post, message)`.
    """

    def __init__(self, sock: socket.socket, message: Any, *, name: str) -> None:
        sock.setblocking(False)
        self.name = name
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(message)
        self._encoder = msgspec.msgpack.Encoder()
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._outbox_bytes = 0
        self._drained = asyncio.Event()
        self._drained.set()
        self._inbox: deque[tuple[Message, list[int]]] = deque()
        self._arrived = asyncio.Event()
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()
        self._error: Exception | None = None
        self._reading = False
        self._writing = False
        self._resume_reading()

    @property
    def closed(self) -> bool:
        return self._error is not None

    def fileno(self) -> int:
        return self._sock.fileno()

    # Sending.

    def post(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Queue a message without waiting; descriptors are duplicated, the caller keeps its own.

        Raises LinkClosed, LinkCongested (more than OUTBOX_BYTES_MAX unsent) or FrameInvalid.
        """
        if self._error is not None:
            raise LinkClosed(f"link to {self.name} is closed: {self._error}")
        payload = self._encoder.encode(message)
        if len(payload) > FRAME_BYTES_MAX or len(descriptors) > DESCRIPTORS_PER_FRAME_MAX:
            raise FrameInvalid(
                f"a {type(message).__name__} of {len(payload)} bytes and {len(descriptors)} "
                f"descriptors is over the limit of {FRAME_BYTES_MAX} bytes and "
                f"{DESCRIPTORS_PER_FRAME_MAX} descriptors a frame"
            )
        if self._outbox_bytes + len(payload) > OUTBOX_BYTES_MAX:
            raise LinkCongested(f"{self.name} does not read: {self._outbox_bytes} bytes unsent")
        frame = _HEADER.pack(len(payload), len(descriptors)) + payload
        self._outbox.append((memoryview(frame), tuple(os.dup(fd) for fd in descriptors)))
        self._outbox_bytes += len(frame)
        if not self._writing:
            self._flush()
        if self._outbox_bytes > OUTBOX_BYTES_HIGH and self._error is None:
            self._drained.clear()

    async def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Queue a message, first waiting while the peer is slow (OUTBOX_BYTES_HIGH unsent)."""
        while not self._drained.is_set():  # several senders may wake at once, and one fill it again
            await self._drained.wait()
        self.post(message, descriptors)

    def _flush(self) -> None:
        while self._outbox:
            view, descriptors = self._outbox[0]
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                if descriptors
                else []
            )
            try:
                sent = self._sock.sendmsg([view], ancillary)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._fail(LinkClosed(f"{self.name} went away: {error}"))
                return
            for descriptor in descriptors:
                os.close(descriptor)
            self._outbox_bytes -= sent
            if sent == len(view):
                self._outbox.popleft()
            else:
                self._outbox[0] = (view[sent:], ())
        if self._outbox and not self._writing:
            self._writing = True
            self._loop.add_writer(self._sock.fileno(), self._flush)
        elif not self._outbox and self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())
        if self._outbox_bytes <= OUTBOX_BYTES_HIGH:
            self._drained.set()

    # Receiving.

    async def receive(self) -> tuple[Message, list[int]]:
        """The next message and its descriptors, which the caller now owns.

        Raises LinkClosed once the peer is gone and everything that had arrived was taken.
        """
        while not self._inbox:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        item = self._inbox.popleft()
        if len(self._inbox) < INBOX_FRAMES_MAX // 2:
            self._resume_reading()
        return item

    def _resume_reading(self) -> None:
        if not self._reading and self._error is None:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._read)

    def _read(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                READ_BYTES,
                socket.CMSG_SPACE(DESCRIPTORS_PER_FRAME_MAX * 4),
                socket.MSG_CMSG_CLOEXEC,
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(LinkClosed(f"{self.name} went away: {error}"))
            return
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(raw[: len(raw) - len(raw) % numbers.itemsize])
                self._descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            self._fail(FrameInvalid(f"descriptors from {self.name} were lost: raise RLIMIT_NOFILE"))
            return
        if not data:
            self._fail(LinkClosed(f"{self.name} closed the link"))
            return
        self._buffer += data
        self._parse()

    def _parse(self) -> None:
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            length, count = _HEADER.unpack_from(self._buffer, start)
            if length > FRAME_BYTES_MAX or count > DESCRIPTORS_PER_FRAME_MAX:
                self._fail(FrameInvalid(f"{self.name} announced a frame of {length} bytes"))
                return
            end = start + _HEADER.size + length
            if len(self._buffer) < end:
                break
            try:
                message = self._decoder.decode(
                    memoryview(self._buffer)[start + _HEADER.size : end].tobytes()
                )
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                self._fail(FrameInvalid(f"{self.name} sent what this link does not carry: {error}"))
                return
            if len(self._descriptors) < count:
                self._fail(FrameInvalid(f"{self.name} announced descriptors it did not send"))
                return
            self._inbox.append((message, [self._descriptors.popleft() for _ in range(count)]))
            start = end
        # What is left belongs to one frame that has begun, so more than its share is nobody's.
        if len(self._descriptors) > DESCRIPTORS_PER_FRAME_MAX:
            self._fail(FrameInvalid(f"{self.name} sent descriptors it did not announce"))
            return
        if start:
            del self._buffer[:start]
            self._arrived.set()
        if len(self._inbox) >= INBOX_FRAMES_MAX and self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    # Closing.

    def close(self) -> None:
        """Close the link and every descriptor it still holds. Idempotent."""
        self._fail(LinkClosed(f"link to {self.name} was closed here"))
        for _, descriptors in self._inbox:
            for descriptor in descriptors:
                os.close(descriptor)
        self._inbox.clear()

    def _fail(self, error: Exception) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._reading:
            self._loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        self._reading = self._writing = False
        self._sock.close()
        for _, pending in self._outbox:
            for descriptor in pending:
                os.close(descriptor)
        self._outbox.clear()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._drained.set()
        self._arrived.set()
