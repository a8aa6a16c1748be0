"""The native library's operations, of each level this processor runs, held to torch's and to exact
ones; and that what it computes for a token is the same bit for bit whatever is beside it."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from engine.kernels.choose import choose_kernels
from engine.kernels.native.kernels import HEAD_DIMS, NativeKernels, computes
from engine.kernels.native.library import levels_here, load
from engine.kernels.native.products import LIBRARYS_ROWS, Products
from engine.kernels.protocol import Span
from engine.kernels.reference import dense
from engine.kernels.reference.kernels import ReferenceKernels
from engine.kernels.reference.paged_attention import paged_views
from engine.kv_layout import KvLayout
from tests.engine.interpreted.accuracy import assert_as_exact_as_torch
from tests.engine.paged_stage import Stage
from tests.engine.sequences import PAGE_BYTES, Sequences, make_spec

LEVELS = [level for level in levels_here() if load(level) is not None]
DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 32
UNTOUCHED = 1000.0
ROUNDINGS = 16
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 15, 16, 17, 700]

pytestmark = pytest.mark.skipif(not LEVELS, reason="no library was compiled for this processor")


@pytest.fixture(params=LEVELS)
def loaded(request: pytest.FixtureRequest) -> ctypes.CDLL:
    found = load(request.param)
    assert found is not None
    return found


def exactness(name: str) -> float:
    return 1e-5 if name == "float32" else 0.05


def assert_exact(found: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    """Of bfloat16, as torch's is; of float32, within a few roundings of the largest number."""
    if found.dtype is torch.bfloat16:
        assert_as_exact_as_torch(found, torchs, exact)
    elif found.numel():
        unit = torch.finfo(found.dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= ROUNDINGS * unit


def attend(
    loaded: ctypes.CDLL, stage: Stage, spans: Sequence[Span], queries: torch.Tensor, window: int = 0
) -> torch.Tensor:
    """What the second layer attends to, over a cache that must not change."""
    layout = stage.layout
    spec = make_spec(stage.heads, layout.kv_heads, layout.head_dim)
    spec = replace(spec, windows=(0, window) if window else ())
    kernels = NativeKernels(spec, layout, stage.memory, loaded=loaded)
    before = stage.memory.clone()
    positions = torch.tensor([span.start for span in spans])
    attended = kernels.attend(1, queries, kernels.plan(spans, positions))
    if all((span.start + 1) % layout.block_tokens == 0 for span in spans):
        assert torch.equal(stage.memory, before)
    return attended


def last_tokens(stage: Stage, lengths: Sequence[int]) -> list[Span]:
    return [Span(n - 1, 1, table) for n, table in zip(lengths, stage.tables, strict=True)]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler here")
def test_it_was_compiled_for_every_level_there_is() -> None:
    assert list(levels_here()) == LEVELS


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_decodes_attend_to_their_own_keys_alone(loaded: ctypes.CDLL, group: int, dim: int) -> None:
    """Lengths around a block and around a register; NaN in every slot that is nobody's."""
    stage = Stage.make(LENGTHS, heads=2 * group, kv_heads=2, dim=dim)
    queries = stage.queries([1] * len(LENGTHS))
    spans = last_tokens(stage, LENGTHS)
    found = attend(loaded, stage, spans, queries)
    torch.testing.assert_close(found.double(), stage.expected(queries, spans, 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("block_tokens", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 40, 699])
def test_blocks_of_any_size_and_windows(
    loaded: ctypes.CDLL, block_tokens: int, window: int
) -> None:
    stage = Stage.make(LENGTHS, block_tokens=block_tokens)
    queries = stage.queries([1] * len(LENGTHS))
    spans = last_tokens(stage, LENGTHS)
    found = attend(loaded, stage, spans, queries, window)
    wanted = stage.expected(queries, spans, 1, window)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)
    if window:
        others = stage.forget_before([length - window for length in LENGTHS])
        again = attend(loaded, others, last_tokens(others, LENGTHS), queries, window)
        assert torch.equal(again, found)


@pytest.mark.parametrize("dim", [48, 64, 80, 128, 256])
def test_attention_in_bfloat16_is_as_exact_as_torchs(loaded: ctypes.CDLL, dim: int) -> None:
    stage = Stage.make(LENGTHS, dim=dim, dtype="bfloat16")
    queries = stage.queries([1] * len(LENGTHS))
    spans = last_tokens(stage, LENGTHS)
    assert_as_exact_as_torch(
        attend(loaded, stage, spans, queries),
        stage.torchs_own(queries, spans, 1),
        stage.expected(queries, spans, 1),
    )


def test_attention_is_the_same_bits_in_any_company(loaded: ctypes.CDLL) -> None:
    alone = Stage.make([333])
    query = alone.queries([1])
    wanted = attend(loaded, alone, last_tokens(alone, [333]), query)[0]
    for lengths, place in (([333, 9, 200], 0), ([65, 1, 333, 70, 700], 2)):
        among = Stage.make(lengths, shuffle=place + 1)
        queries = among.queries([1] * len(lengths)).clone()
        queries[place] = query[0]
        found = attend(loaded, among, last_tokens(among, lengths), queries)
        assert torch.equal(found[place], wanted)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_stays_none(loaded: ctypes.CDLL, number: float) -> None:
    """Of one sequence: the others know nothing of it."""
    stage = Stage.make([40, 70])
    queries = stage.queries([1, 1]).clone()
    good = attend(loaded, stage, last_tokens(stage, [40, 70]), queries)
    queries[0, 0, 3] = number
    found = attend(loaded, stage, last_tokens(stage, [40, 70]), queries)
    assert not torch.isfinite(found[0, : stage.layout.head_dim]).any()
    assert torch.equal(found[1], good[1])
    rows = torch.ones(3, 40)
    rows[1, 39] = number
    layout = stage.layout
    kernels = NativeKernels(make_spec(8, 2, 64), layout, stage.memory, loaded=loaded)
    residual = torch.zeros(3, 40)
    normed = kernels.add_rms_norm(rows, residual, torch.ones(40), 1e-6)
    assert torch.isfinite(normed).all(dim=1).tolist() == [True, False, True]
    assert torch.isfinite(kernels.gated_activation(rows)).all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fill", [0.0, float("nan")])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 48), (7, 1, 80), (6, 3, 32)]
)
def test_prompts_in_chunks_and_decodes_equal_the_textbook(
    loaded: ctypes.CDLL, heads: int, kv_heads: int, head_dim: int, fill: float, dtype: str
) -> None:
    """What it stores it reads, and torch's prompts read; steps have both."""
    spec = make_spec(heads, kv_heads, head_dim)
    lengths = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 75, 130]
    stage = Sequences(spec, lengths, fill, dtype, partial(NativeKernels, loaded=loaded))
    found = [torch.zeros(2, length, heads * head_dim) for length in lengths]
    done = [0] * len(lengths)
    chance = random.Random(heads)
    while any(have < length for have, length in zip(done, lengths, strict=True)):
        ranges = []
        for index, length in enumerate(lengths):
            count = min(length - done[index], chance.choice([1, 1, 7, 32, 33]))
            if count and chance.random() < 0.8:
                ranges.append((index, done[index], count))
        if not ranges:
            continue
        for index, part in stage.step(ranges).items():
            found[index][:, done[index] : done[index] + part.shape[1]] = part
            done[index] += part.shape[1]
    for index in range(len(lengths)):
        difference = (found[index].double() - stage.expected(index)).abs().max()
        assert difference < exactness(dtype), index


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "outs"), [(32, 16), (64, 48), (512, 112), (96, 200), (37, 13)])
def test_products_of_any_shape(
    loaded: ctypes.CDLL, dtype: torch.dtype, width: int, outs: int
) -> None:
    """By each number of rows that is computed another way; none at all among them."""
    linear = Products(loaded, dtype, strict=False).linear
    weight, bias = torch.randn(outs, width).to(dtype), torch.randn(outs).to(dtype)
    bounds = LIBRARYS_ROWS[dtype]
    for count in (0, 1, 7, 8, 15, 16, 17, 32, 33, 63, bounds[-1], bounds.stop):
        rows = torch.randn(count, width).to(dtype)
        exact = rows.double() @ weight.double().T
        for added in (None, bias):
            wanted = exact if added is None else exact + bias.double()
            torchs = functional.linear(rows, weight, added)
            assert_exact(linear(rows, weight, added), torchs, wanted)
        columns = rows.t().contiguous().t()
        assert torch.equal(linear(columns, weight), linear(rows, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "outs"), [(64, 48), (352, 208), (40, 24)])
