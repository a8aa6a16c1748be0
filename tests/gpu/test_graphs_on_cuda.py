"""Graphs on the GPU: the tokens of launches, next to no memory, nothing lost by swaps or overlap.

What the interpreter cannot show: that what is captured is what runs. Skipped where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton compiles the kernels")

from engine.choose_stepper import choose_stepper
from engine.device_tensors import placed
from engine.engine import Engine
from engine.graphs import CudaGraphs, Graphs
from engine.kv_space import RegionKvSpace
from engine.limits import EngineLimits
from engine.workspace import Workspace
from swap.arena import PagePool, Region
from tests.engine.checkpoints import Checkpoint, greedy, make_checkpoint, prompt, run, tokens_of
from tests.support.devices import NEEDS_GPU, device_factory

pytestmark = list(NEEDS_GPU)
PAGE = 2 << 20
NEW_TOKENS = 24
PROMPTS = [prompt(seed, 1 + 13 * seed % 90) for seed in range(12)]
GRAPHS_BYTES_MAX = 256 << 20
"""Of all graphs of a small model: what CUDA keeps for their nodes, and one step's intermediates."""


@contextmanager
def engine_of(
    made: Checkpoint,
    graphs: Graphs | None,
    workspace: Workspace | None = None,
    *,
    strict: bool = False,
) -> Iterator[tuple[Engine, dict[str, torch.Tensor]]]:
    device = torch.device("cuda")
    weights = {
        name: placed(weight, device).to(torch.bfloat16) for name, weight in made.weights.items()
    }
    with device_factory("cuda") as make:
        region = Region(PagePool(make(24)), "kv", 24 * PAGE)
        limits = EngineLimits(256, 16, 64, 64, strict=strict)
        space = RegionKvSpace(region)
        engine = Engine(
            made.spec,
            weights,
            space,
            limits,
            dtype="bfloat16",
            make_stepper=partial(choose_stepper, graphs=graphs, workspace=workspace),
        )
        yield engine, weights
        torch.cuda.synchronize()
        del engine
        region.release()


def answers(engine: Engine, first: int = 0) -> list[list[int]]:
    for index, one in enumerate(PROMPTS):
        engine.submit(first + index, one, greedy(NEW_TOKENS + index))
    outputs = run(engine)
    return [tokens_of(outputs[first + index]) for index in range(len(PROMPTS))]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_replayed_tokens_are_launched_ones(shape: str, strict: bool, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, shape)
    with engine_of(made, None, strict=strict) as (engine, _):
        launched = answers(engine)
    with engine_of(made, CudaGraphs(), strict=strict) as (engine, _):
        assert answers(engine) == launched
        assert answers(engine, 100) == launched
        figures = engine.statistics().stepper
        assert figures.replays > figures.graphs > 0


def test_graphs_outlive_swaps_and_take_next_to_no_memory(tmp_path: Path) -> None:
    """Two engines that share a pool and a workspace, paused and resumed in turn, KV given up."""
    made = make_checkpoint(tmp_path / "one", "llama")
    other = make_checkpoint(tmp_path / "two", "qwen3", 4)
    shared = (CudaGraphs(), Workspace())
    with engine_of(made, *shared) as first, engine_of(other, *shared) as second:
        wanted = [answers(engine) for engine, _ in (first, second)]
        for number in range(20):
            engine, weights = (first, second)[number % 2]
            captured = engine.statistics().stepper.graphs
            before = torch.cuda.mem_get_info()[0]
            engine.pause()
            engine.resume(weights)
            assert answers(engine, 100 * (number + 1)) == wanted[number % 2]
            if number >= 2:
                assert engine.statistics().stepper.graphs == captured
                assert before - torch.cuda.mem_get_info()[0] < GRAPHS_BYTES_MAX


def test_a_step_is_one_copy_and_is_collected_behind_the_next(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, "llama")
    with engine_of(made, CudaGraphs()) as (engine, _):
        answers(engine)
        for index in range(8):
            engine.submit(500 + index, prompt(index, 20), greedy(60))
        for _ in range(6):
            engine.step()
        stepper: Any = engine._stepper
        copies = stepper.inputs.copies
        for _ in range(20):
            assert len(engine.step()) == 8
            assert engine._flight is not None
        assert stepper.inputs.copies == copies + 20
        run(engine)
