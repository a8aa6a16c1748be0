"""What a simulated MPS control daemon knows: servers, namespaces, their limits and their clients.

It owns the rules of the real one: limits bind clients that come later, default limits servers that
start later; a fault refuses clients until all that were there are gone; a server takes so many
clients and no more; what names another device is taken in silence and does nothing. It knows no
socket and no text. The invariant: a client that was taken has the limits that were told to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from partitioner.simulated.mps_chunks import INVALID, Chunks

NOT_READY = "CUDA_ERROR_MPS_SERVER_NOT_READY"
FULL = "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED"
NO_SERVER = "CUDA_ERROR_MPS_CONNECTION_FAILED"
DEFAULT = "default"


@dataclass
class SharedLimits:
    """Limits of a server or namespace. None: none."""

    memory_bytes: int | None = None
    thread_percent: float = 100.0
    sm_count: int | None = None
    """Multiprocessors to itself, which no percentage limits."""

    def tightened(self, memory_bytes: int | None, percent: float | None) -> SharedLimits:
        """These, tightened by what a client asks of itself."""
        limits = [each for each in (self.memory_bytes, memory_bytes) if each is not None]
        wanted = self.thread_percent if percent is None else percent
        return SharedLimits(min(limits, default=None), min(self.thread_percent, wanted))


@dataclass
class Server:
    """A running server with its namespaces; legacy ones have only the default one."""

    name: str
    pid: int
    uid: int
    device: str
    fault: bool = False
    namespaces: dict[str, SharedLimits] = field(default_factory=dict)
    clients: dict[int, str] = field(default_factory=dict)
    """Namespaces by the process id of the client."""

    @property
    def limits(self) -> SharedLimits:
        """Those of the default namespace."""
        return self.namespaces[DEFAULT]


class MpsState:
    """One control daemon on the device with the UUID `device`."""

    def __init__(
        self, device: str, clients_max: int, first_pid: int, chunks: Chunks | None = None
    ) -> None:
        self.device = device
        self.chunks = chunks
        self.defaults = SharedLimits()
        self.servers: dict[str, Server] = {}
        self._clients_max = clients_max
        self._next_pid = first_pid

    def start_server(self, name: str, uid: int, device: str) -> Server:
        """Start a server, with the default limits of now."""
        limits = SharedLimits(self.defaults.memory_bytes, self.defaults.thread_percent)
        server = Server(name, self._next_pid, uid, device, namespaces={DEFAULT: limits})
        self._next_pid += 1
        self.servers[name] = server
        return server

    def by_pid(self, pid: int) -> Server | None:
        """The server with this process id."""
        return next((each for each in self.servers.values() if each.pid == pid), None)

    def connect(
        self,
        pid: int,
        name: str,
        namespace: str,
        memory: dict[str, int],
        percent: float | None,
        partition: str | None = None,
    ) -> SharedLimits | str:
        """Take a client, with limits, or refuse it with an error of CUDA's.

        `memory` is what it asks of itself by device. One that names a device which is not visible
        has no limit of memory at all, as with the real one. `partition` is the static one it names.
        """
        server = self.servers.get(name)
        if server is None or namespace not in server.namespaces:
            return NO_SERVER
        if server.fault:
            return NOT_READY
        if len(server.clients) >= self._clients_max:
            return FULL
        sm_count = self.chunks.granted(partition) if self.chunks is not None else None
        if sm_count == 0:
            return INVALID
        server.clients[pid] = namespace
        known = {self.device, "0"}
        limits = server.namespaces[namespace].tightened(
            min((memory[each] for each in known & set(memory)), default=None), percent
        )
        if set(memory) - known:
            limits.memory_bytes = None
        if sm_count is not None:
            limits.sm_count, limits.thread_percent = sm_count, 100.0
        return limits

    def gone(self, pid: int) -> None:
        """A client's process or its contexts are gone; a server in fault without any is well."""
        for server in self.servers.values():
            server.clients.pop(pid, None)
            if not server.clients:
                server.fault = False

    def fault(self) -> None:
        """A client has brought a fatal fault upon the device, and so upon every server on it."""
        for server in self.servers.values():
            server.fault = bool(server.clients)

    def names(self, device: str) -> bool:
        """Whether a limit for `device` is one for the device that there is."""
        return device in (self.device, "0")

    def clients(self) -> Iterable[tuple[Server, int, str]]:
        """Every client with its server and namespace."""
        for server in self.servers.values():
            for pid, namespace in server.clients.items():
                yield server, pid, namespace
