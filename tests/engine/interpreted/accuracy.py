"""How far a kernel may be from the exact result: what torch's own roundings cost, and no more."""

from __future__ import annotations

import torch

ERROR_RATIO_MAX = 2.0
"""Error of a kernel over torch's own in the same dtype."""


def assert_as_exact_as_torch(
    found: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor
) -> None:
    """`found` and torch's `reference` of one dtype, `exact` the same in float64."""
    assert found.dtype is reference.dtype
    assert found.shape == exact.shape
    assert torch.isfinite(found).all()
    if found.numel():
        own = (found.double() - exact).abs().max().item()
        allowed = (reference.double() - exact).abs().max().item()
        # One unit of rounding of the largest value: torch may be exact by chance.
        unit = torch.finfo(found.dtype).eps * exact.abs().max().item()
        assert own <= max(ERROR_RATIO_MAX * allowed, unit), (own, allowed)
