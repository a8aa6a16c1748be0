"""Two models of different families, in segments, for the worker's tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.checkpoints import Checkpoint, make_checkpoint
from tests.support.worker_stage import BuiltImage, build_segment


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
    return make_model("prose@1", tmp_path_factory.mktemp("prose"), "llama", 1)


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Qwen3."""
    return make_model("code@1", tmp_path_factory.mktemp("code"), "qwen3", 2)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A directory with a short path: a socket's address holds a hundred bytes or so."""
    directory = Path(tempfile.mkdtemp(prefix="hb"))
    yield directory
    shutil.rmtree(directory)
