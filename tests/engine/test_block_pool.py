"""Blocks and pages: how many fit, who holds them, and when pages come and go."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from engine.block_pool import PAGES_GROW, BlockPool
from engine.errors import BlockTooLarge
from engine.kv_layout import KvLayout
from engine.kv_space import KvSpace, PlainKvSpace, RegionKvSpace
from engine.models.spec import ModelSpec, Rope
from swap.arena import PagePool, Region
from swap.host_device import HostDevice

PAGE_BYTES = 2 << 20


def shape(layers: int, kv_heads: int, head_dim: int) -> ModelSpec:
    return ModelSpec(
        "llama", layers, 64, kv_heads, kv_heads, head_dim, 96, 100, 128, True, 1e-6, Rope(1e4), ()
    )


@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "dtype", "tokens", "blocks"),
    [
        (4, 2, 32, "float32", 32, 32),
        (8, 4, 64, "float32", 32, 4),
        (8, 4, 80, "float32", 32, 3),
        (32, 8, 128, "bfloat16", 16, 1),
        (32, 8, 128, "float32", 8, 1),
        (61, 16, 256, "float32", 1, 1),
    ],
)
def test_the_largest_block_that_fits_a_page(
    layers: int, kv_heads: int, head_dim: int, dtype: str, tokens: int, blocks: int
) -> None:
    layout = KvLayout.choose(shape(layers, kv_heads, head_dim), dtype, PAGE_BYTES)
    assert (layout.block_tokens, layout.blocks_per_page) == (tokens, blocks)
    assert layout.blocks_per_page * layout.block_bytes <= PAGE_BYTES
    assert layout.blocks_for(tokens + 1) == 2
    assert layout.pages_for(tokens * blocks + 1) == 2


def test_a_token_larger_than_a_page_is_refused_with_the_figure() -> None:
    with pytest.raises(BlockTooLarge, match="at least 2097664 bytes"):
        KvLayout.choose(shape(1, 2, 131104), "float32", PAGE_BYTES)


def test_pages_are_grown_ahead_and_given_back_from_the_end() -> None:
    space = PlainKvSpace(PAGE_BYTES, 20)
    pool = BlockPool(space, 3)
    assert pool.pages == 0
    first = pool.take(4)
    assert first == [0, 1, 2, 3]
    assert pool.pages == PAGES_GROW
    pool.give_back([0])
    assert pool.trim() == PAGES_GROW - 2  # block 3 is in the second page
    assert pool.take(2) == [0, 4]
    pool.check()
    pool.give_back([0, 1, 2, 3, 4])
    assert pool.trim() == 2
    assert (pool.used, space.pages) == (0, 0)


def test_taking_is_all_or_nothing() -> None:
    pool = BlockPool(PlainKvSpace(PAGE_BYTES, 2), 3)
    assert pool.take(7) is None
    assert pool.used == 0
    assert pool.take(6) == [0, 1, 2, 3, 4, 5]
    assert pool.take(1) is None
    assert pool.take(0) == []
    pool.check()


def test_giving_back_what_is_not_held_is_a_bug() -> None:
    pool = BlockPool(PlainKvSpace(PAGE_BYTES, 2), 3)
    pool.take(2)
    pool.give_back([1])
    with pytest.raises(ValueError, match="block 1 is not held"):
        pool.give_back([1])


@pytest.fixture(params=["plain", "region"])
def space(request: pytest.FixtureRequest) -> Iterator[KvSpace]:
    if request.param == "plain":
        yield PlainKvSpace(PAGE_BYTES, 12)
        return
    device = HostDevice(16 * PAGE_BYTES, page_bytes=PAGE_BYTES)
    region = Region(PagePool(device), "kv", 12 * PAGE_BYTES)
    yield RegionKvSpace(region)
    region.release()
    device.close()


def test_every_space_keeps_the_same_contract(space: KvSpace) -> None:
    assert (space.page_bytes, space.pages_max, space.pages) == (PAGE_BYTES, 12, 0)
    assert space.grow(5) == 5
    memory = space.memory()
    assert memory.numel() == 12 * PAGE_BYTES
    memory[5 * PAGE_BYTES - 1] = 7
    assert space.grow(100) == 7
    assert space.memory()[5 * PAGE_BYTES - 1] == 7
    assert space.grow(1) == 0
    space.shrink(12)
    assert space.pages == 0


def test_others_take_pages_from_the_same_arena() -> None:
    device = HostDevice(8 * PAGE_BYTES, page_bytes=PAGE_BYTES)
    pages = PagePool(device)
    weights = Region(pages, "weights", 6 * PAGE_BYTES)
    weights.grow(6)
    region = Region(pages, "kv", 8 * PAGE_BYTES)
    pool = BlockPool(RegionKvSpace(region), 2)
    assert pool.take(4) == [0, 1, 2, 3]
    assert pool.take(1) is None
    weights.shrink(6)
    assert pool.take(1) == [4]
    pool.give_back(range(5))
    pool.trim()
    assert pages.free_pages == 8
    region.release()
    weights.release()
    device.close()


def test_the_account_under_random_use() -> None:
    chance = random.Random(5)
    space = PlainKvSpace(PAGE_BYTES, 30)
    pool = BlockPool(space, 3)
    held: list[list[int]] = []
    for _ in range(3000):
        space.pages_available = chance.randrange(31)
        if held and chance.random() < 0.5:
            pool.give_back(held.pop(chance.randrange(len(held))))
        else:
            blocks = pool.take(chance.randrange(12))
            held += [blocks] if blocks is not None else []
        if chance.random() < 0.1:
            pool.trim()
        pool.check()
        assert pool.used == sum(map(len, held))
