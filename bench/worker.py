"""A real worker process for benchmarks, and images of random weights for it.

Plays the two peers of a worker, hotbayd and the gateway, as leanly as it can be done, so that what
is measured is the worker. It measures nothing itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from engine.link import control, tokens
from engine.link.frames import Link
from engine.link.peer import Peer
from engine.models.layout import image_recipes
from engine.models.spec import ModelSpec, Rope
from swap.checksum import checksum_of
from swap.image import PIECE_WEIGHTS, Manifest, complete, plan_image, segment_bytes
from swap.piece_writer import PieceWriter, close_gaps
from swap.pieces import place_pieces
from swap.segment import Segment
from swap.writing import write_all as write_at
from swap.writing import write_manifest

ROOT = Path(__file__).parents[1]
CALL_TIMEOUT_S = 120.0
RANDOM_BYTES = 16 << 20
Limits = tuple[int, int, int]
"""Of an engine: tokens of context, requests that may run, and that may wait."""
LIMITS: Limits = (128, 8, 64)


@dataclass(frozen=True)
class BuiltModel:
    """An image of random weights in a segment."""

    model: str
    segment: Segment
    manifest: Manifest


def decoder(vocabulary: int, hidden: int, layers: int) -> ModelSpec:
    """A Llama with heads of 64 and an output layer of its own."""
    return ModelSpec(
        family="llama",
        layers=layers,
        hidden=hidden,
        heads=hidden // 64,
        kv_heads=max(1, hidden // 128),
        head_dim=64,
        intermediate=4 * hidden,
        vocabulary=vocabulary,
        context_tokens=512,
        tied=False,
        norm_epsilon=1e-6,
        rope=Rope(theta=10_000.0),
        eos_token_ids=(),
    )


def build_model(
    model: str,
    spec: ModelSpec,
    seed: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    packed: bool = False,
) -> BuiltModel:
    """Write an image of normal weights, straight into its segment; norms are ones."""
    recipes = image_recipes(spec)
    piece_weights = PIECE_WEIGHTS if packed else 0
    layout = plan_image(recipes, dtype, spec.to_dict(), piece_weights=piece_weights)
    segment = Segment.create(segment_bytes(layout), model)
    draw = np.random.default_rng(seed)
    block = encoded(0.05 * draw.standard_normal(RANDOM_BYTES // 4, dtype=np.float32), dtype)
    stored_offsets = {piece.tensor.name: piece for piece in reversed(place_pieces(layout))}
    checksums, pieces, stored = {}, {}, {}
    for entry in layout.tensors:
        if "norm" in entry.name:
            data = encoded(np.ones(entry.shape, dtype=np.float32), dtype)
        else:
            data = (block * (entry.size_bytes // len(block) + 1))[: entry.size_bytes]
        if packed:
            place = stored_offsets[entry.name].stored_offset_bytes
            writer = PieceWriter(segment.descriptor, entry, place, piece_weights)
            writer.write(memoryview(data))
            pieces[entry.name] = writer.finish()
            stored[entry.name] = writer.stored_checksum
        else:
            write_at(segment.descriptor, data, entry.offset_bytes)
        checksums[entry.name] = checksum_of(data)
    manifest = (
        complete(layout, checksums, pieces, stored) if packed else complete(layout, checksums)
    )
    if packed:
        close_gaps(segment, layout, manifest)
    write_manifest(segment.descriptor, manifest)
    segment.seal()
    return BuiltModel(model, segment, manifest)


def encoded(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Values as an image holds them; for bfloat16 the upper half of each, cut off."""
    if dtype == "float32":
        return values.tobytes()
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).tobytes()


