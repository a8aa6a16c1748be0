"""A control daemon that speaks the protocol of modules and verbs (v3), which a driver may have.

It owns the words. Each share is a namespace of one named server, with limits of its own that its
clients cannot loosen; a client chooses by the directory that it finds the socket in. The
invariants: a namespace has both limits, since one without has the whole GPU; a server is seen to be
ready after it was made, since one on a device that is not there is made without a complaint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from partitioner.errors import MpsCommandError, MpsLimitError
from partitioner.mps.commands import Commands
from partitioner.mps.control import (
    Language,
    Limits,
    MpsServer,
    ServerStatus,
    parse_percent,
    parse_pids,
    parse_size,
    parse_status,
    size_text,
)
from partitioner.mps.lifetime import START_TIMEOUT_S, answered, ended, started, until

SERVER = "hotbay"
_CSV = "--format=csv,noheader"
_PID_COLUMN, _STATUS_COLUMN = 2, 3
_NAMES = ("--server=" + SERVER, _CSV)


class NamedControl:
    """See `MpsControl`. `device` is the UUID of the GPU or of the GPU instance."""

    language = Language.NAMED

    def __init__(self, program: tuple[str, ...], directory: Path, device: str) -> None:
        self._device = device
        environment = {"CUDA_VISIBLE_DEVICES": device, "CUDA_MPS_PROTOCOL_VERSION": "3"}
        self._commands = Commands(program, directory, environment)

    @property
    def pipe_directory(self) -> Path:
        return self._commands.pipe_directory

    async def answers(self) -> bool:
        """See `MpsControl.answers`."""
        return await answered(self._servers)

    async def share(self, limits: tuple[Limits, ...]) -> tuple[str, ...]:
        """See `MpsControl.share`."""
        if not await self.answers():
            await started(self._commands, self.answers, "-p", "3")
        if not await self._servers():
            await self._commands.ask(
                "server", "create", SERVER, f"--allowed-devices={self._device}"
            )
        what = f"the MPS server of {self.pipe_directory} did not become ready on {self._device}"
        await until(self._ready, what, START_TIMEOUT_S)
        there = await self._namespaces()
        for number, each in enumerate(limits):
            if _namespace(number) not in there:
                await self._commands.ask(
                    "namespace", "create", _namespace(number), f"--server={SERVER}"
                )
            await self._set(_namespace(number), each)
        for name in there:
            if name.startswith("mps") and name not in map(_namespace, range(len(limits))):
                await self._commands.ask(
                    "namespace", "delete", name, f"--server={SERVER}", "--force"
                )
        return ()

    async def limits(self, count: int) -> tuple[Limits, ...]:
        """See `MpsControl.limits`."""
        return tuple([await self._limits(_namespace(number)) for number in range(count)])

    async def servers(self) -> tuple[MpsServer, ...]:
        """See `MpsControl.servers`."""
        return tuple(
            MpsServer(int(row[_PID_COLUMN]), parse_status(row[_STATUS_COLUMN]))
            for row in await self._servers()
            if len(row) > _STATUS_COLUMN and row[_PID_COLUMN].isdigit()
        )

    async def clients(self) -> tuple[int, ...]:
        """See `MpsControl.clients`."""
        rows = _rows(await self._commands.ask("client", "list", *_NAMES))
        return parse_pids(" ".join(row[0] for row in rows))

    async def terminate(self, pid: int) -> None:
        """See `MpsControl.terminate`."""
        await self._commands.ask("client", "terminate", str(pid))

    async def stop(self) -> None:
        """See `MpsControl.stop`."""
        await ended(self._commands, lambda: self._commands.ask("-q"))

    def environment(self, number: int, limits: Limits) -> Mapping[str, str]:
        """See `MpsControl.environment`.

        The limits are the namespace's. A variable that names a device which a process cannot see
        would take all of its limits of memory away, so there is none.
        """
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_directory / SERVER / _namespace(number)),
            "CUDA_MPS_PROTOCOL_VERSION": "3",
        }

    async def _servers(self) -> list[list[str]]:
        return _rows(await self._commands.ask("server", "list", _CSV))

    async def _namespaces(self) -> list[str]:
        return [row[0] for row in _rows(await self._commands.ask("namespace", "list", *_NAMES))]

    async def _ready(self) -> bool:
        if not await self._servers():
            raise MpsCommandError(
                f"the MPS server for {self._device} has ended at once: is there such a device? "
                f"Look into the log beside {self.pipe_directory}"
            )
        return any(each.status is ServerStatus.ACTIVE for each in await self.servers())

    async def _set(self, namespace: str, limits: Limits) -> None:
        asked = Limits(parse_size(size_text(limits.memory_bytes)), limits.thread_percent)
        await self._commands.ask(
            *("namespace", "set", namespace, f"--server={SERVER}"),
            f"--pinned-memory-limit={size_text(limits.memory_bytes)}",
            f"--active-thread-percentage={limits.thread_percent}",
        )
        told = await self._limits(namespace)
        if told != asked:
            raise MpsLimitError(
                f"MPS control of {self.pipe_directory} was told {asked} for {namespace} and keeps "
                f"{told}: look at its log"
            )

    async def _limits(self, namespace: str) -> Limits:
        async def field(name: str) -> str:
            return await self._commands.ask("namespace", "get", namespace, SERVER, name)

        return Limits(
            parse_size(await field("pinned-memory-limit")),
            parse_percent(await field("active-thread-percentage")),
        )


def _namespace(number: int) -> str:
    return f"mps{number}"


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    return [[word.strip() for word in line.split(",")] for line in lines]
