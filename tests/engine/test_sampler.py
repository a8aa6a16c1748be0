"""Sampling against a slow reading of the same rules in plain Python, and against chance."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from msgspec import structs

from engine.penalties import adjust, is_adjusted
from engine.philox import uniform
from engine.request import Request
from engine.sampler import CANDIDATES, sample
from tests.engine.sampling_requests import make_request, random_request

VOCABULARY = 40


def slow_logits(row: list[float], request: Request) -> list[float]:
    """Bans, biases and penalties, one token at a time."""
    sampling, row = request.sampling, list(row)
    prompt, output = (
        request.tokens[: request.prompt_tokens],
        request.tokens[request.prompt_tokens :],
    )
    for token in range(len(row)):
        if len(output) < sampling.min_tokens and token in request.stop_token_ids:
            row[token] = -math.inf
        row[token] += sampling.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            if row[token] > 0:
                row[token] /= sampling.repetition_penalty
            else:
                row[token] *= sampling.repetition_penalty
        row[token] -= sampling.frequency_penalty * output.count(token)
        row[token] -= sampling.presence_penalty * (token in output)
    return row


def slow_distribution(row: list[float], request: Request) -> list[float]:
    """The probability of every token after temperature and filters."""
    sampling = request.sampling
    row = [value / sampling.temperature for value in row]
    order = sorted(range(len(row)), key=lambda token: -row[token])
    top = row[order[0]]
    kept = order[: sampling.top_k or len(order)]
    total = sum(math.exp(row[token] - top) for token in kept)
    before, nucleus = 0.0, []
    for token in kept:
        if not nucleus or before < sampling.top_p:
            nucleus.append(token)
        before += math.exp(row[token] - top) / total
    likely = {
        token
        for token in nucleus
        if math.exp(row[token] - top) >= sampling.min_p and row[token] > -math.inf
    }
    weights = [math.exp(row[token] - top) if token in likely else 0.0 for token in range(len(row))]
    return [weight / sum(weights) for weight in weights]


def test_penalties_equal_their_definition() -> None:
    chance = random.Random(1)
    requests = [random_request(chance, VOCABULARY) for _ in range(300)]
    logits = torch.randn(300, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    expected = torch.tensor(
        [slow_logits(row, one) for row, one in zip(logits.tolist(), requests, strict=True)]
    )
    changed = logits.clone()
    adjust(changed, requests)
    torch.testing.assert_close(changed, expected)
    for index, request in enumerate(requests):
        assert is_adjusted(request) or torch.equal(changed[index], logits[index])


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 3 * CANDIDATES])
def test_draws_equal_the_inverse_of_the_slow_distribution(vocabulary: int) -> None:
    chance = random.Random(vocabulary)
    requests = [random_request(chance, vocabulary) for _ in range(200)]
    scale = torch.tensor([0.05, 1.0, 3.0]).repeat(67)[:200, None]
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, vocabulary, generator=generator) * scale
    draws = sample(logits.clone(), requests)
    near = 0
    for row, request, draw in zip(logits.tolist(), requests, draws, strict=True):
        row = slow_logits(row, request)
        if request.sampling.temperature == 0.0:
            assert draw.token == max(range(vocabulary), key=row.__getitem__)
            continue
        number = float(uniform([request.sampling.seed], [len(request.tokens)])[0])
        reached, expected = 0.0, []
        for token, probability in enumerate(slow_distribution(row, request)):
            # Within rounding of a boundary, both neighbours are right.
            if probability > 0 and reached - 1e-4 <= number < reached + probability + 1e-4:
                expected.append(token)
            reached += probability
        near += len(expected) > 1
        assert draw.token in expected, request.sampling
    assert near < 20 or vocabulary > VOCABULARY


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1, "top_p": 0.95}],
)
def test_frequencies_of_many_draws(parameters: dict[str, Any]) -> None:
    """20,000 draws at as many positions against the distribution, by chi-square."""
    count = 20_000
    row = (torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(4)) * 1.5).tolist()[0]
    requests = [
        make_request([0] * (position % 500 + 1), 1, seed=position // 500, **parameters)
        for position in range(count)
    ]
    drawn = Counter(draw.token for draw in sample(torch.tensor([row]).repeat(count, 1), requests))
    probabilities = slow_distribution(row, requests[0])
    assert set(drawn) <= {token for token, weight in enumerate(probabilities) if weight > 0}
    large = [token for token, weight in enumerate(probabilities) if weight * count >= 5]
    assert sum(weight > 0 for weight in probabilities) - len(large) <= 10
    chi_square = sum(
        (drawn[token] - probabilities[token] * count) ** 2 / (probabilities[token] * count)
        for token in large
    )
    freedom = len(large) - 1
    # Far beyond the distribution's mean and spread: about one in a hundred thousand.
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom)


def test_top_p_takes_its_share_of_what_a_large_top_k_leaves() -> None:
    """Of 600 tokens, equal but for their order, a fifth is 120; of all of them it would be 300."""
    vocabulary, top_k, top_p = 1500, 600, 0.2
    logits = -torch.arange(vocabulary).float() * 1e-6
    request = make_request([0], 1, temperature=1.0, top_k=top_k, top_p=top_p)
    drawn = []
    for seed in range(400):
        request.sampling = structs.replace(request.sampling, seed=seed)
        drawn += [sample(logits[None].clone(), [request])[0].token or 0]
    assert 100 < max(drawn) <= 121


def test_a_draw_is_the_same_in_any_batch() -> None:
    chance = random.Random(6)
    requests = [random_request(chance, VOCABULARY) for _ in range(64)]
    logits = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(6))
    together = [draw.token for draw in sample(logits.clone(), requests)]
    order = list(range(64))
    chance.shuffle(order)
    shuffled = sample(logits[order].clone(), [requests[index] for index in order])
    assert [together[index] for index in order] == [draw.token for draw in shuffled]
    for index, request in enumerate(requests):
        assert sample(logits[index : index + 1].clone(), [request])[0].token == together[index]


def test_log_probabilities_are_of_the_raw_logits() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(7))
    raw = torch.log_softmax(logits, -1)
    requests = [
        make_request([1], 1, temperature=0.0, logprobs=0),
        make_request([1, 2, 3], 1, temperature=0.5, logprobs=5, repetition_penalty=2.0),
        make_request([1], 1, temperature=0.0),
        make_request([1], 1, temperature=1.0, top_k=2, logprobs=100),
    ]
    draws = sample(logits.clone(), requests)
    assert draws[2].logprob is None
    for row, count in ((0, 0), (1, 5), (3, VOCABULARY)):
        report = draws[row].logprob
        assert report is not None
        assert report.logprob == pytest.approx(float(raw[row, draws[row].token]))
        best = raw[row].topk(count)
        assert [token for token, _ in report.top] == best.indices.tolist()
        assert [value for _, value in report.top] == pytest.approx(best.values.tolist())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_reported_for_their_row_alone(broken: float) -> None:
    logits = torch.randn(3, VOCABULARY)
    logits[1, 5] = broken
    for temperature in (0.0, 1.0):
        requests = [
            make_request([1], 1, temperature=temperature, top_p=0.9, logprobs=2) for _ in range(3)
        ]
        draws = sample(logits.clone(), requests)
        assert draws[1].token is None
        assert all(draws[row].token is not None for row in (0, 2))


def test_biases_can_force_and_forbid_and_strangers_are_ignored() -> None:
    logits = torch.zeros(2, VOCABULARY)
    requests = [
        make_request([1], 1, temperature=1.0, logit_bias={7: 100.0, VOCABULARY + 3: 100.0}),
        make_request([1], 1, stops=(VOCABULARY + 9,), temperature=0.0, min_tokens=3),
    ]
    assert sample(logits, requests)[0].token == 7
    assert sample(logits[:0], []) == []


def test_equally_likely_tokens_are_all_reached() -> None:
    requests = [make_request([1], 1, seed=seed) for seed in range(4000)]
    drawn = Counter(draw.token for draw in sample(torch.zeros(4000, VOCABULARY), requests))
    assert set(drawn) == set(range(VOCABULARY))
    assert min(drawn.values()) > 50
