"""Unpacking packed bfloat16 on the GPU, behind the copy that brings the pieces.

One piece a launch (see `swap.packing` for its parts), in, as bytes: [piece.size_bytes] uint8; out:
[piece.weights] bfloat16 as int16 bits; `faults` [1] int32 counts blocks whose escapes are not as
many as their exceptions. Grid: one program for each block of 4096 weights, in any order. Moves
1.5 bytes (codes of 4 bits) or 1.375 (3 bits) in and 2 out for each weight, and the exceptions;
the table of exponents is read from the piece's own header and stays in the cache. Equals
`swap.packing.unpack` bit for bit. Never reads outside the piece or writes outside the weights,
whatever the device holds: the host's copy was checked, and masks follow from it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from engine.kernels.triton.variants import Variant
from swap.packing import (
    BLOCK_WEIGHTS,
    CODE_BITS,
    TABLE_OFFSET_BYTES,
    WEIGHT_BYTES,
    Piece,
    wrong_exceptions,
)

WARPS = 8
PIECES_AHEAD = 16
"""A piece is unpacked in a small part of the time in which it is copied; with so many begun behind
it, a thread that is woken late does not hold the others up."""


@triton.jit(do_not_specialize=["weights", "exceptions"])
def unpack_kernel(
    piece,
    out,
    faults,
    weights,
    exceptions,
    offsets_at,
    signs_at,
    codes_at,
    exceptions_at,
    CODE_BITS: tl.constexpr,
    TABLE_AT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    signs = tl.load(piece + signs_at + at).to(tl.int32)
    if CODE_BITS == 4:
        pair = tl.load(piece + codes_at + at // 2).to(tl.int32)
        code = (pair >> ((at % 2) * 4)) & 15
    else:
        high_at = codes_at + tl.num_programs(0) * (BLOCK // 4)
        low = tl.load(piece + codes_at + at // 4).to(tl.int32)
        high = tl.load(piece + high_at + at // 8).to(tl.int32)
        code = ((low >> ((at % 4) * 2)) & 3) | (((high >> (at % 8)) & 1) << 2)
    escaped = code == (1 << CODE_BITS) - 1
    exponent = tl.load(piece + TABLE_AT + code).to(tl.int32)
    # The n-th escape of a block is its n-th exception.
    offsets = (piece + offsets_at).to(tl.pointer_type(tl.int32))
    first = tl.load(offsets + block)
    end = tl.minimum(tl.load(offsets + block + 1), exceptions)
    place = first + tl.cumsum(escaped.to(tl.int32), axis=0) - 1
    inside = escaped & (place >= 0) & (place < end)
    exception = tl.load(piece + exceptions_at + place, mask=inside, other=0).to(tl.int32)
    exponent = tl.where(escaped, exception, exponent)
    found = tl.sum(escaped.to(tl.int32), axis=0)
    tl.atomic_add(faults, 1, mask=found != end - first)
    bits = ((signs & 0x80) << 8) | (exponent << 7) | (signs & 0x7F)
    tl.store(out + at, bits.to(tl.int16), mask=at < weights)


def launch(piece: Piece, source: torch.Tensor, out: torch.Tensor, faults: torch.Tensor) -> None:
    """Start unpacking the piece whose bytes are in `source` [size_bytes] into `out` [weights]."""
    blocks = len(piece.offsets) - 1
    offsets_at, signs_at, codes_at, exceptions_at = piece.part_offsets_bytes
    unpack_kernel[(blocks,)](
        source,
        out,
        faults,
        piece.weights,
        len(piece.exceptions),
        offsets_at,
        signs_at,
        codes_at,
        exceptions_at,
        CODE_BITS=piece.code_bits,
        TABLE_AT=TABLE_OFFSET_BYTES,
        BLOCK=BLOCK_WEIGHTS,
        num_warps=WARPS,
    )


def variants() -> Iterator[Variant]:
    places = ("offsets_at", "signs_at", "codes_at", "exceptions_at")
    signature = {
        "piece": "*u8:16",
        "out": "*i16:16",
        "faults": "*i32:16",
        "weights": "i32",
        "exceptions": "i32",
        **dict.fromkeys(places, "i32:16"),
    }
    for bits in CODE_BITS:
        yield Variant(
            f"codes of {bits} bits",
            unpack_kernel,
            signature,
            {"CODE_BITS": bits, "TABLE_AT": TABLE_OFFSET_BYTES, "BLOCK": BLOCK_WEIGHTS},
            num_warps=WARPS,
        )


class TritonUnpacker:
    """A `swap.unpacking.Unpacker` for pieces within `memory`, on a stream of its own.

    `memory` are the device's bytes from `address` on, as [bytes] uint8. Used by one thread. The
    stream does not wait for what is computed on others, nor they for it. In triton's interpreter
    memory is the host's, and a piece is unpacked when it is begun.
    """

    pieces_ahead = PIECES_AHEAD

    def __init__(self, memory: torch.Tensor, address: int) -> None:
        self._memory = memory
        self._address = address
        self._stream = torch.cuda.Stream(memory.device) if memory.is_cuda else None
        self._events: collections.deque[tuple[int, torch.cuda.Event]] = collections.deque()
        self._begun = 0
        with self._on_stream():
            self._faults = torch.zeros(1, dtype=torch.int32, device=memory.device)

    def unpack(self, piece: Piece, source: int, destination: int) -> int:
        """Launch the kernel for a piece."""
        out = self._view(destination, piece.weights * WEIGHT_BYTES).view(torch.int16)
        with self._on_stream():
            launch(piece, self._view(source, piece.size_bytes), out, self._faults)
            return self._number()

    def move(self, source: int, destination: int, size_bytes: int) -> int:
        """Copy on the device."""
        with self._on_stream():
            self._view(destination, size_bytes).copy_(self._view(source, size_bytes))
            return self._number()

    def wait(self, number: int) -> None:
        while self._events and self._events[0][0] <= number:
            self._events.popleft()[1].synchronize()

    def check(self) -> None:
        with self._on_stream():
            if self._faults.item():  # waits for everything before
                raise wrong_exceptions()

    def _view(self, address: int, size_bytes: int) -> torch.Tensor:
        first = address - self._address
        return self._memory[first : first + size_bytes]

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _number(self) -> int:
        self._begun += 1
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
            self._events.append((self._begun, event))
        return self._begun
