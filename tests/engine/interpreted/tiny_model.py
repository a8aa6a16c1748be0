"""A model of one small layer, for engines whose kernels are interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from engine.device_stepper import DeviceStepper
from engine.engine import Engine
from engine.graphs import Graphs
from engine.kv_space import PlainKvSpace
from engine.limits import EngineLimits
from engine.models.layout import image_recipes
from engine.models.spec import ModelSpec, Rope
from engine.workspace import Workspace

PAGE_BYTES = 1 << 10
"""Four tokens: requests go through many blocks."""
VOCABULARY = 61
PROMPTS = [[(7 * place + 3 * seed) % VOCABULARY for place in range(length)] for seed, length in
           enumerate((1, 6, 13, 4, 2))]  # fmt: skip


def spec_of() -> ModelSpec:
    return ModelSpec(
        family="qwen3",
        layers=1,
        hidden=32,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=48,
        vocabulary=VOCABULARY,
        context_tokens=128,
        tied=True,
        norm_epsilon=1e-6,
        rope=Rope(1e4),
        eos_token_ids=(),
    )


def weights_of(spec: ModelSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        recipe.name: torch.randn(recipe.shape, generator=generator) * 0.4
        + (1.0 if "norm" in recipe.name else 0.0)
        for recipe in image_recipes(spec)
    }


SPEC = spec_of()
WEIGHTS = weights_of(SPEC)


def make_engine(
    graphs: Graphs | None = None,
    workspace: Workspace | None = None,
    *,
    device: bool = True,
    spec: ModelSpec = SPEC,
    weights: Mapping[str, torch.Tensor] = WEIGHTS,
    **limits: int,
) -> Engine:
    stepper = partial(DeviceStepper, graphs=graphs, workspace=workspace)
    given: dict[str, Any] = {"make_stepper": stepper} if device else {}
    pages = limits.pop("pages", 64)
    space = PlainKvSpace(PAGE_BYTES, pages)
    space.memory().fill_(0xFF)  # no number, as float32 and as FP8
    chosen = EngineLimits(**{"context_tokens": 48, "running_requests_max": 8, **limits})
    return Engine(spec, weights, space, chosen, **given)