class BenchWorker:
    """The worker's process, its control link and its token link."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self.process = process
        self._directory = directory
        self.hotbayd: Peer[Any]
        self.gateway: Link[Any]
        self._numbers = iter(range(1, 1 << 40))
        self._stages: asyncio.Queue[control.StageReached] = asyncio.Queue()

    @classmethod
    async def start(
        cls,
        runtime_dir: Path,
        memory_bytes: int,
        *arguments: str,
        program: str = "engine.worker.main",
        environment: Mapping[str, str] | None = None,
    ) -> BenchWorker:
        """Start a worker, with more in its environment if asked to, and connect to it."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", program, "--partition", "bench", "--runtime-dir"),
            *(str(runtime_dir), "--generation", "1", "--memory-bytes", str(memory_bytes)),
            *arguments,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        worker = cls(process, runtime_dir / "workers" / "bench")
        worker.hotbayd = Peer(
            await worker._connect("control.sock"),
            control.FromWorker,
            name="worker",
            replies=(control.WorkerState, control.Exchanged, control.Done, control.Failed),
            handler=worker._heard,
            on_close=lambda error: None,
        )
        worker.gateway = Link(
            await worker._connect("tokens.sock"), tokens.FromWorker, name="worker"
        )
        return worker

    async def call(self, message: Any, descriptors: tuple[int, ...] = ()) -> Any:
        """Call the worker. Raises RuntimeError when it refuses."""
        reply, _ = await self.hotbayd.call(message, descriptors, timeout_s=CALL_TIMEOUT_S)
        if isinstance(reply, control.Failed):
            raise RuntimeError(f"{reply.reason}: {reply.message}")
        return reply

    async def attach(self, built: BuiltModel) -> None:
        """Have the worker map a model's image."""
        message = control.AttachImage(built.manifest.digest)
        await self.call(message, (built.segment.descriptor,))

    async def swap(
        self,
        operation: str,
        outgoing: str | None,
        incoming: BuiltModel,
        prompt: tuple[int, ...],
        limits: Limits = LIMITS,
    ) -> tuple[float, control.ExchangeResult]:
        """Exchange, with a request for the incoming model as soon as it is taken.

        Returns the seconds from sending the exchange to having the first token, and the result.
        """
        request = control.Exchange(
            operation=operation,
            outgoing=(outgoing,) if outgoing else (),
            incoming=control.EngineSpec(incoming.model, incoming.manifest.digest, *limits),
        )
        while not self._stages.empty():
            self._stages.get_nowait()
        started = time.monotonic()
        exchanging = asyncio.create_task(self.call(request))
        # What the worker tells first is that it has begun, and takes requests for the model.
        stage = asyncio.create_task(self._stages.get())
        await asyncio.wait({stage, exchanging}, return_when=asyncio.FIRST_COMPLETED)
        await self.answer(incoming.model, prompt)
        seconds = time.monotonic() - started
        stage.cancel()
        return seconds, (await exchanging).result

    async def exchange(
        self,
        operation: str,
        outgoing: str | None,
        incoming: BuiltModel,
        limits: Limits = LIMITS,
        in_flight: control.InFlight = control.InFlight.DRAIN,
        *,
        keep_staged: bool = False,
    ) -> tuple[float, control.ExchangeResult]:
        """Exchange with no request for the incoming model; seconds until it is committed.

        Raises RuntimeError when it is rolled back.
        """
        request = control.Exchange(
            operation=operation,
            outgoing=(outgoing,) if outgoing else (),
            incoming=control.EngineSpec(incoming.model, incoming.manifest.digest, *limits),
            in_flight=in_flight,
            keep_staged=keep_staged,
        )
        started = time.monotonic()
        result = (await self.call(request)).result
        seconds = time.monotonic() - started
        if result.error:
            raise RuntimeError(result.error)
        return seconds, result

    async def answer(self, model: str, prompt: tuple[int, ...]) -> int:
        """One greedy token for a prompt."""
        number = next(self._numbers)
        sampling = tokens.Sampling(max_tokens=1, temperature=0.0)
        self.gateway.post(tokens.Submit(number, model, prompt, sampling))
        while True:
            step, _ = await self.gateway.receive()
            self.gateway.post(tokens.Grant(1))
            for output in step.outputs:
                if output.request == number:
                    if not output.tokens:
                        raise RuntimeError(f"{model} answered {output.finish}: {output.error}")
                    return int(output.tokens[0])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the worker, by force after an error: it must not keep what others need."""
        if error is None:
            await self.close()
        elif self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def close(self) -> None:
        """End the worker."""
        await self.call(control.Shutdown())
        await self.hotbayd.close()
        self.gateway.close()
        await self.process.wait()

    async def _heard(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, control.StageReached):
            self._stages.put_nowait(message)

    async def _connect(self, name: str) -> socket.socket:
        while self.process.returncode is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(sock, str(self._directory / name))
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                await asyncio.sleep(0.02)
            else:
                return sock
        raise RuntimeError("the worker ended before it could be connected to")
