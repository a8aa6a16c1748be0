"""The gated activation in one launch, held to torch's in two."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.reference import dense
from engine.kernels.triton.gated_activation import BLOCK_ELEMENTS, gated_activation
from tests.engine.interpreted.accuracy import assert_as_exact_as_torch

WIDTHS = [1, 63, 96, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_equals_torch(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    apart = torch.full((3, 2 * width + 5), float("nan"), dtype=dtype)
    apart[:, : 2 * width] = (torch.randn(3, 2 * width, generator=generator) * 4).to(dtype)
    gate_up = apart[:, : 2 * width]
    wide = gate_up.double()
    exact = torch.nn.functional.silu(wide[:, :width]) * wide[:, width:]
    found = gated_activation(gate_up)
    assert found.is_contiguous()
    assert_as_exact_as_torch(found, dense.gated_activation(gate_up), exact)


def test_no_rows_are_no_launch() -> None:
    assert gated_activation(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_large_gates_saturate() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -1e4, 1e4, 2.0, 2.0, 2.0, 2.0]])
    assert gated_activation(gate_up).tolist() == [[0.0, 400.0, 0.0, 2e4]]
