"""Two models of different families, in segments, for the worker's tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.checkpoints import Checkpoint, make_checkpoint
from tests.support.worker_stage import (
    BuiltImage,
    GatewaySide,
    HotbaydSide,
    WorkerStage,
    build_segment,
    load,
)


@dataclass
class Model:
    """A model: its oracle, and its image in a segment."""

    key: str
    checkpoint: Checkpoint
    image: BuiltImage

    def expected(self, prompt: list[int], count: int) -> list[int]:
        """The oracle's greedy tokens."""
        return self.checkpoint.greedy(prompt, count)


def make_model(key: str, directory: Path, shape: str, seed: int) -> Model:
    checkpoint = make_checkpoint(directory, shape, seed)
    return Model(key, checkpoint, build_segment(directory))


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Llama."""
    return make_model("prose@1", tmp_path_factory.mktemp("prose"), "llama", 5)


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Qwen3."""
    return make_model("code@1", tmp_path_factory.mktemp("code"), "qwen3", 4)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Another Llama."""
    return make_model("other@1", tmp_path_factory.mktemp("other"), "llama", 9)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A directory with a short path: a socket's address holds a hundred bytes or so."""
    directory = Path(tempfile.mkdtemp(prefix="hb"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def shared_worker() -> Iterator[WorkerStage]:
    """One process for a file's tests; each leaves it empty (`serving` sees to that)."""
    directory = Path(tempfile.mkdtemp(prefix="hb"))
    stage = WorkerStage(directory)
    yield stage
    stage.kill()
    shutil.rmtree(directory)


@asynccontextmanager
async def serving(
    worker: WorkerStage, *models: Model
) -> AsyncIterator[tuple[HotbaydSide, GatewaySide]]:
    """All images attached and the first model ACTIVE; afterwards nothing is left on the worker."""
    try:
        hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
        for model in models:
            await hotbayd.attach(model.image)
        assert (await hotbayd.exchange(load(models[0].key, models[0].image))).error == ""
        yield hotbayd, gateway
    finally:
        # After a test that failed too: the next one has the same worker.
        try:
            await worker.clear()
        finally:
            await worker.disconnect()


@pytest.fixture(scope="session")
def poem(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Llama with large KV (see `tests.worker.preserving`)."""
    from tests.worker.preserving import make_large

    return make_large("poem@1", tmp_path_factory.mktemp("poem"), "llama", 11)


@pytest.fixture(scope="session")
def tale(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Qwen3 with large KV."""
    from tests.worker.preserving import make_large

    return make_large("tale@1", tmp_path_factory.mktemp("tale"), "qwen3", 12)


@pytest.fixture(scope="session")
def verse(poem: Model) -> Model:
    """The same as `poem`, packed."""
    from tests.worker.preserving import PackedModel

    return PackedModel.of("verse@1", poem)


@pytest.fixture
def bench(poem: Model, tale: Model, prose: Model) -> Iterator[Callable[..., Any]]:
    """Makes workers' engines and exchanges in the test's own thread (`tests.worker.preserving`)."""
    from tests.worker.preserving import Bench

    made: list[Bench] = []

    def make(pages: int, parking_bytes: int, more: Sequence[Model] = (), **values: Any) -> Bench:
        made.append(Bench([poem, tale, prose, *more], pages, parking_bytes, **values))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def inside(prose: Model, code: Model) -> Iterator[Any]:
    """A step loop within the test's process (`tests.worker.inside`), which knows both models."""
    from tests.worker.inside import Inside

    stage = Inside([prose, code])
    yield stage
    stage.close()
