"""Devices, images and checkpoints for the tests of `swap`: small, real, and the same every time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from swap.checksum import checksum_of
from swap.image import Manifest, TensorRecipe, complete, plan_image, segment_bytes
from swap.segment import Segment
from swap.writing import write_all, write_manifest
from tests.support.devices import DeviceFactory, device_factory

MIB = 1 << 20


class SteppedClock:
    """Time moves only by sleeping; with `blocking`, each sleep waits for one `step`."""

    def __init__(self, blocking: bool = False) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []
        self.asleep = threading.Semaphore(0)
        self._steps = threading.Semaphore(0)
        self._blocking = blocking

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.asleep.release()
        if self._blocking:
            assert self._steps.acquire(timeout=120)
        self.now += seconds

    def step(self, count: int = 1) -> None:
        self._steps.release(count)


@pytest.fixture
def stepped_clock() -> type[SteppedClock]:
    return SteppedClock


@pytest.fixture(params=["host", "cuda over a fake driver"])
def make_device(request: pytest.FixtureRequest) -> Iterator[DeviceFactory]:
    """Opens devices of every kind whose memory a test can read, by pages; closed afterwards."""
    with device_factory(request.param) as make:
        yield make


@pytest.fixture
def make_image() -> Iterator[Callable[..., tuple[Manifest, Segment]]]:
    """Builds sealed images of random weights: one tensor of `elements` float32 per layer."""
    segments = []

    def make(seed: int = 0, elements: tuple[int, ...] = (3000, 1000, 5000, 10)) -> Any:
        recipes = [
            TensorRecipe(f"t{index}", index - 1, (f"s{index}",), (count,))
            for index, count in enumerate(elements)
        ]
        layout = plan_image(recipes, "float32", {"seed": seed})
        segment = Segment.create(segment_bytes(layout), f"test {seed}")
        source, checksums = random.Random(seed), {}
        for entry in layout.tensors:
            content = source.randbytes(entry.size_bytes)
            write_all(segment.descriptor, content, entry.offset_bytes)
            checksums[entry.name] = checksum_of(content)
        manifest = complete(layout, checksums)
        write_manifest(segment.descriptor, manifest)
        segment.seal()
        segments.append(segment)
        return manifest, segment

    yield make
    for segment in segments:
        segment.close()


@pytest.fixture
def checkpoint_directory(tmp_path: Path) -> Path:
    """Six float32 tensors of a model of two layers, in one file, written by safetensors."""
    numbers = np.random.default_rng(7)
    tensors = {
        name: numbers.standard_normal(shape).astype(np.float32)
        for name, shape in {
            "embed": (64, 32),
            "0.q": (32, 32),
            "0.k": (16, 32),
            "0.v": (16, 32),
            "1.w": (48, 32),
            "norm": (32,),
        }.items()
    }
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
