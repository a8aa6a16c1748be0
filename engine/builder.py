"""The image builder: a short-lived process that turns one checkpoint into one image.

It owns reading the checkpoint and filling the segment it is handed, from the checkpoint or from an
image on disk, and writing images there; it never sees a device, never
allocates the image's memory and never imports torch. It speaks `engine.link.build` over an
inherited socket, one request at a time. Invariant: every Inspect and Build is answered once, by its
reply or by Failed, and the process ends when the socket closes, in the middle of a build too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.link.build import (
    PACKED_DTYPE,
    Build,
    BuildProgress,
    Built,
    Failed,
    FromBuilder,
    Inspect,
    Inspected,
    Restore,
    Restored,
    Save,
    Saved,
    ToBuilder,
    Tokenize,
    Tokenized,
    Touch,
    Touched,
)
from engine.link.errors import LinkError
from engine.link.frames import Link
from engine.models.layout import check_all_used, image_recipes
from engine.models.spec import FP8, ModelSpec
from swap.build import build_image, check_sources
from swap.cached_image import restore_image, save_image
from swap.checkpoint import Checkpoint
from swap.errors import SwapError
from swap.identity import Identity, identify
from swap.image import (
    ITEM_BYTES,
    PIECE_WEIGHTS,
    Manifest,
    TensorRecipe,
    plan_image,
    segment_bytes,
)
from swap.numa import prefer_node
from swap.pieces import device_bytes
from swap.presence import make_present
from swap.segment import Segment

THREADS_MAX = 64
SAVE_NICENESS = 10
REQUESTS_WAITING_MAX = 8


class BuilderMisuse(Exception):
    """hotbayd asked for something out of order."""

    reason = "BUILD_REFUSED"


class TokenizerUnusable(Exception):
    """The checkpoint's tokenizer cannot be read."""

    reason = "CHECKPOINT_INVALID"


@dataclass(frozen=True)
class Inspection:
    """A checkpoint that was found sound, open, with the image it will become."""

    spec: ModelSpec
    recipes: tuple[TensorRecipe, ...]
    checkpoint: Checkpoint
    layout: Manifest
    identity: Identity
    inspected_ns: int

    def key_if_unchanged(self) -> str:
        """The identity's key, if what has been read since is sure to be what it stands for."""
        now = identify(self.checkpoint, self.recipes, self.layout)
        settled = self.identity.settled(self.inspected_ns)
        return self.identity.key if now == self.identity and settled else ""


def inspect(directory: str, dtype: str) -> Inspection:
    """Read configuration and headers, and lay the image out. Raises EngineError or SwapError."""
    piece_weights = 0
    if dtype == PACKED_DTYPE:
        dtype, piece_weights = "bfloat16", PIECE_WEIGHTS
    if dtype not in ITEM_BYTES:
        known = ", ".join([*ITEM_BYTES, PACKED_DTYPE])
        raise BuilderMisuse(f"weights cannot be {dtype!r}: use one of {known}")
    spec = ModelSpec.from_directory(directory)
    recipes = image_recipes(spec)
    layout = plan_image(recipes, dtype, spec.to_dict(), piece_weights=piece_weights)
    # Before the files are opened: what changes from here on must not pass for settled.
    started_ns = time.time_ns()
    checkpoint = Checkpoint.open(directory)
    try:
        check_sources(checkpoint, recipes)
        check_all_used(recipes, checkpoint.tensors)
        identity = identify(checkpoint, recipes, layout)
    except BaseException:
        checkpoint.close()
        raise
    return Inspection(spec, recipes, checkpoint, layout, identity, started_ns)


def tokenize(directory: str, text: str) -> tuple[int, ...]:
    """A text's tokens by a checkpoint's tokenizer. Raises TokenizerUnusable."""
    from tokenizers import Tokenizer  # only here: most builders need none

    file = Path(directory) / "tokenizer.json"
    try:
        return tuple(Tokenizer.from_file(str(file)).encode(text).ids)
    except Exception as error:  # the library raises plain Exceptions
        raise TokenizerUnusable(f"{file} cannot be used: {error}") from error


