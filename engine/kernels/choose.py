"""Which operations an engine computes with: those of the device its KV is on.

Owns that choice alone. Triton is imported only where it computes.
"""

from __future__ import annotations

import torch

from engine.kernels.native.kernels import NativeKernels, computes
from engine.kernels.protocol import Kernels
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kv_layout import KvLayout
from engine.models.spec import ModelSpec


def choose_kernels(
    spec: ModelSpec, layout: KvLayout, memory: torch.Tensor, *, strict: bool = False
) -> Kernels:
    """Triton's on a GPU, and elsewhere the native library's where it has all that the model needs,
    or torch's. `memory` is the KV memory as uint8."""
    if memory.device.type == "cuda":
        from engine.kernels.triton.kernels import TritonKernels

        return TritonKernels(spec, layout, memory, strict=strict)
    if memory.device.type == "cpu" and computes(spec, layout):
        return NativeKernels(spec, layout, memory, strict=strict)
    return ReferenceKernels(spec, layout, memory, strict=strict)
