"""A look from inside: what a process in each share really gets, before anybody serves there.

It owns the tiny clients, one for each share and all at the same time, so that a ceiling on the
number of clients is met here and not by a worker. It changes no limit. The invariant: a share that
was looked at is one whose processes are clients of its daemon, and have no more than its limits;
a process that finds no daemon would run beside MPS with the whole GPU, and say nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from partitioner.errors import MpsShareError
from partitioner.mps.control import Limits, MpsControl
from partitioner.mps.shared import SharedPlace

SIGHT_TIMEOUT_S = 60.0
"""A first CUDA context on a large node takes many seconds."""
END_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Sight:
    """What a client sees. `memory_bytes` is the most that it can allocate."""

    multiprocessors: int
    memory_bytes: int


async def look(
    shared: SharedPlace, control: MpsControl, client: tuple[str, ...], numbers: Iterable[int]
) -> None:
    """Start a client in each of these shares, and judge. Raises `MpsShareError`."""
    chosen = tuple(numbers)
    clients = []
    try:
        for number in chosen:
            clients.append(await _client(shared, control, client, number))  # noqa: PERF401
        sights = await asyncio.gather(*(_sight(each) for each in clients))
        there = await control.clients()
        for number, process, sight in zip(chosen, clients, sights, strict=True):
            problem = unlike(shared, shared.limits[number], sight)
            if not problem and process.pid not in there:
                problem = "its client has not come to the control daemon"
            if problem:
                raise MpsShareError(
                    f"{shared.partitions[number]}: {problem}; the driver does not keep the limits "
                    "that were set: look at the daemon's log under the runtime directory"
                )
    finally:
        await asyncio.gather(*(_end(each) for each in clients))


def unlike(shared: SharedPlace, limits: Limits, sight: Sight | str) -> str:
    """What is wrong with a sight; empty when nothing is. A string is a client's own complaint."""
    if isinstance(sight, str):
        return f"no client can be there, {sight or 'it said nothing'}"
    if limits.sm_count is not None and sight.multiprocessors != limits.sm_count:
        return (
            f"a client sees {sight.multiprocessors} multiprocessors instead of the "
            f"{limits.sm_count} that its share has to itself"
        )
    most = max(1, shared.sm_count * limits.thread_percent // 100)
    if shared.sm_count and not 0 < sight.multiprocessors <= most:
        return f"a client sees {sight.multiprocessors} multiprocessors instead of at most {most}"
    if not 0 < sight.memory_bytes <= limits.memory_bytes:
        return f"a client gets {sight.memory_bytes} bytes instead of {limits.memory_bytes}"
    return ""


async def _client(
    shared: SharedPlace, control: MpsControl, client: tuple[str, ...], number: int
) -> asyncio.subprocess.Process:
    limits = shared.limits[number]
    variables = {**shared.environment(control, number), "CUDA_VISIBLE_DEVICES": shared.device}
    return await asyncio.create_subprocess_exec(
        *("env", *(f"{name}={value}" for name, value in variables.items())),
        *(*client, "--multiprocessors", str(shared.sm_count)),
        *("--memory-bytes", str(shared.memory_bytes), "--limit-bytes", str(limits.memory_bytes)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def _sight(process: asyncio.subprocess.Process) -> Sight | str:
    """The first line of JSON, or what was said instead."""
    assert process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(SIGHT_TIMEOUT_S):
            while line := await process.stdout.readline():
                said += line
                with contextlib.suppress(msgspec.MsgspecError):
                    return msgspec.json.decode(line, type=Sight)
    except TimeoutError:
        return f"within {SIGHT_TIMEOUT_S:g} s it has told nothing"
    return said.decode(errors="replace").strip()[-500:]


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
