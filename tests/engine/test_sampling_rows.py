"""What of requests is packed for a device's sampler."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from engine.philox import uniform
from engine.sampling_rows import (
    NO_OCCURRENCES,
    OCCURS_IN_PROMPT,
    ROW,
    Kind,
    RowBuffer,
    occurrences_of,
)
from tests.engine.sampling_requests import make_request, random_request

VOCABULARY = 40


def test_a_row_is_64_bytes_and_rows_of_zeros_are_not_sampled() -> None:
    buffer = RowBuffer(3)
    assert ROW.itemsize == 64
    assert buffer.pack([], VOCABULARY) is Kind.NONE
    assert not buffer.rows["kind"].any()


@pytest.mark.parametrize(
    ("parameters", "kind"),
    [
        ({"temperature": 0.0, "top_k": 3}, Kind.GREEDY),
        ({"temperature": 1e-6}, Kind.GREEDY),
        ({"temperature": 0.5, "min_p": 0.1}, Kind.RANDOM),
        ({"temperature": 0.5, "top_k": VOCABULARY}, Kind.RANDOM),
        ({"temperature": 0.5, "top_k": VOCABULARY - 1}, Kind.FILTERED),
        ({"temperature": 0.5, "top_p": 0.5}, Kind.FILTERED),
    ],
)
def test_a_row_pays_for_what_it_asks(parameters: dict[str, float], kind: Kind) -> None:
    buffer = RowBuffer(2)
    plain = make_request([0], 1, temperature=0.0)
    assert buffer.pack([plain, make_request([0], 1, **parameters)], VOCABULARY) is kind
    assert buffer.rows["kind"].tolist() == [Kind.GREEDY, kind]


def test_parameters_and_edits_of_each_row_are_its_own() -> None:
    chance = random.Random(3)
    requests = [random_request(chance, VOCABULARY) for _ in range(50)]
    buffer = RowBuffer(64)
    buffer.pack(requests, VOCABULARY, list(range(50)))
    rows = buffer.rows
    numbers = uniform(rows["seed"].tolist(), rows["position"].tolist())
    seeds = [request.sampling.seed for request in requests]
    lengths = [len(request.tokens) for request in requests]
    assert (numbers[:50] == uniform(seeds, lengths)).all()
    assert not rows[50:].tobytes().strip(b"\0")
    for index, (row, request) in enumerate(zip(rows, requests, strict=False)):
        sampling = request.sampling
        own = buffer.edits[row["first_edit"] : row["first_edit"] + row["edits"]]
        banned = request.stop_token_ids if request.generated < sampling.min_tokens else set()
        wanted = sampling.logit_bias | dict.fromkeys(banned, -math.inf)
        assert dict(own.tolist()) == pytest.approx(wanted)
        penalised = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        ) != (1.0, 0.0, 0.0)
        assert row["occurrences"] == (index if penalised else NO_OCCURRENCES)
        assert row["repetition"] == np.float32(sampling.repetition_penalty)
        assert math.exp(row["log_min_p"]) == pytest.approx(sampling.min_p, rel=1e-6)
    assert buffer.used_bytes == buffer.edits_start + 8 * int(rows["edits"].sum())


def test_a_packed_buffer_forgets_the_step_before() -> None:
    buffer = RowBuffer(2)
    biased = make_request([0], 1, temperature=1.0, logit_bias={3: 1.0}, top_k=2)
    buffer.pack([biased, biased], VOCABULARY)
    assert buffer.pack([make_request([0], 1, temperature=0.0)], VOCABULARY) is Kind.GREEDY
    assert buffer.rows["kind"].tolist() == [Kind.GREEDY, Kind.NONE]
    assert buffer.used_bytes == buffer.edits_start


def test_more_than_there_is_room_for_is_refused() -> None:
    request = make_request([0], 1, logit_bias={1: 1.0, 2: 1.0, VOCABULARY: 1.0})
    with pytest.raises(ValueError, match="3 rows to sample, and room for 2"):
        RowBuffer(2).pack([request] * 3, VOCABULARY)
    with pytest.raises(ValueError, match="4 edits of logits, and room for 3"):
        RowBuffer(2, edits_max=3).pack([request] * 2, VOCABULARY)


def test_occurrences_tell_prompt_from_output() -> None:
    table = occurrences_of(make_request([5, 5, 2, 2, 7, 2], 3), 9)
    wanted = [0, 0, OCCURS_IN_PROMPT + 2, 0, 0, OCCURS_IN_PROMPT, 0, 1, 0]
    assert table.tolist() == wanted
