"""The limits that the engine's speed is held against, measured on the device it runs on.

Owns the measuring of memory and of matrix products, and the arithmetic of what a step must read and
compute. It never runs an engine. Invariant: bytes and operations are the least that the computation
needs: each weight once a step, each key and value once for each query that sees it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.models.spec import DTYPE_BYTES, ModelSpec

HOST_READ_BYTES = 256 << 20
CUDA_READ_BYTES = 4 << 30
TRIES = 8
MATMUL_SHAPES = {"cuda": (8192, 8192, 8192), "cpu": (512, 1024, 4096)}


@dataclass(frozen=True)
class Limits:
    """What a device can do at most, in bytes and operations per second."""

    bytes_per_s: float
    operations_per_s: float


def measure(device: torch.device, dtype: str, *, small: bool = False) -> Limits:
    """Both limits as they are now; `small` is for dry runs, whose figures mean nothing."""
    return Limits(_memory_rate(device, small), _matmul_rate(device, dtype, small))


def seconds_of(operation: Callable[[], object], device: torch.device, tries: int = TRIES) -> float:
    """The least time that an operation takes, of some tries after one that is not counted."""
    operation()
    best = float("inf")
    for _ in range(tries):
        _wait(device)
        started = time.perf_counter()
        operation()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def decode_bytes(spec: ModelSpec, dtype: str, batch: int, context_tokens: int) -> int:
    """What a step of `batch` decodes reads: all weights but the embedding that is looked up, and
    the keys and values of every sequence."""
    looked_up = 0 if spec.tied else spec.vocabulary * spec.hidden
    weights = (spec.parameters - looked_up) * DTYPE_BYTES[dtype]
    return weights + batch * context_tokens * spec.kv_bytes_per_token(dtype)


def prefill_operations(spec: ModelSpec, tokens: int) -> int:
    """Multiplications and additions of one prompt: each token through each layer's weights, each
    query with the keys and values before it, and one row of logits."""
    outside = spec.vocabulary * spec.hidden * (1 if spec.tied else 2)
    weights = spec.parameters - outside
    attention = 2 * spec.layers * spec.heads * spec.head_dim * tokens * (tokens + 1)
    return 2 * weights * tokens + attention + 2 * spec.vocabulary * spec.hidden


def _memory_rate(device: torch.device, small: bool) -> float:
    cuda = device.type == "cuda"
    size_bytes = 8 << 20 if small else CUDA_READ_BYTES if cuda else HOST_READ_BYTES
    numbers = torch.ones(size_bytes // 4, device=device)
    if not cuda:
        return size_bytes / seconds_of(numbers.sum, device)
    # A copy reads and writes: no sum of torch's is as fast as the memory.
    target = torch.empty_like(numbers)
    return 2 * size_bytes / seconds_of(lambda: target.copy_(numbers), device)


def _matmul_rate(device: torch.device, dtype: str, small: bool) -> float:
    rows, inner, columns = (64, 64, 64) if small else MATMUL_SHAPES[device.type]
    left = torch.randn(rows, inner, device=device).to(getattr(torch, dtype))
    right = torch.randn(columns, inner, device=device).to(getattr(torch, dtype))
    seconds = seconds_of(lambda: torch.nn.functional.linear(left, right), device)
    return 2 * rows * inner * columns / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
