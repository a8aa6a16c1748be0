"""The work list of decoding attention, held to the same list made in Python."""

from __future__ import annotations

import random

import pytest
import torch

from engine.kernels.triton.attention_work import items_max, list_work

SPLIT = 16


def expected(lengths: list[int], window: int) -> tuple[list[list[int]], list[int]]:
    items: list[list[int]] = []
    firsts = [0]
    for sequence, length in enumerate(lengths):
        visible = range(max(length - window, 0) if window else 0, length)
        splits = sorted({token // SPLIT for token in visible}) or [0]
        items += [[sequence, split] for split in splits]
        firsts.append(len(items))
    return items, firsts


@pytest.mark.parametrize("window", [0, 1, SPLIT, 40])
def test_every_split_with_a_visible_key_is_listed_once(window: int) -> None:
    chance = random.Random(window)
    edges = [0, 1, SPLIT - 1, SPLIT, SPLIT + 1, 70 * SPLIT, 70 * SPLIT + 1]
    for count in (1, 2, 7, 33):
        lengths = [chance.choice([*edges, chance.randrange(200)]) for _ in range(count)]
        room = items_max(count, sum(lengths), SPLIT, window)
        assert len(expected(lengths, window)[0]) <= room
        items = torch.full((room, 2), -1, dtype=torch.int32)
        firsts = torch.full((count + 1,), -1, dtype=torch.int32)
        list_work(
            torch.tensor(lengths, dtype=torch.int32),
            items,
            firsts,
            split_tokens=SPLIT,
            window_tokens=window,
        )
        wanted, wanted_firsts = expected(lengths, window)
        assert firsts.tolist() == wanted_firsts
        assert items[: len(wanted)].tolist() == wanted
        assert (items[len(wanted) :] == -1).all()
