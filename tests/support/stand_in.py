"""A process that stands where a gateway or a worker would, for tests of the fleet.

Run as `python -m tests.support.stand_in ROLE DIRECTORY GENERATION MODE`. It listens on
DIRECTORY/control.sock and speaks the control link as far as the fleet needs it: Describe and
Shutdown. Modes: `well`, `exit` (ends at once, code 7), `mute` (listens, never answers), `old`
(another protocol version), `deaf` (lets nobody end it but by SIGKILL).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from daemon.control.notify import boot_id
from engine.link import control, routes
from engine.link.errors import LinkError
from engine.link.peer import Peer


def describe(role: str, partition: str, generation: int, mode: str, call: int) -> Any:
    protocol = control.PROTOCOL + (1 if mode == "old" else 0)
    if role == "gateway":
        return routes.GatewayState(
            call=call,
            protocol=protocol,
            pid=os.getpid(),
            boot_id=boot_id(),
            generation=generation,
            table_version=0,
            http="127.0.0.1:1",
            grpc="127.0.0.1:2",
        )
    return control.WorkerState(
        call=call,
        protocol=protocol,
        pid=os.getpid(),
        boot_id=boot_id(),
        partition=partition,
        generation=generation,
        device="host",
        memory_bytes=1 << 30,
        page_bytes=2 << 20,
        pages_total=512,
        pages_free=512,
        link_bytes_per_s=1e9,
    )


async def serve(role: str, directory: Path, generation: int, mode: str) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = directory / "control.sock"
    path.unlink(missing_ok=True)
    listener.bind(str(path))
    listener.listen(8)
    listener.setblocking(False)
    ended = asyncio.Event()
    messages = routes if role == "gateway" else control
    peers = []

    async def handle(peer: list[Peer[Any]], message: Any) -> None:
        if isinstance(message, messages.Describe):
            if mode != "mute":
                reply = describe(role, directory.name, generation, mode, message.call)
                peer[0].post(reply)
        elif isinstance(message, messages.Shutdown):
            if mode == "deaf":
                return
            peer[0].post(messages.Done(call=message.call))
            ended.set()

    def gone(error: LinkError) -> None:
        return None

    async def accept() -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            box: list[Peer[Any]] = []
            incoming = messages.ToGateway if role == "gateway" else messages.ToWorker
            box.append(
                Peer(
                    sock,
                    incoming,
                    name="hotbayd",
                    replies=(),
                    handler=lambda message, _, box=box: handle(box, message),
                    on_close=gone,
                )
            )
            peers.append(box[0])

    accepting = asyncio.create_task(accept())
    await ended.wait()
    accepting.cancel()
    for peer in peers:
        await peer.close()


def main() -> None:
    role, directory, generation, mode = sys.argv[1:]
    if mode == "exit":
        sys.exit(7)
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asyncio.run(serve(role, Path(directory), int(generation), mode))


if __name__ == "__main__":
    main()
