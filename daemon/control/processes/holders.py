"""Processes of others that use a GPU: who they are, and how they are ended when somebody insists.

It owns the looking and the signals; whom to end is decided elsewhere, by a person who has seen the
list. A process is asked with SIGTERM, waited for, and only then killed with SIGKILL, so that it can
save its work. The invariants: a signal goes through a descriptor of the process (pidfd) that was
opened before it was looked at once more, so that a number that was given anew never hits another
one; a process that does not have a GPU's device file open is never signalled, since then the
numbers of the driver are those of another namespace; hotbayd, its parent and init never are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import select
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daemon.control.errors import Refused
from partitioner.simulated.node import SimulatedNode

TERM_WAIT_S = 10.0
KILL_WAIT_S = 5.0
COMMAND_CHARACTERS_MAX = 200
DEVICE_PREFIX = "/dev/nvidia"
_START_FIELD = 19
"""Of what follows the name in /proc/PID/stat: when the process was started."""


@dataclass(frozen=True)
class Holder:
    """A process that uses what `where` names. Unknown words are empty, an unknown `started` 0."""

    pid: int
    where: str
    command: str = ""
    owner: str = ""
    started: int = 0


class Holders(Protocol):
    """Looks at processes of others, and ends them."""

    def describe(self, pid: int, where: str) -> Holder:
        """Who it is, as far as this process may see it."""
        ...

    async def end(self, holders: Sequence[Holder]) -> None:
        """Let all of them be gone. Raises Refused (PARTITION_IN_USE) naming who is not."""
        ...


def holders_of(simulated: SimulatedNode | None) -> Holders:
    """Those of a simulated node, whose numbers mean nobody on this host, or real ones."""
    return HostHolders() if simulated is None else SimulatedHolders(simulated)


class HostHolders:
    """Processes of this host. `device` is how the names of GPUs' device files begin."""

    def __init__(
        self,
        device: str = DEVICE_PREFIX,
        *,
        term_wait_s: float = TERM_WAIT_S,
        kill_wait_s: float = KILL_WAIT_S,
    ) -> None:
        self._device = device
        self._term_wait_s = term_wait_s
        self._kill_wait_s = kill_wait_s

    def describe(self, pid: int, where: str) -> Holder:
        return Holder(pid, where, _command(pid), _owner(pid), _started(pid))

    async def end(self, holders: Sequence[Holder]) -> None:
        with contextlib.ExitStack() as stack:
            open_: dict[int, Holder] = {}
            for each in holders:
                descriptor = self._hold(each)
                if descriptor is not None:
                    stack.callback(os.close, descriptor)
                    open_[descriptor] = each
            # Nobody is signalled before all of them were looked at.
            for number, wait_s in (
                (signal.SIGTERM, self._term_wait_s),
                (signal.SIGKILL, self._kill_wait_s),
            ):
                for descriptor, each in open_.items():
                    _signal(descriptor, each, number)
                left = await asyncio.to_thread(_wait, list(open_), wait_s)
                open_ = {descriptor: open_[descriptor] for descriptor in left}
            if open_:
                raise _refused(
                    open_.values(), "not gone after SIGKILL: stuck in the driver (dmesg)"
                )

    def _hold(self, holder: Holder) -> int | None:
        """A descriptor of the process; None when it is gone. Raises Refused if it may not be."""
        if holder.pid in (1, os.getpid(), os.getppid()):
            raise _refused([holder], "init, hotbayd or its parent: never ended")
        try:
            descriptor = os.pidfd_open(holder.pid)
        except ProcessLookupError:
            return None
        except OSError as error:
            raise _refused([holder], str(error.strerror)) from error
        problem = self._problem(holder)
        if problem is None or problem:
            os.close(descriptor)
        if problem:
            raise _refused([holder], problem)
        return None if problem is None else descriptor

    def _problem(self, holder: Holder) -> str | None:
        """Why it may not be ended; empty when it may, None when it is another process by now."""
        if _started(holder.pid) != holder.started:
            return None
        try:
            names = [str(each.readlink()) for each in Path(f"/proc/{holder.pid}/fd").iterdir()]
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"cannot be looked at ({error.strerror}): run hotbayd as root"
        if not any(name.startswith(self._device) for name in names):
            return "has no GPU open here: the driver's number is of another pid namespace"
        return ""


class SimulatedHolders:
    """Processes of a simulated node. They have no names, and go at once."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node

    def describe(self, pid: int, where: str) -> Holder:
        return Holder(pid, where, "a simulated process", "nobody")

    async def end(self, holders: Sequence[Holder]) -> None:
        self._node.end_processes({each.pid for each in holders})


def _refused(holders: Iterable[Holder], problem: str) -> Refused:
    listed = list(holders)
    pids = ", ".join(f"{each.pid} ({each.command or 'unknown'})" for each in listed)
    return Refused(
        f"processes on what is to go were not ended: pid {pids}: {problem}",
        reason="PARTITION_IN_USE",
        metadata={"pids": ",".join(str(each.pid) for each in listed)},
    )


def _signal(descriptor: int, holder: Holder, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        pass  # It has gone by itself.
    except PermissionError as error:
        raise _refused([holder], "this process may not end it: run hotbayd as root") from error


def _wait(descriptors: Sequence[int], wait_s: float) -> list[int]:
    """Those that are still there when the time is over."""
    left, deadline_s = set(descriptors), time.monotonic() + wait_s
    poll = select.poll()
    for each in left:
        poll.register(each, select.POLLIN)
    while left and (rest_s := deadline_s - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(1000 * rest_s):
            poll.unregister(descriptor)
            left.discard(descriptor)
    return sorted(left)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        return " ".join(filter(None, words))[:COMMAND_CHARACTERS_MAX]
    return ""


def _owner(pid: int) -> str:
    with contextlib.suppress(OSError):
        uid = Path(f"/proc/{pid}").stat().st_uid
        with contextlib.suppress(KeyError):
            return pwd.getpwuid(uid).pw_name
        return f"uid {uid}"
    return ""


def _started(pid: int) -> int:
    """In clock ticks since the host was started; with the number it names one process only."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(after_name[_START_FIELD])
    return 0
