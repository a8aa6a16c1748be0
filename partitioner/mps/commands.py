"""The control program, run for one command at a time and for a bounded time.

It owns its command lines and directories. It knows none of the program's languages. The invariants:
no call outlives its deadline, for a daemon that is dead or stuck lets its front wait for ever; what
is started in the background holds none of our pipes, or waiting for its output would never end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from partitioner.errors import MpsCommandError, MpsTimeoutError, MpsUnavailableError

COMMAND_TIMEOUT_S = 15.0
ANSWER_BYTES_MAX = 1 << 20
CANNOT_EXECUTE = (126, 127)
"""Exit codes of `env` when it finds no such program, or may not run it."""

NO_DAEMON = "cannot find mps control daemon"
LONGEST_SOCKET = "control_privileged"
SOCKET_PATH_BYTES_MAX = 107
"""What the kernel's address of a Unix socket holds."""

REAL_CONTROL = ("nvidia-cuda-mps-control",)


class Commands:
    """Runs `program` for the daemon whose directories are under `directory`."""

    def __init__(
        self,
        program: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        self.program = tuple(program)
        self.pipe_directory = directory / "pipe"
        self.log_directory = directory / "log"
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        variables = {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_directory),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log_directory),
            **environment,
        }
        # Given by `env`, so that all else is what this process was started with.
        self._prefix = ("env", *(f"{name}={value}" for name, value in variables.items()))

    async def ask(self, *arguments: str, text: str = "") -> str:
        """What the program answers. Raises `MpsCommandError` when it says that it failed."""
        async with self._turn:
            pipe = asyncio.subprocess.PIPE
            process = await self._run(arguments, pipe, pipe)
            answer, _ = await self._ended(process, " ".join((*arguments, text)), text)
        return self._checked(process.returncode, " ".join((*arguments, text)), answer.decode())

    async def launch(self, *arguments: str) -> None:
        """Have the program put its daemon in the background."""
        socket = self.pipe_directory / LONGEST_SOCKET
        if len(os.fsencode(socket)) > SOCKET_PATH_BYTES_MAX:
            raise MpsCommandError(
                f"{socket} is longer than {SOCKET_PATH_BYTES_MAX} bytes, the longest path of a "
                "Unix socket: use a shorter --runtime-dir"
            )
        for directory in (self.pipe_directory, self.log_directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        output = self.log_directory / "start.log"
        async with self._turn:
            with output.open("wb") as log:
                process = await self._run(arguments, asyncio.subprocess.DEVNULL, log)
            await self._ended(process, " ".join(arguments), "")
        said = output.read_bytes()[:ANSWER_BYTES_MAX].decode(errors="replace")
        self._checked(process.returncode, " ".join(arguments), said)

    async def _run(
        self, arguments: tuple[str, ...], stdin: int, output: int | IO[bytes]
    ) -> asyncio.subprocess.Process:
        try:
            return await asyncio.create_subprocess_exec(
                *(*self._prefix, *self.program, *arguments),
                stdin=stdin,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            # Nothing was asked, so this says nothing of the daemon.
            raise MpsUnavailableError(f"cannot run {self.program[0]}: {error}") from error

    async def _ended(
        self, process: asyncio.subprocess.Process, what: str, text: str
    ) -> tuple[bytes, bytes]:
        try:
            async with asyncio.timeout(self._timeout_s):
                answer, errors = await process.communicate(text.encode() + b"\n" if text else None)
        except TimeoutError:
            raise MpsTimeoutError(
                f"MPS control of {self.pipe_directory} has not done `{what.strip()}` within "
                f"{self._timeout_s:g} s: its daemon may be stuck; look at {self.log_directory}"
            ) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        return answer or b"", errors or b""

    def _checked(self, code: int | None, what: str, answer: str) -> str:
        if code in CANNOT_EXECUTE:
            raise MpsUnavailableError(
                f"cannot run {self.program[0]}: it comes with NVIDIA's driver (package "
                "nvidia-compute-utils); install it, or take `shares` out of the layout"
            )
        # Some releases say so and exit with 0.
        if code or NO_DAEMON in answer.lower():
            raise MpsCommandError(
                f"MPS control of {self.pipe_directory} failed at `{what.strip()}` (exit code "
                f"{code}): {answer.strip() or 'it said nothing'}; look at {self.log_directory}"
            )
        return answer
