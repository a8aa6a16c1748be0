"""What unpacks packed images on each kind of device, and whether it does.

It owns the choice, and the trial that comes before it: on a GPU the kernel is compiled and has to
give the reference's bits, in the background, before an image that needs it is taken. It never
decides when anything is unpacked. Invariant: after `prepare_unpacking` a swap compiles nothing.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from engine.device_tensors import bytes_at
from swap.errors import DeviceError
from swap.image import TENSOR_ALIGNMENT_BYTES
from swap.packing import BLOCK_WEIGHTS, CODE_BITS, Weights, pack, read_piece
from swap.unpacking import HostUnpacker, Unpacker

Kind = Literal["host", "cuda"]
HINT = "set host_store.packed = false, or mend that"


def open_unpacker(kind: Kind, address: int, size_bytes: int) -> Unpacker:
    """An unpacker for the calling thread, of pieces in this much device memory from `address`."""
    if kind == "host":
        return HostUnpacker()
    from engine.kernels.triton.unpack import TritonUnpacker  # only here: a host device has none

    return TritonUnpacker(bytes_at(kind, address, size_bytes), address)


def prepare_unpacking(kind: Kind) -> None:
    """Have everything ready that unpacking on the device takes. Slow the first time; from any
    thread. Raises DeviceError where packed images cannot be unpacked."""
    if kind != "host":
        try_unpacking(torch.device("cuda"))


def try_unpacking(device: torch.device) -> None:
    """Unpack a piece with each kind of codes, and compare. Raises DeviceError."""
    for bits in CODE_BITS:
        try:
            alike = _unpacks(sample_weights(bits), device)
        except Exception as error:  # no triton, no compiler for it, a GPU that it does not know
            raise DeviceError(
                f"packed images cannot be unpacked on {device}: {error}; {HINT}"
            ) from error
        if not alike:
            raise DeviceError(
                f"packed images cannot be unpacked on {device}: with codes of {bits} bits other "
                f"weights came out than were packed; {HINT}"
            )


def _unpacks(weights: Weights, device: torch.device) -> bool:
    from engine.kernels.triton.unpack import TritonUnpacker

    packed = pack(weights)
    assert packed is not None
    target = -(-len(packed) // TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES
    memory = torch.zeros(target + weights.nbytes, dtype=torch.uint8, device=device)
    memory[: len(packed)] = torch.from_numpy(packed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the unpacker's stream does not wait for this one
    unpacker = TritonUnpacker(memory, 0)
    unpacker.unpack(read_piece(packed, len(weights)), 0, target)
    unpacker.check()
    return np.array_equal(memory[target:].cpu().numpy().view(np.uint16), weights)


def sample_weights(code_bits: int) -> Weights:
    """Some blocks and a part of weights that are best packed with such codes, with escapes."""
    count = 8 * BLOCK_WEIGHTS + 100
    draw = np.random.default_rng(code_bits)
    exponents = 100 + draw.integers(0, (1 << code_bits) - 1, count)
    exponents[:: BLOCK_WEIGHTS // 8] = 200
    signs = draw.integers(0, 1 << 16, count) & 0x807F
    weights: Weights = (signs | exponents << 7).astype(np.uint16)
    return weights
