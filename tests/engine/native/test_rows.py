"""Norms, activations and rotation by the library, held to torch's and to exact ones."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from engine.kernels.native.kernels import HEAD_DIMS, NativeKernels
from engine.kernels.protocol import Span
from engine.kernels.reference import dense
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kernels.reference.paged_attention import paged_views
from engine.kv_layout import KvLayout
from tests.engine.native.exactness import DTYPES, assert_exact
from tests.engine.sequences import PAGE_BYTES, make_spec

UNTOUCHED = 1000.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 64, 100])
def test_norms_and_activations(loaded: ctypes.CDLL, dtype: torch.dtype, width: int) -> None:
    """Of widths that are whole registers and that are not."""
    spec = make_spec(4, 2, 16)
    layout = KvLayout.choose(spec, str(dtype).removeprefix("torch."), PAGE_BYTES)
    kernels = NativeKernels(spec, layout, torch.zeros(PAGE_BYTES, dtype=torch.uint8), loaded=loaded)
    added, residual = torch.randn(9, width).to(dtype), torch.randn(9, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    summed = residual + added
    exact = summed.double() / (summed.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    own = residual.clone()
    found = kernels.add_rms_norm(added, own, weight, 1e-5)
    assert torch.equal(own, summed)
    assert_exact(found, dense.rms_norm(summed, weight, 1e-5), exact * weight.double())
    wide = 8 * torch.randn(9, 2 * width).to(dtype)
    gate, up = wide.double().chunk(2, dim=1)
    assert_exact(
        kernels.gated_activation(wide), dense.gated_activation(wide), functional.silu(gate) * up
    )
    assert kernels.gated_activation(wide[:0]).shape == (0, width)
    columns = wide.t().contiguous().t()
    assert torch.equal(kernels.gated_activation(columns), kernels.gated_activation(wide))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_row_with_a_number_that_is_none_is_none(loaded: ctypes.CDLL, number: float) -> None:
    """And the rows beside it are."""
    spec = make_spec(4, 2, 16)
    layout = KvLayout.choose(spec, "float32", PAGE_BYTES)
    kernels = NativeKernels(spec, layout, torch.zeros(PAGE_BYTES, dtype=torch.uint8), loaded=loaded)
    rows = torch.ones(3, 40)
    rows[1, 39] = number
    residual = torch.zeros(3, 40)
    normed = kernels.add_rms_norm(rows, residual, torch.ones(40), 1e-6)
    assert torch.isfinite(normed).all(dim=1).tolist() == [True, False, True]
    assert torch.isfinite(kernels.gated_activation(rows)).all(dim=1).tolist() == [True, False, True]


def test_gates_far_from_zero_are_open_or_shut(loaded: ctypes.CDLL) -> None:
    spec = make_spec(4, 2, 16)
    layout = KvLayout.choose(spec, "float32", PAGE_BYTES)
    kernels = NativeKernels(spec, layout, torch.zeros(PAGE_BYTES, dtype=torch.uint8), loaded=loaded)
    gates = torch.tensor([-3e38, -1e36, -200.0, -89.0, -20.0, 20.0, 89.0, 1e38])
    wide = torch.cat((gates, torch.full((8,), 2.0)))[None]
    wanted = functional.silu(gates.double()) * 2
    assert torch.allclose(kernels.gated_activation(wide)[0].double(), wanted, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_head_norms_are_the_references(
    loaded: ctypes.CDLL, dtype: torch.dtype, dim: int, normed: bool
) -> None:
    """And their exactness: the same in float32 is what bfloat16 is held to."""
    spec = make_spec(3, 3, dim)
    qkv = torch.randn(40, 9 * dim).to(dtype)
    norms = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)) if normed else None

    def run(make: Any, computed: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        layout = KvLayout.choose(spec, str(computed).removeprefix("torch."), 4 * PAGE_BYTES)
        layout = replace(layout, block_tokens=8)
        memory = torch.full((20 * layout.page_elements,), UNTOUCHED, dtype=computed)
        kernels = make(spec, layout, memory.view(torch.uint8))
        plan = kernels.plan([Span(8, 40, list(range(5, 5 + 6)))], torch.arange(8, 48))
        its = None if norms is None else (norms[0].to(computed), norms[1].to(computed))
        queries = kernels.rotate_and_store(1, qkv.to(computed), its, 1e-6, plan)
        return queries, paged_views(layout, memory.view(torch.uint8))[:, 1].transpose(0, 1)

    own, torchs = run(partial(NativeKernels, loaded=loaded), dtype), run(ReferenceKernels, dtype)
    exact = run(ReferenceKernels, torch.float32)
    assert torch.equal(own[1] == UNTOUCHED, torchs[1] == UNTOUCHED), "stored elsewhere"
    assert torch.equal(own[1][1], torchs[1][1]), "values are stored as they are"
    assert_exact(own[0], torchs[0], exact[0].double())
    stored = torchs[1] != UNTOUCHED
    exactly = exact[1][exact[1] != UNTOUCHED].double()
    assert_exact(own[1][stored], torchs[1][stored], exactly)
