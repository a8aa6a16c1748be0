"""Sampling in a few launches for a whole batch, held to the host's sampler token by token."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from engine.kernels.triton.sampling import DeviceSampler
from engine.kernels.triton.sampling_parts import uniform_number
from engine.link.tokens import LOGPROBS_MAX
from engine.philox import uniform
from engine.request import Request
from engine.sampler import Draw, sample
from engine.sampling_rows import NO_OCCURRENCES, Kind, RowBuffer, is_penalised, occurrences_of
from tests.engine.sampling_requests import make_request, random_request

CPU = torch.device("cpu")
CHUNK = 64
CANDIDATES = 32
SEEDS = 40
DRAWS = 120


@triton.jit
def numbers_kernel(seeds, positions, numbers, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    number = uniform_number(tl.load(seeds + place), tl.load(positions + place))
    tl.store(numbers + place, number)


def draw(
    logits: torch.Tensor,
    requests: Sequence[Request],
    *,
    rows_max: int | None = None,
    kind: Kind | None = None,
    chunk: int = CHUNK,
    candidates: int = CANDIDATES,
) -> list[Draw]:
    """What the device draws for all requests at once."""
    vocabulary = logits.shape[1]
    rows = rows_max or len(requests)
    sampler = DeviceSampler(
        vocabulary,
        rows_max=rows,
        device=CPU,
        chunk=chunk,
        candidates=candidates,
    )
    if any(map(is_penalised, requests)):
        sampler.count_occurrences(len(requests))
    for own in (sampler.results, sampler.likeliest, sampler._listed, sampler._best):
        own.fill_(-(1 << 30))
    for own in (sampler._scaled, sampler._listed_values, sampler._peaks, sampler._raw_peaks):
        own.fill_(float("nan"))
    buffer = RowBuffer(rows)
    places = []
    for index, request in enumerate(requests):
        places.append(index if is_penalised(request) else NO_OCCURRENCES)
        if is_penalised(request):
            table = torch.from_numpy(occurrences_of(request, vocabulary))
            sampler.occurrences[index].copy_(table)
    costliest = buffer.pack(requests, vocabulary, places)
    sampler.take(buffer)
    reports = any(request.sampling.logprobs for request in requests)
    sampler.launch(logits, rows=rows, kind=kind or costliest, likeliest=reports)
    draws = sampler.draws(sampler.results, buffer, len(requests), sampler.likeliest)
    for index, (request, own) in enumerate(zip(requests, draws, strict=True)):
        assert sampler.tokens[index] == (own.token or 0)
        if is_penalised(request) and own.token is not None:
            request.tokens.append(own.token)
            after = torch.from_numpy(occurrences_of(request, vocabulary))
            assert torch.equal(sampler.occurrences[index], after)
            request.tokens.pop()
    return draws


def assert_equal(
    found: Sequence[Draw], wanted: Sequence[Draw], requests: Sequence[Request]
) -> None:
    for own, other, request in zip(found, wanted, requests, strict=True):
        assert own.token == other.token, request
        if other.logprob is not None:
            assert own.logprob is not None
            assert own.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-5)
            for (token, value), (likely, logprob) in zip(
                own.logprob.top, other.logprob.top, strict=True
            ):
                assert value == pytest.approx(logprob, abs=1e-5)
                assert token == likely


@pytest.mark.parametrize("vocabulary", [1, CHUNK - 1, CHUNK, CHUNK + 1, 200])
def test_draws_are_the_hosts(vocabulary: int) -> None:
    chance = random.Random(vocabulary)
    generator = torch.Generator().manual_seed(vocabulary)
    fixed = {"min_tokens": 0} if vocabulary == 1 else {}  # the only token may not be banned
    requests = [random_request(chance, vocabulary + 5, **fixed) for _ in range(16)]
    for request in requests:
        request.tokens[:] = [token % vocabulary for token in request.tokens]
    wide = torch.full((16, vocabulary + 3), float("nan"))
    wide[:, :vocabulary] = torch.randn(16, vocabulary, generator=generator) * 3
    logits = wide[:, :vocabulary]
    wanted = sample(logits.clone(), requests)
    before = logits.clone()
    assert_equal(draw(logits, requests), wanted, requests)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (7, 1.0), (7, 0.8), (200, 0.95)])
@pytest.mark.parametrize("spread", [0.05, 5.0])
def test_filters_cut_where_the_host_does(top_k: int, top_p: float, spread: float) -> None:
    """Flat and steep rows, with and without a short list, and rounded so that many are equal."""
    generator = torch.Generator().manual_seed(5)
    requests = [
        make_request([1, 2], 1, temperature=1.0, top_k=top_k, top_p=top_p, seed=seed)
        for seed in range(2)
    ]
    logits = torch.randn(2, 250, generator=generator) * spread
    logits[1:] = (logits[1:] / spread * 2).round() * spread
    wanted = sample(logits.clone(), requests)
    for candidates in (16, 256):
        assert_equal(draw(logits, requests, candidates=candidates), wanted, requests)


def test_many_seeds_draw_the_hosts_tokens() -> None:
    generator = torch.Generator().manual_seed(7)
    row = (torch.randn(90, generator=generator) * 2).bfloat16()
    requests = [
        make_request([0] * (1 + seed % 7), 1, temperature=0.8, top_p=0.9, seed=seed)
        for seed in range(SEEDS)
    ]
    logits = row.expand(SEEDS, 90)
    wanted = sample(logits.clone(), requests)
    assert_equal(draw(logits, requests, chunk=128, candidates=128), wanted, requests)


def test_frequencies_follow_the_distribution() -> None:
    """Chi-square of DRAWS draws, at a thousandth of chance; the seeds are fixed."""
    weights = [0.4, 0.3, 0.2, 0.1]
    logits = torch.tensor([weights]).log().expand(DRAWS, 4)
    requests = [make_request([0], 1, temperature=1.0, seed=seed) for seed in range(DRAWS)]
    counts = Counter(one.token for one in draw(logits, requests, chunk=8))
    statistic = sum((counts[i] - DRAWS * p) ** 2 / (DRAWS * p) for i, p in enumerate(weights))
    assert statistic < 16.3


def test_ties_go_to_the_first_token() -> None:
    logits = torch.zeros(2, 200)
    logits[0, [70, 130, 131]] = 1.0
    requests = [make_request([0], 1, temperature=0.0) for _ in range(2)]
    assert [one.token for one in draw(logits, requests)] == [70, 0]


def test_both_zeros_share_one_fate() -> None:
    logits = torch.full((12, 4), -0.0)
    logits[:, 1::2] = 0.0
    requests = [make_request([0], 1, temperature=1.0, top_k=1, seed=seed) for seed in range(12)]
    assert {one.token for one in draw(logits, requests)} == {0, 1, 2, 3}


def test_a_draw_is_the_same_in_any_batch_and_graph() -> None:
    chance = random.Random(11)
    requests = [random_request(chance, 150) for _ in range(8)]
    logits = torch.randn(10, 150, generator=torch.Generator().manual_seed(11)) * 2
    together = draw(logits[:8], requests)
    padded = draw(logits, requests, rows_max=10, kind=Kind.FILTERED)
    assert padded == together
    alone = [draw(logits[row : row + 1], [request])[0] for row, request in enumerate(requests[:4])]
    assert alone == together[:4]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_fails_its_row_alone(broken: float) -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.5},
    ]
    requests = [make_request([1], 1, logprobs=2, **kind) for kind in kinds * 2]
    wanted = draw(logits, requests)
    if math.isinf(broken) and broken < 0:
        logits[:3] = broken
    else:
        logits[:3, 70] = broken
    found = draw(logits, requests)
    assert found[:3] == [Draw(None)] * 3
    assert found[3:] == wanted[3:]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_whose_tokens_are_all_banned_fails() -> None:
    parameters: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 1, "top_p": 0.5},
    ]
    requests = [make_request([1], 1, stops=(0, 1), min_tokens=3, **own) for own in parameters]
    assert draw(torch.zeros(3, 2), requests) == [Draw(None)] * 3


def test_random_numbers_are_the_hosts() -> None:
    chance = random.Random(4)
    seeds = [chance.randrange(1 << 64) for _ in range(510)] + [0, (1 << 64) - 1]
    positions = [chance.choice([0, 1, 77, 1 << 20, (1 << 63) + 5]) for _ in seeds]
    found = torch.zeros(len(seeds), dtype=torch.float64)
    numbers_kernel[(1,)](
        torch.from_numpy(np.array(seeds, dtype=np.uint64)),
        torch.from_numpy(np.array(positions, dtype=np.uint64)),
        found,
        COUNT=len(seeds),
    )
    assert found.tolist() == uniform(seeds, positions).tolist()


def test_twenty_likeliest_tokens_are_in_order() -> None:
    logits = torch.randn(2, 333, generator=torch.Generator().manual_seed(2)).bfloat16()
    logits[1] = 0.5
    requests = [make_request([1], 1, temperature=0.0, logprobs=LOGPROBS_MAX) for _ in range(2)]
    first, equal = draw(logits, requests)
    assert first.logprob is not None
    assert equal.logprob is not None
    raw = torch.log_softmax(logits.float(), dim=-1)
    values = [value for _, value in first.logprob.top]
    assert values == pytest.approx(raw[0].topk(LOGPROBS_MAX).values.tolist(), abs=1e-5)
    for token, value in first.logprob.top:
        assert value == pytest.approx(raw[0, token].item(), abs=1e-5)
    assert [token for token, _ in equal.logprob.top] == list(range(LOGPROBS_MAX))


def test_rows_that_fill_a_graph_are_left_alone() -> None:
    sampler = DeviceSampler(100, rows_max=4, device=CPU, chunk=CHUNK)
    sampler.results.fill_(77)
    sampler.tokens.fill_(77)
    logits = torch.full((4, 100), float("nan"))
    sampler.launch(logits, rows=4, likeliest=True)
    assert (sampler.results == 77).all()
    assert (sampler.tokens == 77).all()
