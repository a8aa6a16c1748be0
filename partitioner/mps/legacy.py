"""A control daemon that speaks the legacy text protocol (v2), on every driver that has MPS limits.

It owns the words. There are no shares in this protocol: the daemon is given the loosest limits, and
each client tightens them by its environment, which it can do and never the other way round. Limits
go by UUID, since ordinals change their meaning with what is visible. The invariants: defaults are
set before the server starts, since they bind the next one only; each is read back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from partitioner.errors import MpsAnswerError, MpsCommandError, MpsLimitError
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
from partitioner.mps.static import (
    LIST_COMMAND,
    START_FLAG,
    add_command,
    parse_added,
    parse_listed,
    remove_command,
    sm_count_of,
)


class LegacyControl:
    """See `MpsControl`. `device` is the UUID of the GPU or of the GPU instance."""

    language = Language.LEGACY

    def __init__(self, program: tuple[str, ...], directory: Path, device: str) -> None:
        self._device = device
        environment = {"CUDA_VISIBLE_DEVICES": device, "CUDA_MPS_PROTOCOL_VERSION": "2"}
        self._commands = Commands(program, directory, environment)

    @property
    def pipe_directory(self) -> Path:
        return self._commands.pipe_directory

    async def answers(self) -> bool:
        """See `MpsControl.answers`."""
        return await answered(self.servers)

    async def share(self, limits: tuple[Limits, ...]) -> tuple[str, ...]:
        """See `MpsControl.share`."""
        static = any(each.sm_count for each in limits)
        if static:
            await self.stop()
        if not await self.answers():
            await started(self._commands, self.answers, *((START_FLAG,) if static else ()))
        partitions = await self._partitions(limits) if static else ()
        loosest = _loosest(limits)
        await self._set("default_", "", loosest, static=static)
        if not await self.servers():
            await self._say(f"start_server -uid {os.getuid()}")
        what = f"the MPS server of {self.pipe_directory} did not become active"
        await until(self._active, what, START_TIMEOUT_S)
        for pid in parse_pids(await self._say("get_server_list")):
            await self._set("", f"{pid} ", loosest, static=static)
        return partitions

    async def limits(self, count: int) -> tuple[Limits, ...]:
        """See `MpsControl.limits`."""
        servers = await self.servers()
        if servers:
            told = [await self._limits("", f"{each.pid} ") for each in servers]
        else:
            told = [await self._limits("default_", "")]
        return (_loosest(tuple(told)),) * count

    async def servers(self) -> tuple[MpsServer, ...]:
        """See `MpsControl.servers`."""
        found = []
        for pid in parse_pids(await self._say("get_server_list")):
            with contextlib.suppress(MpsCommandError):  # It may have ended since.
                status = parse_status(await self._say(f"get_server_status {pid}"))
                found.append(MpsServer(pid, status))
        return tuple(found)

    async def clients(self) -> tuple[int, ...]:
        """See `MpsControl.clients`."""
        pids: set[int] = set()
        for server in parse_pids(await self._say("get_server_list")):
            pids.update(parse_pids(await self._say(f"get_client_list {server}")))
        return tuple(sorted(pids))

    async def terminate(self, pid: int) -> None:
        """See `MpsControl.terminate`."""
        for server in parse_pids(await self._say("get_server_list")):
            if pid in parse_pids(await self._say(f"get_client_list {server}")):
                await self._say(f"terminate_client {server} {pid}")

    async def stop(self) -> None:
        """See `MpsControl.stop`."""
        await ended(self._commands, lambda: self._say("quit"))

    def environment(self, number: int, limits: Limits) -> Mapping[str, str]:
        """See `MpsControl.environment`."""
        threads = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(limits.thread_percent)}
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_directory),
            **(threads if limits.sm_count is None else {}),
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"{self._device}={size_text(limits.memory_bytes)}",
        }

    async def _partitions(self, limits: tuple[Limits, ...]) -> tuple[str, ...]:
        """Make one for each share, of a daemon that has none; the chunk is the driver's to tell."""
        first = await self._added(1)
        chunk = await self._counted(first)
        await self._say(remove_command(first))
        names = []
        for each in limits:
            wanted = each.sm_count or 0
            if not chunk or not wanted or wanted % chunk:
                raise MpsLimitError(
                    f"{self._device} gives multiprocessors away {chunk} at a time, and {wanted} "
                    "do not come out even: change the share's `sm`"
                )
            names.append(await self._added(wanted // chunk))
            told = await self._counted(names[-1])
            if told != wanted:
                raise MpsLimitError(
                    f"MPS control of {self.pipe_directory} was asked for {wanted} multiprocessors "
                    f"and gives {told}: look at its log"
                )
        return tuple(names)

    async def _added(self, chunks: int) -> str:
        try:
            told = await self._say(add_command(self._device, chunks))
        except MpsCommandError as error:  # Releases differ in whether a refusal is a failure.
            told = str(error)
        return parse_added(told, self._device)

    async def _counted(self, name: str) -> int:
        return sm_count_of(name, parse_listed(await self._say(LIST_COMMAND)))

    async def _say(self, *lines: str) -> str:
        return await self._commands.ask(text="\n".join(lines))

    async def _active(self) -> bool:
        return any(each.status is ServerStatus.ACTIVE for each in await self.servers())

    async def _set(self, which: str, server: str, limits: Limits, *, static: bool) -> None:
        """Set the default limits, or those of one server, and read them back.

        Percentages say nothing to a daemon that gives multiprocessors away; it keeps its 100.
        """
        size = size_text(limits.memory_bytes)
        percent = f"set_{which}active_thread_percentage {server}{limits.thread_percent}"
        memory = f"set_{which}device_pinned_mem_limit {server}{self._device} {size}"
        await self._say(*((memory,) if static else (percent, memory)))
        try:
            told = await self._limits(which, server)
        except MpsAnswerError as error:
            raise MpsLimitError(f"the limits of {self._device} are not kept: {error}") from error
        asked = Limits(parse_size(size), limits.thread_percent)
        if told != asked:
            raise MpsLimitError(
                f"MPS control of {self.pipe_directory} was told {asked} for {self._device} and "
                f"keeps {told}: does the device have that UUID, and the driver MPS limits?"
            )

    async def _limits(self, which: str, server: str) -> Limits:
        told = await self._say(
            f"get_{which}active_thread_percentage {server}".strip(),
            f"get_{which}device_pinned_mem_limit {server}{self._device}",
        )
        match told.split("\n"):
            case [percent, memory, *_]:
                return Limits(parse_size(memory), parse_percent(percent))
        raise MpsAnswerError(f"MPS control of {self.pipe_directory} tells limits as {told!r}")


def _loosest(limits: tuple[Limits, ...]) -> Limits:
    return Limits(
        max(each.memory_bytes for each in limits), max(each.thread_percent for each in limits)
    )
