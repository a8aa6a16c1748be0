"""Image builders for hotbayd's stage: real, sealed images, of zeros."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.control.errors import CallRefused
from engine.link.build import Build, Built, Inspected, Restore, Touch
from swap.cached_image import restore_image, save_image
from swap.checksum import checksum_of
from swap.errors import SwapError
from swap.image import TensorRecipe, complete, plan_image, segment_bytes
from swap.segment import Segment
from swap.writing import write_manifest


@dataclass
class Builders:
    """Image builders that write zeros: a real, sealed image of `weights_bytes` for each model, or
    of half as many in a dtype of two bytes."""

    weights_bytes: int = 1 << 20
    builds: list[str] = field(default_factory=list)
    inspections: list[str] = field(default_factory=list)
    refuse: CallRefused | None = None
    pause: asyncio.Event | None = None
    key: Callable[[Path], str] = lambda directory: ""
    restores: list[str] = field(default_factory=list)
    saves: list[Path] = field(default_factory=list)
    pause_save: asyncio.Event | None = None
    touches: list[int] = field(default_factory=list)
    pause_touch: asyncio.Event | None = None
    refuse_touch: CallRefused | None = None
    dtype: str = "float32"
    """Of the checkpoint that was inspected last."""

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[Builders]:
        yield copy.copy(self)  # each knows its own checkpoint; what is noted is shared

    def layout(self, directory: Path) -> Any:
        size_path = directory / "bytes"
        count = int(size_path.read_text()) if size_path.exists() else self.weights_bytes
        recipe = TensorRecipe("w", 0, (), (count // 4,))
        return plan_image([recipe], self.dtype, {"directory": str(directory)})

    async def inspect(self, directory: Path, dtype: str) -> Inspected:
        self.inspections.append(directory.parent.name)
        if (directory / "bad").exists():
            raise CallRefused("tensor x is missing", reason="CHECKPOINT_INVALID")
        self._directory, self.dtype = directory, dtype
        layout = self.layout(directory)
        return Inspected(
            call=0,
            family="llama",
            parameters=layout.weights_bytes // 4,
            vocabulary=10,
            layers=1,
            context_tokens=64,
            checkpoint_bytes=layout.weights_bytes,
            segment_bytes=segment_bytes(layout),
            weights_bytes=layout.weights_bytes,
            kv_bytes_per_token=1024,
            key=self.key(directory),
        )

    async def restore(
        self, request: Restore, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> None:
        self.restores.append(self._directory.parent.name)
        layout = self.layout(self._directory)
        segment = Segment(descriptor)  # the caller's
        try:
            restore_image(Path(request.path), layout, segment, digest=request.digest)
        except SwapError as error:
            raise CallRefused(str(error), reason=error.reason) from error

    async def save(self, descriptor: int, path: Path) -> None:
        self.saves.append(path)
        if self.pause_save is not None:
            await self.pause_save.wait()
        save_image(Segment(descriptor), path)

    async def tokenize(self, directory: Path, text: str) -> tuple[int, ...]:
        return tuple(len(word) for word in text.split())

    async def touch(self, request: Touch, descriptor: int) -> None:
        size_bytes = os.fstat(descriptor).st_size
        self.touches.append(size_bytes)
        if self.pause_touch is not None:
            await self.pause_touch.wait()
        if self.refuse_touch is not None:
            raise self.refuse_touch
        os.pwrite(descriptor, bytes(size_bytes), 0)

    async def build(
        self, request: Build, descriptor: int, on_progress: Callable[[int, int], None]
    ) -> Built:
        directory = self._directory
        self.builds.append(directory.parent.name)
        on_progress(1, 2)
        if self.pause is not None:
            await self.pause.wait()
        if self.refuse is not None:
            raise self.refuse
        layout = self.layout(directory)
        zeros = checksum_of(bytes(layout.weights_bytes))
        manifest = complete(layout, {"w": zeros})
        write_manifest(descriptor, manifest)
        segment = Segment(descriptor)
        segment.seal()
        return Built(0, manifest.digest, self.key(directory))
