"""What steps compute in and leave nothing behind in: one for all engines of a worker.

Owns device memory by what it is for, each piece as large as the largest engine asked for. It never
frees a piece that somebody holds. Invariant: steps of a worker are computed one after another, in
the order of one stream, so that whoever computes has all of a piece to itself; what must outlast a
step is an engine's own. A piece that grows is made anew, and an engine that was made before keeps
the one it has, for its graphs hold the address.
"""

from __future__ import annotations

import math

import torch


class Workspace:
    """Pieces of memory of one device, made when they are first asked for."""

    def __init__(self) -> None:
        self._pieces: dict[str, torch.Tensor] = {}

    @property
    def size_bytes(self) -> int:
        """Of the pieces that engines made from now on would be lent."""
        return sum(piece.numel() for piece in self._pieces.values())

    def lend(
        self, purpose: str, *shape: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A contiguous tensor with anything in it, over the piece for `purpose`."""
        size_bytes = math.prod(shape) * dtype.itemsize
        piece = self._pieces.get(purpose)
        if piece is None or piece.numel() < size_bytes:
            piece = torch.empty(size_bytes, dtype=torch.uint8, device=device)
            self._pieces[purpose] = piece
        return piece[:size_bytes].view(dtype).view(shape)
