"""Everything that a step needs from the host, in one pinned buffer and one copy.

Owns the two host buffers, which take turns, the device's buffer and where things lie in it. It
never decides what is computed. A buffer is [fixed columns of decodes][rows to sample][their edits]
[parts], of which only what is used is copied. Columns and rows lie at the same addresses in every
step, so a captured graph finds them; parts, block tables among them, begin at multiples of 16 bytes
wherever the one before ended. Invariant: a host buffer is written again only after the step before
the last has been collected, when its copy has long been made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.triton.rotate_and_store import NO_CELL
from engine.sampling_rows import RowBuffer

Numbers = npt.NDArray[np.int32]

ALIGNED_BYTES = 16
COLUMNS = ("tokens", "positions", "cells", "lengths", "starts")
"""Of decodes: token or -1 - row of the last step's draw; its position; where its keys and values
go; keys that it sees, itself included; where its block table begins, counted in int32."""
HOST_BUFFERS = 2


class StepInputs:
    """Numbers of one step after the other, for up to `rows_max` draws.

        inputs.begin()
        kind = inputs.sampling.pack(requests, vocabulary)
        places = inputs.add([positions, tables])
        inputs.send()
        positions, tables = inputs.parts(places)

    `part_numbers_max` bounds what is added, in numbers of int32.
    """

    def __init__(self, rows_max: int, part_numbers_max: int, device: torch.device) -> None:
        self._rows_max = -(-rows_max // 4) * 4
        self._sampling_at = len(COLUMNS) * self._rows_max * 4
        self._sampling_bytes = _aligned(RowBuffer.size_bytes(rows_max))
        size_bytes = _aligned(self._sampling_at + self._sampling_bytes + 4 * part_numbers_max)
        pinned = device.type == "cuda"
        self._hosts = [
            torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=pinned)
            for _ in range(HOST_BUFFERS)
        ]
        end = self._sampling_at + RowBuffer.size_bytes(rows_max)
        self._buffers = [
            RowBuffer(rows_max, memory=host.numpy()[self._sampling_at : end])
            for host in self._hosts
        ]
        self._turn = 0
        self._used_bytes = 0
        self._there = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
        self.copies = 0
        """Made to the device since it was made; one a step."""
        self.copied_bytes = 0
        self.sampled = self._there[self._sampling_at : end]
        """Rows and edits on the device."""
        self.numbers = self._there.view(torch.int32)
        """The whole buffer on the device, where tables are found by `starts`."""

    @property
    def size_bytes(self) -> int:
        """Of the device's buffer, and of each of the host's."""
        return self._there.numel()

    @property
    def sampling(self) -> RowBuffer:
        """The rows of the step being packed. To be packed before anything is added."""
        return self._buffers[self._turn]

    def begin(self) -> None:
        """Pack the next step, in the other buffer."""
        self._turn = (self._turn + 1) % HOST_BUFFERS
        self._used_bytes = 0

    def add(self, parts: Sequence[Numbers]) -> list[tuple[int, tuple[int, ...]]]:
        """Append parts; returns where each begins, counted in int32, and its shape.

        Raises ValueError when there is no room.
        """
        if not self._used_bytes:
            self._used_bytes = _aligned(self._sampling_at + self.sampling.used_bytes)
        host = self._hosts[self._turn].numpy()
        places = []
        for part in parts:
            begin, end = self._used_bytes, self._used_bytes + 4 * part.size
            if end > len(host):
                raise ValueError(f"a step's numbers take {end} bytes, and room is for {len(host)}")
            host[begin:end].view(np.int32)[:] = part.reshape(-1)
            places.append((begin // 4, part.shape))
            self._used_bytes = _aligned(end)
        return places

    def set_columns(
        self, tokens: Numbers, positions: Numbers, cells: Numbers, starts: Numbers, rows: int
    ) -> None:
        """Fill the columns of a batch of decodes, and what it lacks to `rows` with rows that are
        nobody's: they write nowhere and draw nothing."""
        count = len(tokens)
        whole = self._hosts[self._turn].numpy()[: self._sampling_at].view(np.int32)
        columns = whole.reshape(len(COLUMNS), self._rows_max)
        columns[:, count:rows] = 0
        columns[COLUMNS.index("cells"), count:rows] = NO_CELL
        columns[:, :count] = (tokens, positions, cells, positions + 1, starts)

    def column(self, name: str, rows: int) -> torch.Tensor:
        """The first `rows` numbers of a column, on the device; always at the same address."""
        first = COLUMNS.index(name) * self._rows_max
        return self.numbers[first : first + rows]

    def send(self) -> None:
        """Copy what was packed, in the order of what is launched."""
        used = max(self._used_bytes, _aligned(self._sampling_at + self.sampling.used_bytes))
        self._there[:used].copy_(self._hosts[self._turn][:used], non_blocking=True)
        self.copies += 1
        self.copied_bytes += used

    def parts(self, places: Sequence[tuple[int, tuple[int, ...]]]) -> list[torch.Tensor]:
        """Views of added parts on the device."""
        return [
            self.numbers[begin : begin + int(np.prod(shape))].view(shape) for begin, shape in places
        ]


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
