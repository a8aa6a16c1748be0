"""Which spans of a step attend together, padded to one shape.

Owns the trade between padding and calls; pure arithmetic. Invariant: groups are consecutive runs of
the spans, in order, and every span is in exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence

PADDING_MAX = 1.5
"""Work of a padded group over the work its members have: more calls cost more beyond it."""
GROUP_KEYS_BYTES_MAX = 4 << 20
"""Keys of one layer that a group gathers, padding included, unless one sequence has more: as many
values come with them, and what was gathered should still be in the cache when it is read. Measured
on a busy core of a Zen 5 (L2 1 MiB, L3 32 MiB) against groups without this bound, alternately, as
medians of a layer's attention with 512 tokens each: 10.8 against 14.4 ms for 32 sequences of 4 key
heads of 64, 8.4 against 13.0 ms for 8 and 43 against 67 ms for 32 of 8 key heads of 128. Of bounds
from 1 to 16 MiB this was the best or near it."""
GROUP_PAIRS_MAX = 1 << 17
"""Queries times blocks of a group, padding included: bounds the memory of its mask."""


def group_runs(
    shapes: Sequence[tuple[int, int]], block_keys_bytes: int, padding_max: float = PADDING_MAX
) -> list[slice]:
    """Runs of `shapes`, (queries, blocks) of each span, that are worth computing as one.

    `block_keys_bytes` is what the keys of one layer take in a block. With a `padding_max` of 1
    nothing is padded. Decodes (one query) never share a group with prompts, whose computation
    differs.
    """
    runs: list[slice] = []
    first, useful, widest, longest = 0, 0, 0, 0
    for index, (queries, blocks) in enumerate(shapes):
        new_widest, new_longest = max(widest, queries), max(longest, blocks)
        members = index - first + 1
        padded = members * new_widest * new_longest
        own = useful + queries * blocks
        if index > first and (
            (queries > 1) != (shapes[first][0] > 1)
            or padded > padding_max * own
            or padded > GROUP_PAIRS_MAX
            or members * new_longest * block_keys_bytes > GROUP_KEYS_BYTES_MAX
        ):
            runs.append(slice(first, index))
            first, own, new_widest, new_longest = index, queries * blocks, queries, blocks
        useful, widest, longest = own, new_widest, new_longest
    if shapes:
        runs.append(slice(first, len(shapes)))
    return runs
