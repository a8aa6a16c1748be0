"""Engines over CUDA memory: what transformers computes, and the same tokens after any swap.

Each test runs on the GPU where there is one, and everywhere over a fake driver, whose memory the
processor computes on: so what is tried without a GPU is all but the arithmetic on it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device_tensors import placed
from engine.engine import Engine
from engine.kv_space import RegionKvSpace
from engine.limits import EngineLimits
from engine.link.control import EngineSpec, EngineStatus
from engine.link.tokens import Submit
from engine.parking import KvLane
from engine.worker.images import Image
from engine.worker.resident import Resident
from engine.worker.verify import verify_weights
from swap.arena import PagePool, Region
from swap.parking import ParkingArea
from swap.shared_link import OwnLink
from tests.engine.checkpoints import SHAPES, greedy, make_checkpoint, prompt, run, tokens_of
from tests.support.devices import FAKE, NEEDS_GPU, device_factory
from tests.support.worker_stage import build_segment

PAGE = 2 << 20
SWAPS = 20
PROMPTS = [prompt(seed, length) for seed, length in enumerate((1, 5, 17, 40, 100, 33, 16, 64))]
NEW_TOKENS = 24
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.06, "float16": 0.01}
"""How far below the likeliest token's logit a chosen one's may lie, as a part of the largest."""
OTHERS_MAX = {"float32": 0.01, "bfloat16": 0.05}
"""How many tokens may be others than transformers', as a part of all."""


@pytest.fixture(params=[FAKE, pytest.param("cuda", marks=NEEDS_GPU)])
def pool(request: pytest.FixtureRequest) -> Iterator[PagePool]:
    with device_factory(request.param) as make:
        yield PagePool(make(24))


def torch_device(pool: PagePool) -> torch.device:
    return torch.device("cuda" if pool.device.kind == "cuda" else "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_transformers(
    pool: PagePool, shape: str, dtype: str, tmp_path: Path
) -> None:
    made = make_checkpoint(tmp_path, shape)
    device, torch_dtype = torch_device(pool), getattr(torch, dtype)
    weights = {
        name: placed(weight, device).to(torch_dtype) for name, weight in made.weights.items()
    }
    region = Region(pool, "kv", 16 * PAGE)
    limits = EngineLimits(256, 8, 64, 64)
    engine = Engine(made.spec, weights, RegionKvSpace(region), limits, dtype=dtype)
    for index, one in enumerate(PROMPTS):
        engine.submit(index, one, greedy(NEW_TOKENS))
    answers = run(engine)
    oracle = copy.deepcopy(made.oracle).to(device=device, dtype=torch_dtype)
    others = 0
    for index, one in enumerate(PROMPTS):
        drawn = tokens_of(answers[index])
        assert len(drawn) == NEW_TOKENS
        with torch.inference_mode():
            sequence = torch.tensor([[*one, *drawn]], device=device)
            logits = oracle(sequence).logits[0, len(one) - 1 : -1].float().cpu()
        chosen = logits.gather(1, torch.tensor(drawn)[:, None]).squeeze(1)
        below = (logits.amax(dim=1) - chosen) / logits.abs().amax()
        assert below.max() <= TOLERANCE[dtype]
        others += int((below > 0).sum())
    assert others <= OTHERS_MAX[dtype] * len(PROMPTS) * NEW_TOKENS
    del engine
    region.release()


def swap_in(resident: Resident, salt: str) -> None:
    resident.map()
    resident.load(OwnLink().turn(), lambda: None).join()
    pool = resident._pool
    verify_weights(pool.device, resident.image, resident.weights.address, salt)
    resident.move(EngineStatus.STAGED)
    resident.serve()


def answers(resident: Resident, first: int) -> list[list[int]]:
    for index, one in enumerate(PROMPTS):
        request: Any = Submit(first + index, resident.model, tuple(one), greedy(NEW_TOKENS))
        resident.submit(request)
    outputs = run(resident.engine)
    return [tokens_of(outputs[first + index]) for index in range(len(PROMPTS))]


def test_tokens_are_the_same_after_any_number_of_swaps(pool: PagePool, tmp_path: Path) -> None:
    residents, images, segments = [], [], []
    for index, (shape, seed) in enumerate((("llama", 5), ("qwen3", 4))):
        directory = tmp_path / shape
        make_checkpoint(directory, shape, seed)
        built = build_segment(directory)
        descriptor = os.dup(built.segment.descriptor)
        image = Image.attach(pool.device, descriptor, built.digest)
        spec = EngineSpec(f"{shape}@1", built.digest, 256, 8, 64)
        # A page to its own, of which each time another part of the pool is mapped.
        lane = partial(KvLane, pool.device, ParkingArea(0))
        residents.append(Resident(spec, image, pool, 64, lane, lambda pages: None))
        images.append(image)
        segments.append(built.segment)
        assert residents[index].pages == 0
    first: dict[str, list[list[int]]] = {}
    shift = pool.take("something else", 1)
    for number in range(SWAPS):
        incoming = residents[number % 2]
        address = incoming.weights.address
        swap_in(incoming, str(number))
        found = answers(incoming, number * 100)
        assert found == first.setdefault(incoming.model, found)
        assert incoming.weights.address == address
        incoming.move(EngineStatus.DRAINING)
        incoming.move(EngineStatus.STAGED)
        incoming.evict()
        pool.give_back("something else", shift)
        shift = pool.take("something else", 1 + number % 5)
    pool.give_back("something else", shift)
    assert pool.free_pages == pool.total_pages
    for resident, image, segment in zip(residents, images, segments, strict=True):
        resident.close()
        image.close()
        segment.close()
    assert pool.device.statistics().reservations == 0
