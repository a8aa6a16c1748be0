"""The counter-based generator against its authors' published answers."""

from __future__ import annotations

import numpy as np
import pytest

from engine.philox import philox4x32, uniform

# The known answers for philox4x32-10 that its authors publish with their library.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[np.ndarray]:
    return [np.array([int(word, 16)], dtype=np.uint64) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    got = philox4x32(tuple(words(counter)), tuple(words(key)))
    assert " ".join(f"{int(word[0]):08x}" for word in got) == answer


def test_a_number_depends_on_seed_and_position_alone() -> None:
    seeds = [0, 1, 2**63, 2**64 - 1, 7, 7]
    positions = [0, 5, 2**33, 1, 1, 2]
    together = uniform(seeds, positions)
    alone = [uniform([seed], [place])[0] for seed, place in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone)
    assert uniform([-1], [1])[0] == together[3]


def test_numbers_are_spread_evenly() -> None:
    numbers = np.concatenate(
        [uniform([7] * 20_000, range(20_000)), uniform(range(20_000), [9] * 20_000)]
    )
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.histogram(numbers, bins=50, range=(0.0, 1.0))[0]
    chi_square = ((counts - 800) ** 2 / 800).sum()
    assert chi_square < 94.5  # 49 degrees of freedom, one in ten thousand
