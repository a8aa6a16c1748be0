"""Which spans of a step attend together, padded to one shape.

Owns the trade between padding and calls; pure arithmetic. Invariant: groups are consecutive runs of
the spans, in order, and every span is in exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence

PADDING_MAX = 1.5
"""Work of a padded group over the work its members have: more calls cost more beyond it."""
GROUP_BLOCKS_MAX = 2048
"""Blocks a group gathers, padding included: bounds the memory of the copies of keys and values."""
GROUP_PAIRS_MAX = 1 << 17
"""Queries times blocks of a group, padding included: bounds the memory of its mask."""


def group_runs(shapes: Sequence[tuple[int, int]]) -> list[slice]:
    """Runs of `shapes`, (queries, blocks) of each span, that are worth computing as one.

    Decodes (one query) never share a group with prompts, whose computation differs.
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
            or padded > PADDING_MAX * own
            or padded > GROUP_PAIRS_MAX
            or members * new_longest > GROUP_BLOCKS_MAX
        ):
            runs.append(slice(first, index))
            first, own, new_widest, new_longest = index, queries * blocks, queries, blocks
        useful, widest, longest = own, new_widest, new_longest
    if shapes:
        runs.append(slice(first, len(shapes)))
    return runs
