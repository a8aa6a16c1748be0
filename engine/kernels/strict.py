"""What makes a result the same bit for bit, whatever else is computed beside it.

Owns the product of a fixed number of rows and the cutting of prompts into single tokens; pure
functions around others' operations. Libraries choose how they add by the number of rows, and
attention adds chunks of prompts in another order than decodes. So products are made of as many rows
at a time, always, those that lack being zeros; and each token of a prompt attends by itself, as it
would if it were decoded. Norms, activations, rotations and draws go row by row in any case; so do
the products of the processor's own operations (`engine.kernels.native`), which need nothing of it.
Invariant: what is computed for a token follows from its own sequence up to it, and from nothing
else of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional

from engine.kernels.protocol import Span
from engine.kernels.reference.dense import Linear

STRICT_ROWS = {"cuda": 64, "cpu": 16}
"""Rows of each product, by the kind of device: a batch of decodes in one launch on a GPU, and few
enough on a processor that one request alone does not wait long for rows that are nobody's."""


def of_fixed_rows(linear: Linear, rows_fixed: int) -> Linear:
    """`linear`, called with `rows_fixed` rows each time, that lie row by row on either side.

    How numbers lie decides which of them an operation takes as vectors and which one by one.
    """

    def fixed(
        rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        count = len(rows)
        whole = max(rows_fixed, -(-count // rows_fixed) * rows_fixed)
        if whole != count:
            rows = functional.pad(rows, (0, 0, 0, whole - count))
        rows = rows.contiguous()
        if whole == rows_fixed:
            return linear(rows, weight, bias).contiguous()[:count]
        parts = [
            linear(rows[first : first + rows_fixed], weight, bias).contiguous()
            for first in range(0, whole, rows_fixed)
        ]
        return torch.cat(parts)[:count]

    return fixed


def single_tokens(spans: Sequence[Span]) -> list[Span]:
    """The same tokens in the same order, each a span of its own."""
    return [
        Span(position, 1, span.blocks)
        for span in spans
        for position in range(span.start, span.start + span.count)
    ]
