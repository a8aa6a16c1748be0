"""A stand-in for `nvidia-cuda-mps-control`: the program, which carries commands to its daemon.

    python -m partitioner.simulated.mps_control -d [-p 3]    put a daemon in the background
    ... -d -S                                                one that gives multiprocessors away
    ... < commands                                           v2: a command a line
    ... MODULE VERB [ARGUMENTS]                              v3: a command
    ... -p 3 -h | -v | -q                                    help, version, quit

It owns the command line. The daemon is `mps_daemon`, loaded only where one is started: commands are
many, and each is a process. The invariant: a daemon that runs decides the protocol, whatever is
asked for. Before all else `--newest 2` and `--version 13000` make it the program of an older
driver; `--multiprocessors UUID=COUNT/CHUNK` tells what a device has to give away.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import Any

PID_FILE = "nvidia-cuda-mps-control.pid"
COMMANDS_SOCKET = "control_privileged"
CLIENTS_SOCKET = "control"
CLIENTS_MAX = 48
MESSAGE_BYTES_MAX = 1 << 16
START_TIMEOUT_S = 20.0
NO_DAEMON = "Cannot find MPS control daemon process\n"
VERSION = 13040
FIRST_STATIC_VERSION = 13010


def carry(pipes: str, asked: dict[str, Any]) -> tuple[str, int]:
    """Have the daemon obey a command. Like NVIDIA's it waits for ever for one that is stuck."""
    front = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        front.connect(os.path.join(pipes, COMMANDS_SOCKET))
        front.send(json.dumps({**asked, "uid": os.getuid()}).encode())
        answer = json.loads(front.recv(MESSAGE_BYTES_MAX))
    except (OSError, ValueError):
        return NO_DAEMON, 1
    return answer[0], answer[1]


def start(pipes: str, arguments: list[str], protocol: int) -> int:
    """Put a daemon in the background, and return when it listens."""
    pid_file = os.path.join(pipes, PID_FILE)
    if os.path.exists(pid_file):
        if carry(pipes, {})[0] != NO_DAEMON:
            print("An instance of this daemon is already running")
            return 1
        os.unlink(pid_file)
    background = os.fork()
    if background == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        os.environ["CUDA_MPS_PROTOCOL_VERSION"] = str(protocol)
        module = "partitioner.simulated.mps_control"
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments, "-f"])
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not os.path.exists(pid_file):
        if os.waitpid(background, os.WNOHANG)[0] or time.monotonic() > deadline_s:
            print("the daemon did not start")
            return 1
        time.sleep(0.01)
    return 0


def serve(pipes: str, protocol: int, clients_max: int, devices: dict[str, str] | None) -> None:
    """Be the daemon; with `devices` one whose multiprocessors are given away."""
    from pathlib import Path

    from partitioner.simulated.mps_chunks import Chunks
    from partitioner.simulated.mps_daemon import Daemon

    device, chunks = os.environ.get("CUDA_VISIBLE_DEVICES", "0"), None
    if devices is not None:
        count, _, size = devices.get(device, "0/1").partition("/")
        chunks = Chunks(device, int(count), int(size))
    Daemon(Path(pipes), protocol, device, clients_max, chunks).run()


def main(arguments: list[str]) -> int:
    """The program; its exit code."""
    own, given = (
        list(arguments),
        {"--clients-max": CLIENTS_MAX, "--newest": 3, "--version": VERSION},
    )
    devices: dict[str, str] = {}
    while own and own[0] in (*given, "--multiprocessors"):
        if own[0] in given:
            given[own[0]] = int(own[1])
        else:
            device, _, sizes = own[1].partition("=")
            devices[device] = sizes
        del own[:2]
    settings, newest = arguments[: len(arguments) - len(own)], given["--newest"]
    static = "-S" in own
    if static:
        if given["--version"] < FIRST_STATIC_VERSION:
            print("unknown option -S")
            return 1
        own.remove("-S")
    asked = "2"
    if "-p" in own:
        if newest < 3:
            print("unknown option -p")
            return 1
        where = own.index("-p")
        asked = own[where + 1]
        del own[where : where + 2]
    # The variable has precedence; a program that knows one protocol does not know the variable.
    protocol = min(int(os.environ.get("CUDA_MPS_PROTOCOL_VERSION", asked)), newest)
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    match own:
        case ["-v"]:
            print(f"CUDA MPS Control Daemon, the stand-in for it; version {given['--version']}")
        case ["-h"]:
            modules = (
                "modules: server namespace client" if protocol == 3 else "get_server_list quit"
            )
            print(f"usage: -d -f -q -h -v; {modules}")
        case ["-d"]:
            return start(pipes, [*settings, *(["-S"] if static else [])], protocol)
        case ["-f"]:
            serve(pipes, protocol, given["--clients-max"], devices if static else None)
        case _:
            lines = [] if own else [line for line in sys.stdin.read().splitlines() if line.strip()]
            text, code = carry(pipes, {"lines": lines, "words": own})
            print(text, end="")
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
