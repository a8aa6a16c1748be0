"""A real worker process with a scripted hotbayd and a scripted gateway around it.

Owns the process, the two links and the segments that its images live in, as hotbayd would. The
gateway's side collects what each request brings and grants credit; it checks that a request is
answered with one finish and nothing after it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.link import control
from engine.link.control import Exchange, ExchangeResult, InFlight
from engine.link.errors import LinkError
from engine.link.frames import Link
from engine.link.peer import Peer
from engine.link.tokens import (
    STEP_FRAMES_CREDIT,
    Cancel,
    Finish,
    FromWorker,
    Grant,
    Output,
    Sampling,
    Submit,
)
from engine.models.layout import image_recipes
from engine.models.spec import ModelSpec
from swap.build import build_image
from swap.checkpoint import Checkpoint
from swap.image import Manifest, plan_image, segment_bytes
from swap.segment import Segment

ROOT = Path(__file__).parents[2]
CALL_TIMEOUT_S = 120.0
START_TIMEOUT_S = 120.0
MEMORY_BYTES = 24 << 20
FRAMES_LEFT = 16
"""Of a gateway's credit, once its streams are to stand still: so many tokens each has at most."""


@dataclass
class BuiltImage:
    """An image in a segment, kept open as hotbayd keeps it."""

    segment: Segment
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest


def build_segment(directory: Path, dtype: str = "float32", piece_weights: int = 0) -> BuiltImage:
    """Build a checkpoint's image into a segment of its own."""
    spec = ModelSpec.from_directory(directory)
    recipes = image_recipes(spec)
    layout = plan_image(recipes, dtype, spec.to_dict(), piece_weights=piece_weights)
    segment = Segment.create(segment_bytes(layout), directory.name)
    with Checkpoint.open(directory) as checkpoint:
        return BuiltImage(segment, build_image(checkpoint, recipes, layout, segment))


@dataclass
class Answer:
    """What one request brought so far."""

    tokens: list[int] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    finish: Finish | None = None
    error: str = ""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)


