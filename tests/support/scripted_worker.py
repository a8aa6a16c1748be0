"""A worker that computes nothing: it speaks the token link and emits what a script says.

It keeps the link's rules as a real worker does (one frame a step for all running requests, credit,
forgetting everything when the link breaks), so that a gateway cannot tell the difference. Scripts
choose for each request which tokens come, how it ends, and where it hangs, is sent back or takes
the whole worker down. It can be run as a process of its own for measurements.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.link.errors import LinkError
from engine.link.frames import Link
from engine.link.tokens import (
    STEP_FRAMES_CREDIT,
    Cancel,
    Finish,
    Grant,
    Output,
    Step,
    Submit,
    TokenLogprob,
    ToWorker,
)


@dataclass(frozen=True)
class Script:
    """What one request brings. `finish` None: it hangs after its tokens until cancelled."""

    tokens: tuple[int, ...] = ()
    finish: Finish | None = Finish.STOP
    error: str = ""
    tokens_per_step: int = 1
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    dies: bool = False
    """Drop the link instead of finishing."""


@dataclass
class Running:
    """A request under way."""

    submit: Submit
    script: Script
    place: int = 0

    def step(self) -> Output | None:
        """The next output, or None when there is none any more."""
        script = self.script
        tokens = script.tokens[self.place : self.place + script.tokens_per_step]
        logprobs = script.logprobs[self.place : self.place + script.tokens_per_step]
        first, self.place = self.place == 0, self.place + len(tokens)
        ended = self.place >= len(script.tokens) and not script.dies
        finish = script.finish if ended else None
        if not tokens and finish is None:
            return None
        return Output(
            request=self.submit.request,
            tokens=tokens,
            logprobs=logprobs,
            finish=finish,
            error=script.error if finish else "",
            cached_tokens=script.cached_tokens if first else 0,
        )


@dataclass
class ScriptedWorker:
    """Listens on `path`. What it saw is in `submits`, `cancels` and `grants`, over all links."""

    path: Path
    script: Callable[[Submit], Script]
    step_interval_s: float = 0.0
    submits: list[Submit] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    grants: list[int] = field(default_factory=list)
    links: int = 0
    outstanding_max: int = 0
    """The most frames that were on the way at once."""
    running: dict[int, Running] = field(default_factory=dict)
    _link: Link[Any] | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """Listen and serve one connection after another."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(os.fspath(self.path))
        sock.listen(4)
        sock.setblocking(False)
        self._tasks.append(asyncio.create_task(self._accept(sock)))

    async def stop(self) -> None:
        """Die: the socket and the link go away."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def drop_link(self) -> None:
        """Break the link and go on listening."""
        if self._link is not None:
            self._link.close()

    def send(self, *outputs: Output) -> None:
        """Send outputs by hand, whatever the script says."""
        assert self._link is not None
        self._link.post(Step(outputs))

    async def _accept(self, sock: socket.socket) -> None:
        with sock:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(sock)
                self.links += 1
                with contextlib.suppress(LinkError):
                    await self._serve(connection)

    async def _serve(self, connection: socket.socket) -> None:
        link: Link[Any] = Link(connection, ToWorker, name="gateway")
        self._link = link
        self.running.clear()
        wake = asyncio.Event()
        credit = [STEP_FRAMES_CREDIT]
        stepping = asyncio.create_task(self._step(link, wake, credit))
        try:
            while True:
                message, _ = await link.receive()
                match message:
                    case Submit():
                        self.submits.append(message)
                        self.running[message.request] = Running(message, self.script(message))
                    case Cancel():
                        self.cancels.append(message.request)
                        self.running.pop(message.request, None)
                    case Grant():
                        self.grants.append(message.frames)
                        credit[0] += message.frames
                wake.set()
        finally:
            stepping.cancel()
            link.close()
            self._link = None
            self.running.clear()

    async def _step(self, link: Link[Any], wake: asyncio.Event, credit: list[int]) -> None:
        with contextlib.suppress(LinkError):
            for number in itertools.count():
                outputs = [
                    output for running in self.running.values() if (output := running.step())
                ]
                for output in outputs:
                    if output.finish is not None:
                        del self.running[output.request]
                if not outputs or credit[0] == 0:
                    assert not (outputs and credit[0] == 0), "stepped without credit"
                    if any(running.script.dies for running in self.running.values()):
                        link.close()
                        return
                    wake.clear()
                    await wake.wait()
                    continue
                await link.send(Step(tuple(outputs)))
                credit[0] -= 1
                self.outstanding_max = max(self.outstanding_max, STEP_FRAMES_CREDIT - credit[0])
                while credit[0] == 0:
                    wake.clear()
                    await wake.wait()
                if self.step_interval_s or number % 8 == 0:
                    await asyncio.sleep(self.step_interval_s)


def main() -> None:
    """Serve on a socket, each request answered by `max_tokens` tokens of a fixed cycle."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokens", default="300,301,302,303")
    parser.add_argument("--interval-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    cycle = tuple(map(int, arguments.tokens.split(",")))

    def script(submit: Submit) -> Script:
        count = submit.sampling.max_tokens
        tokens = (cycle * (count // len(cycle) + 1))[:count]
        return Script(tokens=tokens, finish=Finish.LENGTH)

    async def serve() -> None:
        worker = ScriptedWorker(arguments.path, script, arguments.interval_ms / 1000)
        await worker.start()
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