class Builder:
    """Serves one link until it closes."""

    def __init__(self, link: Link[Any]) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._inspection: Inspection | None = None
        self._cancelled = threading.Event()

    async def serve(self) -> None:
        """Answer requests one after the other; returns when the link is closed."""
        requests: asyncio.Queue[tuple[ToBuilder, list[int]] | None] = asyncio.Queue(
            REQUESTS_WAITING_MAX
        )
        worker = asyncio.create_task(self._answer_all(requests))
        try:
            while True:
                await requests.put(await self._link.receive())
        except LinkError:
            # hotbayd is gone or has what it wanted; a build under way is for nobody.
            self._cancelled.set()
            await requests.put(None)
            await worker
        finally:
            self._link.close()
            if self._inspection is not None:
                self._inspection.checkpoint.close()

    async def _answer_all(
        self, requests: asyncio.Queue[tuple[ToBuilder, list[int]] | None]
    ) -> None:
        while (item := await requests.get()) is not None:
            request, descriptors = item
            try:
                reply = await self._answer(request, descriptors)
            except (EngineError, SwapError, BuilderMisuse, TokenizerUnusable) as error:
                metadata = getattr(error, "metadata", {})
                reply = Failed(request.call, error.reason, str(error), metadata)
            except Exception as error:  # a bug or the system's refusal: say it, do not vanish
                reply = Failed(request.call, "INTERNAL", f"the builder failed: {error!r}")
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            try:
                await self._link.send(reply)
            except LinkError:
                return
            except Exception as error:  # as above: hotbayd must not wait for what cannot be sent
                what = f"the builder's reply cannot be sent: {error!r}"
                await self._link.send(Failed(request.call, "INTERNAL", what))

    async def _answer(self, request: ToBuilder, descriptors: list[int]) -> FromBuilder:
        if isinstance(request, Inspect):
            return await self._inspect(request)
        if isinstance(request, Tokenize):
            tokens = await asyncio.to_thread(tokenize, request.directory, request.text)
            return Tokenized(request.call, tokens)
        # A segment is closed with the descriptors it came with.
        if isinstance(request, Save):
            if len(descriptors) != 1 or not Segment(descriptors[0]).sealed:
                raise BuilderMisuse("an image that is to be kept needs one sealed segment")
            await asyncio.to_thread(self._save, Segment(descriptors[0]), Path(request.path))
            return Saved(request.call)
        if isinstance(request, Touch):
            if len(descriptors) != 1 or not 0 < request.threads <= THREADS_MAX:
                raise BuilderMisuse(
                    f"touching memory needs one segment and 1 to {THREADS_MAX} threads"
                )
            await asyncio.to_thread(self._touch, Segment(descriptors[0]), request)
            return Touched(request.call)
        if self._inspection is None or len(descriptors) != 1:
            raise BuilderMisuse(
                f"a build needs an inspected checkpoint and one segment, not {len(descriptors)}"
            )
        if not 0 < request.threads <= THREADS_MAX:
            raise BuilderMisuse(f"{request.threads} threads are not 1 to {THREADS_MAX}")
        segment = Segment(descriptors[0])
        if segment.sealed or segment.size_bytes != segment.whole_pages(
            segment_bytes(self._inspection.layout)
        ):
            raise BuilderMisuse(
                f"a segment of {segment.size_bytes} bytes is not what was asked for"
            )
        if isinstance(request, Restore):
            await asyncio.to_thread(self._restore, self._inspection, segment, request)
            return Restored(request.call)
        inspection = self._inspection
        manifest = await asyncio.to_thread(self._build, inspection, segment, request)
        return Built(request.call, manifest.digest, inspection.key_if_unchanged())

    async def _inspect(self, request: Inspect) -> Inspected:
        if self._inspection is not None:
            self._inspection.checkpoint.close()
            self._inspection = None
        found = await asyncio.to_thread(inspect, request.directory, request.dtype)
        self._inspection = found
        return Inspected(
            call=request.call,
            family=found.spec.family,
            parameters=found.spec.parameters,
            vocabulary=found.spec.vocabulary,
            layers=found.spec.layers,
            context_tokens=found.spec.context_tokens,
            checkpoint_bytes=found.checkpoint.size_bytes,
            segment_bytes=segment_bytes(found.layout),
            weights_bytes=device_bytes(found.layout),
            kv_bytes_per_token=found.spec.kv_bytes_per_token(found.layout.dtype),
            key=found.identity.key,
            kv_fp8_bytes_per_token=found.spec.kv_bytes_per_token(FP8),
            kv_window_tokens=found.spec.window_tokens,
        )

    def _tell(self, done: int, total: int) -> None:
        self._loop.call_soon_threadsafe(self._post_progress, BuildProgress(done, total))

    def _restore(self, inspection: Inspection, segment: Segment, request: Restore) -> None:
        prefer_node(request.numa_node)
        restore_image(
            Path(request.path),
            inspection.layout,
            segment,
            digest=request.digest,
            threads=request.threads,
            progress=self._tell,
            cancelled=self._cancelled,
        )

    def _save(self, segment: Segment, path: Path) -> None:
        # Whoever waits for a load comes first.
        os.nice(SAVE_NICENESS)
        save_image(segment, path, cancelled=self._cancelled)

    def _touch(self, segment: Segment, request: Touch) -> None:
        if segment.sealed:
            raise BuilderMisuse("a sealed segment's memory is there already")
        prefer_node(request.numa_node)
        make_present(
            segment,
            threads=request.threads,
            huge_pages=request.huge_pages,
            cancelled=self._cancelled,
        )

    def _build(self, inspection: Inspection, segment: Segment, request: Build) -> Manifest:
        prefer_node(request.numa_node)
        return build_image(
            inspection.checkpoint,
            inspection.recipes,
            inspection.layout,
            segment,
            threads=request.threads,
            progress=self._tell,
            cancelled=self._cancelled,
        )

    def _post_progress(self, progress: BuildProgress) -> None:
        try:
            self._link.post(progress)
        except LinkError:
            # Progress is worth nothing to whoever does not listen; the reply will tell.
            return


async def _run(descriptor: int) -> None:
    link: Link[Any] = Link(socket.socket(fileno=descriptor), ToBuilder, name="hotbayd")
    await Builder(link).serve()


def main(arguments: list[str] | None = None) -> int:
    """Entry of the process: `python -m engine.builder --descriptor N`."""
    parser = argparse.ArgumentParser(prog="engine.builder", description=__doc__)
    parser.add_argument("--descriptor", type=int, required=True, help="socket to hotbayd")
    descriptor: int = parser.parse_args(arguments).descriptor
    # An interrupt typed at a terminal goes to hotbayd, which closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_run(descriptor))
    return 0


if __name__ == "__main__":
    sys.exit(main())
