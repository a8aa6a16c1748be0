"""The daemon of the stand-in for `nvidia-cuda-mps-control`: its sockets, its clients, its end.

It owns what is under the pipe directory: a socket for commands, one for clients (v3: one in each
namespace's directory), the pid file. What commands do is `mps_texts`'s. It touches no GPU. The
invariant: a client is one for as long as its connection is open, which the kernel closes with its
process, and no longer than its contexts are left to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

from partitioner.simulated.mps_chunks import Chunks
from partitioner.simulated.mps_control import (
    CLIENTS_SOCKET,
    COMMANDS_SOCKET,
    MESSAGE_BYTES_MAX,
    PID_FILE,
)
from partitioner.simulated.mps_state import DEFAULT, MpsState, SharedLimits
from partitioner.simulated.mps_texts import legacy, named


class Daemon:
    """Answers commands and takes clients until it is told to quit."""

    def __init__(
        self,
        pipes: Path,
        protocol: int,
        device: str,
        clients_max: int,
        chunks: Chunks | None = None,
    ) -> None:
        self._pipes = pipes
        self._protocol = protocol
        self._state = MpsState(device, clients_max, os.getpid(), chunks)
        self._selector = selectors.DefaultSelector()
        self._listening: dict[tuple[str, str], socket.socket] = {}
        self._clients: dict[int, socket.socket] = {}
        self._quit = False

    def run(self) -> None:
        """Serve. The pid file is written last: whoever sees it can connect."""
        self._listen(self._pipes / COMMANDS_SOCKET, None)
        if self._protocol == 2:
            self._listen(self._pipes / CLIENTS_SOCKET, ("", DEFAULT))
        (self._pipes / PID_FILE).write_text(f"{os.getpid()}\n")
        while not self._quit:
            for key, _ in self._selector.select():
                key.data(key.fileobj)
        for name in (PID_FILE, COMMANDS_SOCKET, CLIENTS_SOCKET):
            (self._pipes / name).unlink(missing_ok=True)

    def _listen(self, path: Path, place: tuple[str, str] | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen(64)
        if place is not None:
            self._listening[place] = listener

        def accept(ready: Any) -> None:
            accepted, _ = listener.accept()

            def read(_: Any) -> None:
                if place is None:
                    self._command(accepted)
                else:
                    self._client(accepted, *place)

            self._selector.register(accepted, selectors.EVENT_READ, read)

        self._selector.register(listener, selectors.EVENT_READ, accept)

    def _command(self, connection: socket.socket) -> None:
        """Obey what a front sends, and let it go."""
        try:
            asked = json.loads(connection.recv(MESSAGE_BYTES_MAX) or b"{}")
            answer = self._obey(asked.get("lines", []), asked.get("words", []), asked.get("uid", 0))
            connection.send(json.dumps(answer).encode())
        except (OSError, ValueError):
            pass  # The front is gone, or was none.
        self._selector.unregister(connection)
        connection.close()

    def _obey(self, lines: list[str], words: list[str], uid: int) -> tuple[str, int]:
        if words == ["-q"] or lines == ["quit"]:
            self._quit = True
            return "", 0
        if self._protocol == 2:
            answers = [legacy(self._state, line) for line in lines] or [("no command\n", 1)]
            answer = "".join(text for text, _ in answers), max(code for _, code in answers)
        else:
            answer = named(self._state, words, uid)
        self._follow()
        return answer

    def _follow(self) -> None:
        """Have sockets for the namespaces there are, and drop clients that were terminated."""
        wanted = {
            (server.name, namespace)
            for server in self._state.servers.values()
            for namespace in server.namespaces
        }
        if self._protocol == 3:
            for place in wanted - set(self._listening):
                self._listen(self._pipes.joinpath(*place) / CLIENTS_SOCKET, place)
            for place in set(self._listening) - wanted:
                listener = self._listening.pop(place)
                self._selector.unregister(listener)
                listener.close()
                self._pipes.joinpath(*place, CLIENTS_SOCKET).unlink(missing_ok=True)
        kept = {pid for _, pid, _ in self._state.clients()}
        for pid in set(self._clients) - kept:
            self._drop(self._clients.pop(pid))

    def _client(self, connection: socket.socket, server: str, namespace: str) -> None:
        """A client's first word, or its end."""
        with contextlib.suppress(OSError):
            said = connection.recv(MESSAGE_BYTES_MAX)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _ = struct.unpack("3i", credentials)
            if said and pid not in self._clients:
                answer = self._taken(pid, uid, server, namespace, json.loads(said))
                connection.send(json.dumps(answer).encode())
                if "error" not in answer:
                    self._clients[pid] = connection
                    return
            elif self._clients.get(pid) is connection:
                del self._clients[pid]
                self._state.gone(pid)
        self._drop(connection)

    def _taken(
        self, pid: int, uid: int, server: str, namespace: str, said: dict[str, Any]
    ) -> dict[str, Any]:
        if self._protocol == 2:  # The first client has a server started, for its user.
            server = str(uid)
            if not self._state.servers:
                self._state.start_server(server, uid, self._state.device)
        limits = self._state.connect(
            pid, server, namespace, said["memory"], said["percent"], said["partition"]
        )
        if isinstance(limits, SharedLimits):
            return asdict(limits)
        return {"error": limits}

    def _drop(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        connection.close()
