"""The two text protocols of MPS control daemons, as far as they are used, spoken by a stand-in.

It owns words in and words out: `legacy` reads a line of v2, `named` the arguments of v3. What they
do is `mps_state`'s. The invariant: answers have the form of the real program's, down to percentages
with a decimal in one protocol and two in the other; what it would not understand is an error.
"""

from __future__ import annotations

import re

from partitioner.simulated.mps_state import MpsState, Server, SharedLimits

FAULT_COMMAND = "simulate_fault"
"""Of the simulated daemon alone, in both protocols."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NAME = re.compile(r"[a-z0-9_]{1,64}")

Answer = tuple[str, int]
"""Text and exit code."""


class Refused(Exception):
    """A command that is not obeyed; the text says why."""


def legacy(state: MpsState, line: str) -> Answer:
    """Obey one line of v2."""
    match line.split():
        case [word] if word == FAULT_COMMAND:
            state.fault()
            return "", 0
        case ["get_server_list"]:
            return _lines(server.pid for server in state.servers.values()), 0
        case ["start_server", "-uid", uid] if not state.servers:
            state.start_server(uid, int(uid), state.device)
            return "", 0
        case ["get_server_status", pid] if server := _server(state, pid):
            return "FAULT\n" if server.fault else "ACTIVE\n", 0
        case ["get_client_list", pid] if server := _server(state, pid):
            return _lines(server.clients), 0
        case ["terminate_client", pid, client] if server := _server(state, pid):
            if int(client) not in server.clients:
                return f"Client {client} is not of server {pid}\n", 1
            state.gone(int(client))
            return "0\n", 0
        case ["set_default_active_thread_percentage", percent]:
            state.defaults.thread_percent = _percent(percent)
            return f"{state.defaults.thread_percent:.1f}\n", 0
        case ["get_default_active_thread_percentage"]:
            return f"{state.defaults.thread_percent:.1f}\n", 0
        case ["set_active_thread_percentage", pid, percent] if server := _server(state, pid):
            server.limits.thread_percent = _percent(percent)
            return f"{server.limits.thread_percent:.1f}\n", 0
        case ["get_active_thread_percentage", pid] if server := _server(state, pid):
            return f"{server.limits.thread_percent:.1f}\n", 0
        case ["set_default_device_pinned_mem_limit", device, size]:
            return _keep(state, state.defaults, device, size), 0
        case ["get_default_device_pinned_mem_limit", device]:
            return _told(state, state.defaults, device), 0
        case ["set_device_pinned_mem_limit", pid, device, size] if server := _server(state, pid):
            return _keep(state, server.limits, device, size), 0
        case ["get_device_pinned_mem_limit", pid, device] if server := _server(state, pid):
            return _told(state, server.limits, device), 0
        case ["sm_partition", "add", device, chunks] if state.chunks is not None:
            return state.chunks.add(device, int(chunks), _busy(state)) + "\n", 0
        case ["sm_partition", "rm", device, name] if state.chunks is not None:
            return state.chunks.remove(device, name, _busy(state)) + "\n", 0
        case ["lspart"] if state.chunks is not None:
            return state.chunks.table(_busy(state)) + "\n", 0
    return f"Unknown command or server: {line.strip()}\n", 1


def named(state: MpsState, words: list[str], uid: int) -> Answer:
    """Obey one command of v3."""
    plain = [word for word in words if not word.startswith("--")]
    options = dict(
        word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--")
    )
    try:
        match plain:
            case [word] if word == FAULT_COMMAND:
                state.fault()
                return "", 0
            case ["server", *rest]:
                return _server_verb(state, rest, options, uid), 0
            case ["namespace", *rest]:
                return _namespace_verb(state, rest, options), 0
            case ["client", "list"]:
                rows = [
                    f"{pid},{server.name},0,{namespace},-"
                    for server, pid, namespace in state.clients()
                    if options.get("server", server.name) == server.name
                ]
                return _lines(rows), 0
            case ["client", "terminate", pid]:
                if not any(int(pid) == each for _, each, _ in state.clients()):
                    raise Refused(f"no client has the pid {pid}")
                state.gone(int(pid))
                return "", 0
    except Refused as error:
        return f"Error: {error}\n", 1
    return f"Error: unknown command: {' '.join(words)}\n", 1


def _server_verb(state: MpsState, words: list[str], options: dict[str, str], uid: int) -> str:
    match words:
        case ["create", name]:
            if name in state.servers or not _NAME.fullmatch(name):
                raise Refused(f"there is a server {name}, or it is no name")
            allowed = options.get("allowed-devices", state.device)
            if state.names(allowed):  # On another device it ends again without a word.
                state.start_server(name, int(options.get("uid", uid)), allowed)
            return ""
        case ["delete", name]:
            server = _named(state, name)
            if server.clients and "force" not in options:
                raise Refused(f"server {name} has clients")
            del state.servers[name]
            return ""
        case ["list"]:
            return _lines(
                f"{each.name},{each.uid},{each.pid},{_status(each)},-,{each.device},-"
                for each in state.servers.values()
            )
        case ["get", name, "status"]:
            return _status(_named(state, name)) + "\n"
    raise Refused(f"unknown verb: server {' '.join(words)}")


def _namespace_verb(state: MpsState, words: list[str], options: dict[str, str]) -> str:
    match words:
        case ["create", name]:
            server = _named(state, options.get("server", ""))
            if name in server.namespaces or not _NAME.fullmatch(name):
                raise Refused(f"there is a namespace {name}, or it is no name")
            server.namespaces[name] = SharedLimits()
            return ""
        case ["delete", name]:
            server = _named(state, options.get("server", ""))
            if name in server.clients.values() and "force" not in options:
                raise Refused(f"namespace {name} has clients")
            _limits(server, name)
            del server.namespaces[name]
            return ""
        case ["set", name]:
            limits = _limits(_named(state, options.get("server", "")), name)
            if "pinned-memory-limit" in options:
                limits.memory_bytes = _bytes(options["pinned-memory-limit"])
            if "active-thread-percentage" in options:
                limits.thread_percent = _percent(options["active-thread-percentage"])
            return ""
        case ["list"]:
            server = _named(state, options.get("server", ""))
            return _lines(f"{name},{server.name}" for name in server.namespaces)
        case ["get", name, server_name, field]:
            limits = _limits(_named(state, server_name), name)
            if field == "active-thread-percentage":
                return f"{limits.thread_percent:.2f}\n"
            if field == "pinned-memory-limit":
                return _size(limits.memory_bytes) + "\n"
    raise Refused(f"unknown verb: namespace {' '.join(words)}")


def _busy(state: MpsState) -> bool:
    return any(True for _ in state.clients())


def _server(state: MpsState, pid: str) -> Server | None:
    return state.by_pid(int(pid)) if pid.isdigit() else None


def _named(state: MpsState, name: str) -> Server:
    if name not in state.servers:
        raise Refused(f"there is no server {name!r}")
    return state.servers[name]


def _limits(server: Server, namespace: str) -> SharedLimits:
    if namespace not in server.namespaces:
        raise Refused(f"server {server.name} has no namespace {namespace!r}")
    return server.namespaces[namespace]


def _status(server: Server) -> str:
    return "Fault" if server.fault else "Ready"


def _percent(text: str) -> float:
    """Out of range is taken for the nearest that there is."""
    return min(100.0, max(1.0, float(text)))


def _bytes(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]]


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "-"
    unit = "G" if size_bytes % _UNITS["G"] == 0 else "M"
    return f"{size_bytes // _UNITS[unit]}{unit}"


def _keep(state: MpsState, limits: SharedLimits, device: str, size: str) -> str:
    if state.names(device):
        limits.memory_bytes = _bytes(size)
    return ""


def _told(state: MpsState, limits: SharedLimits, device: str) -> str:
    return (_size(limits.memory_bytes) if state.names(device) else "-") + "\n"


def _lines(items: object) -> str:
    assert hasattr(items, "__iter__")
    return "".join(f"{each}\n" for each in items)
