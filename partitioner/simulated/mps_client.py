"""A process of the simulated node that is a client of a simulated MPS daemon.

    python -m partitioner.simulated.mps_client -- PROGRAM [ARGUMENTS]
    python -m partitioner.simulated.mps_client --multiprocessors N --memory-bytes N

The first form connects as the CUDA library would, by what is in the environment, and then becomes
the program: the connection is inherited, so that the program is a client until it ends. The second
tells what such a client gets of a place with so many multiprocessors and so much memory, as one
line of JSON, and stays a client until its standard input ends. Where the daemon refuses, both end
with its error. The invariant: what a share's process may have is what the daemon has told.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

from partitioner.simulated.mps_control import CLIENTS_SOCKET, MESSAGE_BYTES_MAX

ANSWER_TIMEOUT_S = 10.0
EXIT_REFUSED = 1
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def wishes(variables: dict[str, str]) -> dict[str, Any]:
    """What a client asks of itself by its environment."""
    memory = {}
    for entry in variables.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "").split(","):
        device, _, size = entry.partition("=")
        if size:
            memory[device] = int(size[:-1]) * _UNITS[size[-1]]
    percent = variables.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
    return {
        "memory": memory,
        "percent": None if percent is None else float(percent),
        "partition": variables.get("CUDA_MPS_SM_PARTITION"),
    }


def connected(variables: dict[str, str]) -> tuple[socket.socket, dict[str, Any]]:
    """A connection as a client, and what the daemon grants or why it refuses."""
    path = os.path.join(variables["CUDA_MPS_PIPE_DIRECTORY"], CLIENTS_SOCKET)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(ANSWER_TIMEOUT_S)
    try:
        connection.connect(path)
        connection.send(json.dumps(wishes(variables)).encode())
        return connection, json.loads(connection.recv(MESSAGE_BYTES_MAX))
    except (OSError, ValueError) as error:
        # The real library would go on without MPS: the very thing that nobody wants.
        return connection, {"error": f"no MPS control daemon at {path}: {error}"}


def main(arguments: list[str]) -> int:
    """The program; its exit code, unless it becomes another one."""
    connection, granted = connected(dict(os.environ))
    if "error" in granted:
        print(granted["error"], flush=True)
        return EXIT_REFUSED
    if arguments[:1] == ["--"]:
        os.set_inheritable(connection.fileno(), True)
        os.execvp(arguments[1], arguments[1:])
    place = dict(zip(arguments[::2], arguments[1::2], strict=True))
    total_bytes = int(place["--memory-bytes"])
    ceiling = int(int(place["--multiprocessors"]) * granted["thread_percent"] / 100)
    seen = {
        "multiprocessors": granted["sm_count"] or ceiling,
        "memory_bytes": min(total_bytes, granted["memory_bytes"] or total_bytes),
    }
    print(json.dumps(seen), flush=True)
    sys.stdin.buffer.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
