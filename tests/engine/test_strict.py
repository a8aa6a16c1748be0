"""What strict engines are made of: products of fixed rows, and steps of a bounded size.

That their results are the same bits in any company, whatever happens, is `test_composition.py`'s.
"""

from __future__ import annotations

import pytest
import torch

from engine.kernels.reference.dense import choose_linear
from engine.kernels.strict import STRICT_ROWS, of_fixed_rows
from engine.limits import STRICT_STEP_TOKENS_MAX, EngineLimits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_fixed_rows(dtype: torch.dtype) -> None:
    linear = choose_linear(dtype, torch.device("cpu"))
    fixed = of_fixed_rows(linear, STRICT_ROWS["cpu"])
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(70, 96, generator=generator).to(dtype)
    weight = torch.randn(48, 96, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    whole = fixed(rows, weight, bias)
    torch.testing.assert_close(whole, torch.nn.functional.linear(rows, weight, bias))
    for first, count in ((0, 1), (3, 2), (5, 16), (9, 17), (1, 60)):
        part = fixed(rows[first : first + count], weight, bias)
        assert torch.equal(part, whole[first : first + count])
    assert fixed(rows[:0], weight).shape == (0, 48)
    columns = rows[:16].t().contiguous().t()
    assert torch.equal(fixed(columns, weight, bias), whole[:16])
    assert fixed(columns, weight).is_contiguous()


def test_steps_of_a_strict_engine_are_bounded() -> None:
    EngineLimits(128, step_tokens=STRICT_STEP_TOKENS_MAX, strict=True)
    with pytest.raises(ValueError, match="step_tokens"):
        EngineLimits(128, step_tokens=STRICT_STEP_TOKENS_MAX + 1, strict=True)
