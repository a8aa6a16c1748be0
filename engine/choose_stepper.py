"""How an engine computes its steps: as the device does that its KV is on.

Owns that choice alone. Triton is imported only where it computes.
"""

from __future__ import annotations

import torch

from engine.graphs import Graphs
from engine.kernels.choose import choose_kernels
from engine.kv_layout import KvLayout
from engine.limits import EngineLimits
from engine.models.spec import ModelSpec
from engine.stepper import HostStepper, Stepper
from engine.workspace import Workspace


def choose_stepper(
    spec: ModelSpec,
    layout: KvLayout,
    memory: torch.Tensor,
    limits: EngineLimits,
    graphs: Graphs | None = None,
    workspace: Workspace | None = None,
) -> Stepper:
    """Triton's kernels on a GPU, torch's elsewhere; `memory` is the KV memory as uint8.

    `graphs` captures steps, and `workspace` is what they compute in, where the device has use for
    them: engines of one worker share both.
    """
    if memory.device.type == "cuda":
        from engine.device_stepper import DeviceStepper

        return DeviceStepper(spec, layout, memory, limits, graphs, workspace)
    return HostStepper(
        choose_kernels(spec, layout, memory, strict=limits.strict),
        memory.device,
        strict=limits.strict,
    )
