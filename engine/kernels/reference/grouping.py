"""Which spans of a step attend together, padded to one shape.

Owns the trade between padding and calls; pure arithmetic. Invariant: groups are consecutive runs of
the spans, in order, and every span is in exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence

PADDING_MAX = 1.5
"""Work of a padded group over the work its members have: more calls cost more beyond it."""
GROUP_KEYS_BYTES_MAX = 1 << 20
"""Keys of one layer that a group gathers, padding included, unless one sequence has more: what was
gathered should still be in a core's own cache when it is read, and when as many values come after
them to the same place. Measured on one busy core of a Sapphire Rapids (L2 2 MiB) as a layer's
attention, alternately: 32 sequences of 4 key heads of 64 and 128 tokens take 1.04 to 1.05 ms with
bounds of 512 KiB and 1 MiB, 1.23 ms with 2 MiB, and 1.27 ms with 4 MiB; 0.80 ms of it is reading
the KV from memory, which nothing avoids."""
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
