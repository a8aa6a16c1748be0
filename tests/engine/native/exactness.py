"""How far a result may be from the exact one, by its dtype."""

from __future__ import annotations

import torch

from tests.engine.interpreted.accuracy import assert_as_exact_as_torch

DTYPES = [torch.float32, torch.bfloat16]
ROUNDINGS = 16


def assert_exact(found: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    """Of bfloat16, as torch's is; of float32, within a few roundings of the largest number."""
    if found.dtype is torch.bfloat16:
        assert_as_exact_as_torch(found, torchs, exact)
    elif found.numel():
        unit = torch.finfo(found.dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= ROUNDINGS * unit