def test_strict_products_are_the_same_bits_for_any_number_of_rows(
    loaded: ctypes.CDLL, dtype: torch.dtype, width: int, outs: int
) -> None:
    linear = Products(loaded, dtype, strict=True).linear
    rows, weight = torch.randn(400, width).to(dtype), torch.randn(outs, width).to(dtype)
    whole = linear(rows, weight)
    for first, count in ((0, 0), (0, 1), (3, 2), (5, 16), (9, 17), (1, 60), (30, 301)):
        part = linear(rows[first : first + count], weight)
        assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(loaded: ctypes.CDLL, threads: int) -> None:
    before = torch.get_num_threads()
    lengths = [500, 70, 9]
    stage = Stage.make(lengths)
    queries = stage.queries([1] * 3)
    rows, weight = torch.randn(40, 512), torch.randn(1000, 512)
    linear = Products(loaded, torch.float32, strict=True).linear
    results = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            attended = attend(loaded, stage, last_tokens(stage, lengths), queries)
            results.append((attended, linear(rows, weight)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


THREADS_OF_ANOTHER = """
import os, threading, torch
from engine.kernels.native.kernels import NativeKernels
from engine.kernels.protocol import Span
from tests.engine.sequences import Sequences, make_spec

def step():
    threads.append(len(os.listdir("/proc/self/task")))
    plan = stage.kernels.plan(spans, positions)
    stage.kernels.attend(0, queries, plan)
    threads.append(len(os.listdir("/proc/self/task")))

threads = []
torch.set_num_threads(1)
stage = Sequences(make_spec(8, 2, 64), [200] * 8, 0.0, make=NativeKernels, page_bytes=1 << 18)
spans = [Span(199, 1, table) for table in stage.tables]
positions, queries = torch.full((8,), 199), torch.ones(8, 8, 64)
stepping = threading.Thread(target=step)
stepping.start()
stepping.join()
print(*threads)
"""


def test_it_takes_no_more_threads_than_torch_was_told() -> None:
    """In a thread other than the one that told it, too."""
    variables = {name: own for name, own in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS_OF_ANOTHER],
        env=variables | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after == before


def test_what_it_does_not_compute_is_torchs() -> None:
    """A head of another size, another dtype, FP8: the same engine over the reference."""
    spec = make_spec(4, 2, 16)
    memory = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    layout = KvLayout.choose(spec, "float32", PAGE_BYTES)
    assert isinstance(choose_kernels(spec, layout, memory), NativeKernels)
    odd = make_spec(4, 2, 24)
    for other, its in (
        (odd, KvLayout.choose(odd, "float32", PAGE_BYTES)),
        (spec, KvLayout.choose(spec, "float16", PAGE_BYTES)),
        (spec, KvLayout.choose(spec, "float32", PAGE_BYTES, fp8=True)),
    ):
        assert not computes(other, its)
        assert isinstance(choose_kernels(other, its, memory), ReferenceKernels)