class GatewaySide:
    """The gateway's end of the token link."""

    def __init__(self, sock: socket.socket, *, grants: bool = True) -> None:
        self.link: Link[Any] = Link(sock, FromWorker, name="worker")
        self.answers: dict[int, Answer] = {}
        self.frames = 0
        self.arrived = asyncio.Event()
        self.grants = grants
        self.task = asyncio.create_task(self._read())
        self._numbers = iter(range(1, 1 << 30))

    async def _read(self) -> None:
        while True:
            message, _ = await self.link.receive()
            self.frames += 1
            self.arrived.set()
            if self.grants:
                self.link.post(Grant(1))
            for output in message.outputs:
                answer = self.answers[output.request]
                assert answer.finish is None, f"request {output.request} goes on after its end"
                answer.outputs.append(output)
                answer.tokens += output.tokens
                answer.begun.set()
                if output.finish is not None:
                    answer.finish, answer.error = output.finish, output.error
                    answer.ended.set()

    def submit(self, model: str, prompt: list[int], sampling: Sampling) -> int:
        """Send a request; returns its number."""
        number = next(self._numbers)
        self.answers[number] = Answer()
        self.link.post(Submit(number, model, tuple(prompt), sampling))
        return number

    def cancel(self, number: int) -> None:
        self.link.post(Cancel(number))

    async def begun(self, number: int) -> Answer:
        """Wait for a request's first output."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await self._or_broken(self.answers[number].begun)
        return self.answers[number]

    async def ended(self, number: int) -> Answer:
        """Wait for a request's finish."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await self._or_broken(self.answers[number].ended)
        return self.answers[number]

    async def _or_broken(self, event: asyncio.Event) -> None:
        waiting = asyncio.create_task(event.wait())
        await asyncio.wait({waiting, self.task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not event.is_set():
            self.task.result()  # raises what broke the link

    async def run(self, model: str, prompt: list[int], sampling: Sampling) -> Answer:
        """Send a request and wait for its finish, sending it again as long as it comes back."""
        while True:
            answer = await self.ended(self.submit(model, prompt, sampling))
            if answer.finish is not Finish.REQUEUE:
                return answer
            assert answer.tokens == [], "a request of which tokens were sent came back"
            await asyncio.sleep(0.005)

    async def stand_still(self, model: str) -> None:
        """Have streams stand still after a few tokens, until `flow`: however slow the test is, they
        go on for as long as it wants. `model` is ACTIVE, and uses up the link's credit."""
        self.grants = False
        frames = STEP_FRAMES_CREDIT - FRAMES_LEFT
        answer = await self.run(model, [1], Sampling(max_tokens=frames, temperature=0.0))
        assert len(answer.outputs) == frames

    def flow(self) -> None:
        """Let streams go on."""
        self.grants = True
        self.link.post(Grant(STEP_FRAMES_CREDIT))

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.link.close()


class HotbaydSide:
    """hotbayd's end of the control link."""

    def __init__(self, sock: socket.socket) -> None:
        self.stages: list[control.StageReached] = []
        self.states: asyncio.Queue[control.WorkerState] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.reached = asyncio.Event()
        self.peer: Peer[Any] = Peer(
            sock,
            control.FromWorker,
            name="worker",
            replies=(
                control.WorkerState,
                control.Exchanged,
                control.LinkMeasured,
                control.Done,
                control.Failed,
            ),
            handler=self._handle,
            on_close=self._ended,
        )

    def _ended(self, error: LinkError) -> None:
        self.closed.set()

    async def _handle(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, control.StageReached):
            self.stages.append(message)
            self.reached.set()
        else:
            assert isinstance(message, control.WorkerState), message
            self.states.put_nowait(message)

    async def call(self, message: Any, descriptors: tuple[int, ...] = ()) -> Any:
        reply, _ = await self.peer.call(message, descriptors, timeout_s=CALL_TIMEOUT_S)
        return reply

    async def done(self, message: Any, descriptors: tuple[int, ...] = ()) -> None:
        """A call that must succeed."""
        reply = await self.call(message, descriptors)
        assert isinstance(reply, control.Done), reply

    async def failed(self, message: Any, descriptors: tuple[int, ...] = ()) -> control.Failed:
        """A call that must be refused."""
        reply = await self.call(message, descriptors)
        assert isinstance(reply, control.Failed), reply
        return reply

    async def attach(self, image: BuiltImage) -> None:
        await self.done(control.AttachImage(image.digest), (image.segment.descriptor,))

    async def describe(self) -> control.WorkerState:
        state = await self.call(control.Describe())
        assert isinstance(state, control.WorkerState)
        return state

    async def exchange(self, request: Exchange) -> ExchangeResult:
        """An exchange that must not be refused; it may be rolled back."""
        reply = await self.call(request)
        assert isinstance(reply, control.Exchanged), reply
        return reply.result

    async def stage(self, operation: str, stage: control.Stage) -> control.StageReached:
        """Wait until an exchange has told of a stage."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            while True:
                for reached in self.stages:
                    if (reached.operation, reached.stage) == (operation, stage):
                        return reached
                self.reached.clear()
                await self.reached.wait()

    async def state_where(self, condition: Any) -> control.WorkerState:
        """Wait for a state told unasked of which `condition` holds."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            while True:
                state = await self.states.get()
                if condition(state):
                    return state

    async def close(self) -> None:
        await self.peer.close()


class WorkerStage:
    """A worker's process and the ways to reach it; `sides` are closed by `disconnect`."""

    def __init__(
        self,
        runtime_dir: Path,
        *arguments: str,
        memory_bytes: int = MEMORY_BYTES,
        partition: str = "p0",
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.directory = runtime_dir / "workers" / partition
        self.process = subprocess.Popen(
            [
                sys.executable,
                *("-m", "engine.worker.main", "--partition", partition),
                *("--runtime-dir", str(runtime_dir), "--generation", "1", "--threads", "1"),
                *("--memory-bytes", str(memory_bytes), *arguments),
            ],
            env=environment,
            cwd=ROOT,
        )
        self._sides: list[HotbaydSide | GatewaySide] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    async def hotbayd(self) -> HotbaydSide:
        side = HotbaydSide(await connect(self.directory / "control.sock"))
        self._sides.append(side)
        return side

    async def gateway(self, *, grants: bool = True) -> GatewaySide:
        side = GatewaySide(await connect(self.directory / "tokens.sock"), grants=grants)
        self._sides.append(side)
        return side

    async def ended(self) -> int:
        """Wait for the process's end; its exit status."""
        return await asyncio.to_thread(self.process.wait, CALL_TIMEOUT_S)

    async def clear(self) -> None:
        """Unload every model, and check that nothing is left."""
        hotbayd = await self.hotbayd()
        models = tuple(one.model for one in (await hotbayd.describe()).engines)
        if models:
            unload = Exchange(operation=f"clear-{id(models)}", outgoing=models, discard=True)
            assert (await hotbayd.exchange(unload)).error == ""
        state = await hotbayd.describe()
        assert (state.engines, state.pages_free) == ((), state.pages_total)
        for digest in state.images:
            await hotbayd.done(control.DetachImage(digest))

    async def disconnect(self) -> None:
        """Close every link to it."""
        for side in self._sides:
            await side.close()
        self._sides.clear()

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self.process.kill()
        self.process.wait()


async def connect(path: Path) -> socket.socket:
    """Connect to a worker's socket, waiting until it is there."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(sock, str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                await asyncio.sleep(0.01)
            else:
                return sock


@asynccontextmanager
async def worker_process(
    runtime_dir: Path, *arguments: str, **values: Any
) -> AsyncIterator[WorkerStage]:
    """A worker of one's own; it is killed at the end."""
    stage = WorkerStage(runtime_dir, *arguments, **values)
    try:
        yield stage
    finally:
        await stage.disconnect()
        stage.kill()


def load(model: str, image: BuiltImage, operation: str = "load", **values: Any) -> Exchange:
    """An exchange that brings a model in."""
    return Exchange(
        operation=operation,
        incoming=control.EngineSpec(
            model=model,
            digest=image.digest,
            context_tokens=values.pop("context_tokens", 256),
            running_requests_max=values.pop("running_requests_max", 32),
            waiting_requests_max=values.pop("waiting_requests_max", 256),
            weight=values.pop("weight", 1.0),
        ),
        in_flight=values.pop("in_flight", InFlight.DRAIN),
        **values,
    )


def greedy(max_tokens: int, **values: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, **values)
