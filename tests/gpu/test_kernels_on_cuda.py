"""Kernels as machine code, at the sizes of models people serve, held to torch on the processor.

What the interpreter cannot show: the GPU's own exponentials, divisions and conversions, programs
that run at once, and a sampler captured in a graph. Skipped where there is no GPU.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="triton compiles the kernels")

from engine.kernels.reference import dense
from engine.kernels.triton.add_rms_norm import add_rms_norm
from engine.kernels.triton.gated_activation import gated_activation
from engine.kernels.triton.sampling import DeviceSampler
from engine.request import Request
from engine.sampler import sample
from engine.sampling_rows import NO_OCCURRENCES, Kind, RowBuffer, is_penalised, occurrences_of
from tests.engine.interpreted.accuracy import assert_as_exact_as_torch
from tests.engine.sampling_requests import random_request
from tests.support.devices import NEEDS_GPU

pytestmark = list(NEEDS_GPU)
VOCABULARY = 128_256
ROWS = 64
DIFFERENT_DRAWS_MAX = 1
"""Exponentials of GPU and processor differ in their last bits: a draw that falls on them may."""


def stage(requests: list[Request]) -> tuple[DeviceSampler, RowBuffer, Kind]:
    """A sampler that knows what the requests' next draws depend on."""
    device = torch.device("cuda")
    sampler = DeviceSampler(VOCABULARY, rows_max=ROWS, device=device)
    sampler.count_occurrences(ROWS)
    places = []
    for index, request in enumerate(requests):
        places.append(index if is_penalised(request) else NO_OCCURRENCES)
        if is_penalised(request):
            table = torch.from_numpy(occurrences_of(request, VOCABULARY))
            sampler.occurrences[index].copy_(table)
    buffer = RowBuffer(ROWS)
    return sampler, buffer, buffer.pack(requests, VOCABULARY, places)


def test_norm_and_activation_are_as_exact_as_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, residual = (torch.randn(2, 33, 4096, generator=generator) * 3).bfloat16()
    weight = (1 + torch.randn(4096, generator=generator) / 4).bfloat16()
    summed = rows + residual
    wide = summed.double()
    exact = wide * (wide.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    on_gpu = residual.cuda()
    found = add_rms_norm(rows.cuda(), on_gpu, weight.cuda(), 1e-6)
    assert torch.equal(on_gpu.cpu(), summed)
    assert_as_exact_as_torch(found.cpu(), dense.rms_norm(summed, weight, 1e-6), exact)

    wide = rows.double()
    exact = torch.nn.functional.silu(wide[:, :2048]) * wide[:, 2048:]
    found = gated_activation(rows.cuda())
    assert_as_exact_as_torch(found.cpu(), dense.gated_activation(rows), exact)


@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_a_captured_sampler_draws_the_hosts_tokens(spread: float) -> None:
    """Replayed for other requests than it was captured for, over flat and steep rows."""
    chance = random.Random(2)
    sampler, buffer, _ = stage([])
    logits = torch.zeros(ROWS, VOCABULARY, dtype=torch.bfloat16, device="cuda")
    sampler.take(buffer)
    sampler.launch(logits, rows=ROWS, kind=Kind.FILTERED, likeliest=True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.launch(logits, rows=ROWS, kind=Kind.FILTERED, likeliest=True)
    different = 0
    for step in range(3):
        requests = [random_request(chance, VOCABULARY) for _ in range(ROWS)]
        own, buffer, _ = stage(requests)
        sampler.occurrences.copy_(own.occurrences)
        generator = torch.Generator().manual_seed(step)
        values = (torch.randn(ROWS, VOCABULARY, generator=generator) * spread).bfloat16()
        logits.copy_(values)
        sampler.take(buffer)
        graph.replay()
        found = sampler.draws(sampler.results.cpu(), buffer, ROWS, sampler.likeliest.cpu())
        wanted = sample(values.clone(), requests)
        for one, other in zip(found, wanted, strict=True):
            different += one.token != other.token
            if other.logprob is not None and one.token == other.token:
                assert one.logprob is not None
                assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
    assert different <= DIFFERENT_DRAWS_MAX
